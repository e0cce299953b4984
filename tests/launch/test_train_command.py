"""launch/train.py on bad input: one line, exit 64, and nothing on disk."""

from pathlib import Path

import pytest

from launch.train import main

SINGLE = "sweeps/single.yaml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launcher.minutes=2"], "launcher.minutes is for runs of several ranks"),
        (["launcher.cluster=slurm"], "launcher.cluster is for runs of several ranks"),
        (
            ["launcher.partition=gpu", "execution.ranks=2", "execution.threads=1"],
            "add launcher.cluster=slurm",
        ),
        (["optimizer..learning_rate=0.5"], "is not an override"),
        (["seed=1", "seed=2"], "overridden twice"),
        (["budget.tokens=["], "cannot be read"),
        (["execution.data_root=${oc.env:HOME}/data"], "interpolation"),
    ],
)
def test_an_override_that_would_change_nothing_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([SINGLE, *words, "--runs", str(tmp_path / "runs")]) == 64
    printed = capsys.readouterr().out
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "runs").exists()

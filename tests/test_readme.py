"""The documents' commands, run in their fast form, and the files and make targets they name."""

import json
import random
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from analysis.tuning.__main__ import main as fit_rules
from tests.launch.command import ROOT, command, forked

TEXT = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


LINES = list(
    dict.fromkeys(
        line.partition("#")[0].strip()
        for block in blocks("sh", TEXT + CONTRIBUTING)
        for line in block.splitlines()
    )
)
OWN = [line for line in LINES if "mine" in line]
SWEEPS = [line for line in LINES if line.startswith("python launch/sweep.py") and line not in OWN]
TRAINS = [line for line in LINES if line.startswith("python launch/train.py")]
FITS = [line for line in LINES if line.startswith("python -m analysis.fit")]
RULES = [line for line in LINES if line.startswith("python -m analysis.tuning")]
MAKES = [line for line in LINES if line.startswith("make")]
TARGETS = sorted(set(re.findall(r"`make ([a-z-]+)`", TEXT + CONTRIBUTING)))


def test_every_command_is_one_that_is_tested() -> None:
    assert sorted(LINES) == sorted([*SWEEPS, *OWN, *TRAINS, *FITS, *RULES, *MAKES])
    assert len(SWEEPS) >= 6
    assert len(OWN) >= 3
    assert TRAINS
    assert FITS
    assert RULES
    assert MAKES


@pytest.mark.parametrize("line", RULES)
def test_rule_commands_read_a_sweep_folder(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # tests/analysis/test_tuning_command.py has what it answers.
    (folder,) = (word for word in shlex.split(line) if word.startswith("runs/"))
    assert fit_rules([str(tmp_path / folder)]) == 2
    assert "holds no sweep.yaml" in capsys.readouterr().out


@pytest.mark.parametrize("line", SWEEPS)
def test_sweep_commands_plan(line: str) -> None:
    words = [word for word in shlex.split(line)[1:] if word not in ("--plan", "--status")]
    ended = forked(*words, "--plan")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "tokens to train" in " ".join(ended.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("line", TRAINS)
def test_train_commands_train(line: str, tmp_path: Path) -> None:
    small = ["budget.tokens=8192", "schedule.warmup_tokens=2048"]
    small += ["dataset.name=small", "corpus.dataset=small"]
    data = ("dataset.domain_bytes=1000000", f"execution.data_root={tmp_path}")
    given = [w for w in shlex.split(line)[1:] if not w.startswith("budget.tokens=")]
    words = [*given, *small, *data, "evaluation.milestones=[]"]
    ended = command(*words, "--runs", str(tmp_path / "runs"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "bits per byte" in ended.stdout


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a corpus and a sweep file as the README describes them."""
    (block,) = blocks("yaml", TEXT)
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(
        (ROOT / "sweeps" / "scaling.yaml").read_text() + block
    )
    (row,) = re.findall(r'`(\{"text".*?\})`', TEXT)
    draw = random.Random(0)
    lines = []
    for number in range(600):
        document = json.loads(row)
        document["text"] = " ".join(draw.choices(["two", "three", "corpus", "ladder"], k=300))
        document["text"] += f" {number}"
        document["meta"]["pile_set_name"] = ("web", "code", "wiki")[number % 3]
        lines.append(json.dumps(document))
    (tmp_path / "my_corpus").mkdir()
    (tmp_path / "my_corpus" / "part.jsonl").write_text("\n".join(lines))
    return tmp_path


def in_folder(folder: Path, line: str, *more: str) -> str:
    """Run a command of the README in a folder that is not the checkout; what it printed."""
    words = shlex.split(line)[1:]
    if words[0].endswith(".py"):
        ended = forked(str(ROOT / words[0]), *words[1:], *more, cwd=folder)
    else:
        ended = command(*words, *more, cwd=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return " ".join(ended.stdout.split())


def test_own_corpus_plans(own: Path) -> None:
    plan, *_ = OWN
    printed = in_folder(own, plan)
    assert "16 runs" in printed
    assert "more_web" in printed


@pytest.mark.slow
def test_own_corpus_trains_and_generates(own: Path) -> None:
    _, train, generate = OWN
    small = ("ladders.nano.rungs=[10k]", "ladders.nano.horizons=[81920]", "architectures=[mamba]")
    assert "2 of 2 runs finished" in in_folder(own, train, *small)
    assert (own / "runs" / "mine-nano" / "report" / "index.html").is_file()
    runs = [path.parent for path in (own / "runs" / "mine-nano").glob("*/summary.json")]
    assert len(runs) == 2
    assert "Once upon" in in_folder(own, generate.replace("<run>", runs[0].name), "--tokens", "8")


@pytest.mark.parametrize("line", FITS)
def test_fit_commands_fit(line: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = ["architecture,parameters,tokens,loss"]
    for architecture, coefficient in (("transformer", 400.0), ("mamba", 360.0)):
        for parameters in (1e7, 3e7, 1e8, 3e8, 1e9):
            for tokens in (2e8, 1e9, 5e9, 2e10):
                loss = 1.7 + coefficient / parameters**0.34 + 410 / tokens**0.28
                loss *= draw.gauss(1.0, 0.001)
                rows.append(f"{architecture},{parameters},{tokens},{loss}")
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    assert "alpha" in in_folder(tmp_path, line)


@pytest.mark.parametrize("line", [*MAKES, *(f"make {target}" for target in TARGETS)])
def test_make_targets_exist(line: str) -> None:
    done = subprocess.run(
        ["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_files_that_the_documents_link_to_exist() -> None:
    for name in re.findall(r"\]\(([A-Za-z_/.]+)\)", TEXT + CONTRIBUTING):
        assert (ROOT / name).exists(), name


def test_paths_that_the_tour_names_exist() -> None:
    paths = re.findall(r"`([A-Za-z_0-9]+(?:/[A-Za-z_0-9.]+)+/?)`", CONTRIBUTING)
    assert len(paths) > 50
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert [path for path in missing if not path.startswith("reports/")] == []

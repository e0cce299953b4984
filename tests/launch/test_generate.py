"""The command that generates text refuses what it cannot do, in one line and before it writes."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import launch.generate
from launch.generate import main
from models.generate import GeneratedTokens, generate
from tests.trainer.checkpoint_samples import reseal
from tests.trainer.study import build_tiny, make, run
from trainer.manifest import MANIFEST, MODEL_FILE, committed, hash_file
from trainer.schema import dump


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose vocabulary has more ids than its tokenizer, and learned positions."""
    made = make(data)
    model = {**dump(made.run.model), "vocab_size": 320, "learned_positions": 64}
    folder = tmp_path_factory.mktemp("sweep") / "one"
    schedule = {"warmup_tokens": 0}
    run(make(data, {"model": model, "schedule": schedule, "budget": {"tokens": 1024}}), folder)
    (folder.parent / "sweep.yaml").write_text(yaml.safe_dump({"runs": ["one"]}))
    return folder


def attempt(
    capsys: pytest.CaptureFixture[str], data: Path, folder: Path, *words: str
) -> tuple[int, str, str]:
    code = main([str(folder), *words, "--data", str(data)])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("x", "--tokens", "0"), "--tokens 0 is not above 0"),
        (("x", "--tokens", "-3"), "--tokens -3 is not above 0"),
        (("x", "--threads", "0"), "--threads 0 is not above 0"),
        (("x", "--temperature", "nan"), "temperature nan is not finite"),
        (("x", "--temperature", "inf"), "temperature inf is not finite"),
        (("x", "--temperature", "-1"), "temperature -1.0 is negative"),
        (("x", "--top-p", "nan"), "top_p nan is not in (0, 1]"),
        (("x", "--top-p", "0"), "top_p 0.0 is not in (0, 1]"),
        (("x", "--seed", "-1"), "seed -1 is out of range"),
        (("x", "--seed", str(2**70)), "is out of range; take 0 to 2^63 - 1"),
        (("a\udcff",), "the prompt is not UTF-8 from character 1 on"),
        (("x" * 70, "--tokens", "1"), "needs 71 positions, but the model has 64"),
        (("x",), "a prompt of 2 tokens with 200 more needs 201 positions"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_is_written(
    trained: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    code, out, err = attempt(capsys, data, trained, *words)
    assert code == 64
    assert out == ""
    assert message in err


@pytest.mark.parametrize("prompt", ["", "abc", "\u00e9\u4e2d"])
@pytest.mark.parametrize("temperature", ["0", "50"])
def test_every_token_has_a_text_or_ends_the_document(
    trained: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    prompt: str,
    temperature: str,
) -> None:
    ids = []

    def recorded(*given: Any) -> Iterator[GeneratedTokens]:
        for piece in generate(*given):
            ids.append(int(piece.tokens))
            yield piece

    monkeypatch.setattr(launch.generate, "generate", recorded)
    words = (prompt, "--tokens", "50", "--temperature", temperature)
    code, out, err = attempt(capsys, data, trained, *words)
    assert code == 0, err
    assert out.startswith(prompt)
    assert max(ids) <= 256
    assert len(ids) == 50 or ids[-1] == 256


def test_a_sweep_of_one_run_is_that_run(
    trained: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("x", "--tokens", "5", "--temperature", "0")
    assert (
        attempt(capsys, data, trained.parent, *words)[:2]
        == attempt(capsys, data, trained, *words)[:2]
    )


def test_a_folder_that_is_no_run_names_one(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("{}")
    code, _, err = attempt(capsys, data, tmp_path, "x")
    assert code == 64
    assert "does not exist" in err
    assert "such as" in err
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"runs": ["a", "b"]}))
    code, _, err = attempt(capsys, data, tmp_path, "x")
    assert code == 64
    assert "is a sweep of 2 runs; give one of them, such as" in err
    (tmp_path / "sweep.yaml").write_text("name: empty")
    assert "is a sweep of 0 runs" in attempt(capsys, data, tmp_path, "x")[2]
    assert "does not exist" in attempt(capsys, data, tmp_path / "\udcff", "x")[2]


def test_a_model_whose_logits_are_no_numbers_generates_nothing(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(trained, folder)
    checkpoint = committed(folder / "checkpoints")[-1]
    weights = load_file(checkpoint / MODEL_FILE)
    save_file(
        {n: torch.full_like(w, torch.nan) for n, w in weights.items()}, checkpoint / MODEL_FILE
    )
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    reseal(checkpoint, files={**files, MODEL_FILE: asdict(hash_file(checkpoint / MODEL_FILE))})
    # It states the hash of the weights that the run ended with.
    (folder / "summary.json").unlink()
    for temperature in ("0", "1"):
        words = ("x", "--tokens", "5", "--temperature", temperature)
        code, out, err = attempt(capsys, data, folder, *words)
        assert code == 64
        assert out == "x"
        assert "the model's logits are not finite" in err

"""Checking a dataset from the command line."""

import multiprocessing
import re
import signal
from pathlib import Path

import pytest
from rich.console import Console

from data_pipelines.config import DatasetConfig, SourceConfig, TokenizerConfig
from data_pipelines.manifest import read_manifest
from launch.data import DataError, _build, _follow, build_data, verify_data
from launch.train import main
from tests.trainer.study import build_tiny
from trainer.exit_codes import ExitCode
from trainer.schema import dump


def test_a_damaged_byte_is_found_and_named(tmp_path: Path) -> None:
    root = build_tiny(tmp_path)
    config = DatasetConfig("tiny", SourceConfig("jsonl", (str(root / "tiny.jsonl"),)))
    verify_data(config, root)
    shard = root / "tiny" / read_manifest(root / "tiny").streams[0].shards[0].zip_name
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=shard.name) as raised:
        verify_data(config, root)
    assert raised.value.exit_code == ExitCode.BAD_DATA


def build_tokens(tmp_path: Path, tokenizer: TokenizerConfig) -> str:
    source = SourceConfig("jsonl", (str(tmp_path / "tiny.jsonl"),))
    config = DatasetConfig("given", source, tokenizer, block_tokens=128, validation_fraction=0.1)
    return build_data(config, tmp_path, Console())


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "given.json is JSON, but no tokenizer"), ("\0", "given.json is not JSON")],
)
def test_a_wrong_file_as_tokenizer_is_no_kill(tmp_path: Path, content: str, message: str) -> None:
    build_tiny(tmp_path)
    (tmp_path / "given.json").write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        build_tokens(tmp_path, TokenizerConfig("file", str(tmp_path / "given.json"), 300))
    assert "killed" not in str(raised.value)
    assert "rerun" not in str(raised.value)


class Pipe:
    """The parent's end of the pipe to a build that ended without a word."""

    def recv(self) -> None:
        """Find the end of the pipe."""
        raise EOFError


class Child:
    """A build that has ended."""

    def __init__(self, exitcode: int) -> None:
        self.exitcode = exitcode

    def join(self) -> None:
        """Wait for nothing."""


@pytest.mark.parametrize(
    ("exitcode", "message"),
    [
        (-signal.SIGKILL, "killed by SIGKILL, perhaps for lack of memory; rerun"),
        (-signal.SIGTERM, "killed by SIGTERM; rerun"),
        (-signal.SIGSEGV, "crashed by itself with SIGSEGV"),
        (1, "ended with exit code 1, and not from outside; its own error is printed above"),
        (0, "ended with exit code 0, and not from outside"),
    ],
)
def test_only_a_signal_is_called_a_kill(exitcode: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _follow(Pipe(), Child(exitcode), Console())  # type: ignore[arg-type]


class Panic(BaseException):
    """What a library raises that is no Exception."""


@pytest.mark.parametrize("error", [MemoryError("x"), KeyError("x"), Panic("x"), RuntimeError("x")])
def test_every_error_of_a_build_reaches_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("data_pipelines.build.build_dataset", fail)
    config = DatasetConfig("given", SourceConfig("jsonl", ("nowhere",)))
    ours, theirs = multiprocessing.Pipe()
    _build(dump(config), tmp_path, theirs)
    with pytest.raises(DataError, match="x") as raised:
        _follow(ours, Child(0), Console())  # type: ignore[arg-type]
    foreseen = isinstance(error, RuntimeError)
    assert (type(error).__name__ in str(raised.value)) != foreseen
    ours.close()
    theirs.close()


def test_a_build_whose_command_is_gone_ends_quietly(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    _build({"name": "../x"}, tmp_path, theirs)
    theirs.close()


def test_a_dataset_is_compared_with_its_files_at_every_start(tmp_path: Path) -> None:
    build_tiny(tmp_path)
    root_hash = build_tokens(tmp_path, TokenizerConfig())
    assert build_tokens(tmp_path, TokenizerConfig()) == root_hash
    with (tmp_path / "tiny.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"built from other files: .*tiny\.jsonl had \d+ bytes"):
        build_tokens(tmp_path, TokenizerConfig())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.vocab_size=256"], r"model\.vocab_size is 256, but corpus\.tokenizer has 257"),
        (
            ["dataset.block_tokens=256"],
            r"dataset\.block_tokens is 256, but corpus\.block_tokens is 512",
        ),
        (["dataset.name=other"], r"dataset\.name is other, but corpus\.dataset is embedded"),
        (
            ["dataset.tokenizer={kind: bpe, vocab_size: 300}"],
            r"dataset\.tokenizer is .*bpe.*, but corpus\.tokenizer is .*bytes",
        ),
        (
            ["budget.tokens=2048", "schedule.warmup_tokens=0"],
            r"domains\.cpp is 0\.15 of the 4 blocks .* less than one",
        ),
    ],
)
def test_what_does_not_fit_its_data_is_refused_before_they_are_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    root = tmp_path / "data"
    words = ["sweeps/single.yaml", *overrides, f"execution.data_root={root}"]
    assert main([*words, "--runs", str(tmp_path / "runs")]) == ExitCode.BAD_CONFIG
    assert re.search(message, capsys.readouterr().out)
    assert not root.exists()

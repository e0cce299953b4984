"""Build a dataset in a separate process, because its builder loads slow libraries."""

import contextlib
import multiprocessing
import sys
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from rich.console import Console

from data_pipelines.config import DataConfig, DatasetConfig
from data_pipelines.inputs import require_same_inputs
from data_pipelines.manifest import MANIFEST, Manifest, read_manifest
from data_pipelines.notes import notes_of, repeat_notes
from data_pipelines.verify import verify_dataset
from data_pipelines.workers import how_it_ended
from trainer.exit_codes import ExitCode
from trainer.failures import failure_of
from trainer.schema import dump, load
from untrusted.paths import inside


class DataError(RuntimeError):
    """A dataset cannot be built, or its files are damaged."""

    exit_code = ExitCode.BAD_DATA


def build_data(config: DatasetConfig, root: Path, console: Console) -> str:
    """Build a dataset unless it exists; returns its root hash.

    Raises:
        DataError: it cannot be built, or the existing one was built from another config.
    """
    folder = inside(root, config.name)
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        if manifest.config == dump(config):
            try:
                require_same_inputs(config, manifest, folder)
            except ValueError as error:
                raise DataError(str(error)) from error
            _print_notes(manifest, console)
            return manifest.root_hash
    console.print(f"building the dataset {folder} (only once)", highlight=False)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=_build, args=(dump(config), root, theirs)
    )
    child.start()
    theirs.close()
    try:
        root_hash = _follow(ours, child, console)
    finally:
        child.join()
    _print_notes(read_manifest(folder), console)
    return root_hash


def print_repeats(runs: Sequence[tuple[DataConfig, int]], root: Path, console: Console) -> None:
    """Say which domains would be read more than once, for the longest run of each corpus.

    Args:
        runs: what each run reads, and its tokens.
        root: folder of all datasets; a dataset that is not built yet says nothing.
        console: where it is printed.

    Raises:
        DataError: the dataset lacks a domain, or has less text than a corpus asks for.
    """
    longest: dict[str, tuple[DataConfig, int]] = {}
    for corpus, tokens in runs:
        if corpus.name not in longest or tokens > longest[corpus.name][1]:
            longest[corpus.name] = (corpus, tokens)
    for corpus, tokens in longest.values():
        folder = inside(root, corpus.dataset)
        if not (folder / MANIFEST).exists():
            line = f"note: repeats are known once dataset {corpus.dataset} is built (--data)"
            console.print(line, highlight=False, soft_wrap=True)
            return
        try:
            notes = repeat_notes(corpus, read_manifest(folder), tokens)
        except ValueError as error:
            raise DataError(str(error)) from error
        for note in notes:
            console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)


def verify_data(config: DatasetConfig, root: Path) -> None:
    """Check every byte of a dataset against its manifest, whatever was checked before.

    Raises:
        DataError: a file is missing or damaged.
    """
    try:
        verify_dataset(inside(root, config.name))
    except RuntimeError as error:
        raise DataError(str(error)) from error


def _print_notes(manifest: Manifest, console: Console) -> None:
    for note in notes_of(manifest):
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)


def _follow(pipe: Connection, child: SpawnProcess, console: Console) -> str:
    with console.status("building data") as status:
        while True:
            try:
                kind, text = pipe.recv()
            except (EOFError, ConnectionResetError):
                child.join()
                ended = how_it_ended(child.exitcode)
                raise DataError(f"the process that builds the data {ended}") from None
            if kind == "error":
                raise DataError(text)
            if kind == "done":
                return text
            status.update(f"building data: {text}")


def _build(plain: Mapping, root: Path, pipe: Connection) -> None:
    def report(stage: str, share: float) -> None:
        pipe.send(("progress", f"{stage} {share:.0%}"))

    # If the command was killed, nobody is left to send to.
    with contextlib.suppress(BrokenPipeError):
        try:
            # Imported here: it loads slow libraries, and a failure to load them is reported too.
            from data_pipelines.build import build_dataset

            manifest = build_dataset(load(DatasetConfig, plain), root, report=report)
        except BrokenPipeError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            pipe.send(("error", failure_of(error, ExitCode.BAD_DATA).reason))
        except KeyboardInterrupt:
            sys.exit(int(ExitCode.INTERRUPTED))
        # Panics of libraries written in Rust are no Exception.
        except BaseException as error:  # noqa: BLE001
            pipe.send(("error", _unforeseen(error)))
        else:
            pipe.send(("done", manifest.root_hash))


def _unforeseen(error: BaseException) -> str:
    """An error that no part of the build expects, with the place that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"building the data failed with {type(error).__name__}: {error} "
        f"({Path(last.filename).name} line {last.lineno}); this is an error of the program or its "
        "installation, and rerunning does not help: report it with this line"
    )

"""Build a dataset in a separate process, because its builder loads slow libraries."""

import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console

from data_pipelines.config import DatasetConfig
from data_pipelines.manifest import MANIFEST, read_manifest
from data_pipelines.verify import verify_dataset
from trainer.exit_codes import ExitCode
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
            return manifest.root_hash
    console.print(f"building the dataset {folder} (only once)", highlight=False)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=_build, args=(dump(config), root, theirs)
    )
    child.start()
    theirs.close()
    try:
        return _follow(ours, console)
    finally:
        child.join()


def verify_data(config: DatasetConfig, root: Path) -> None:
    """Check every byte of a dataset against its manifest, whatever was checked before.

    Raises:
        DataError: a file is missing or damaged.
    """
    try:
        verify_dataset(inside(root, config.name))
    except RuntimeError as error:
        raise DataError(str(error)) from error


def _follow(pipe: Connection, console: Console) -> str:
    with console.status("building data") as status:
        while True:
            try:
                kind, text = pipe.recv()
            except EOFError:
                raise DataError(
                    "the process that builds the data was killed from outside; "
                    "rerun the same command to resume the build"
                ) from None
            if kind == "error":
                raise DataError(text)
            if kind == "done":
                return text
            status.update(f"building data: {text}")


def _build(plain: Mapping, root: Path, pipe: Connection) -> None:
    from data_pipelines.build import build_dataset

    def report(stage: str, share: float) -> None:
        pipe.send(("progress", f"{stage} {share:.0%}"))

    try:
        manifest = build_dataset(load(DatasetConfig, plain), root, report=report)
    except (RuntimeError, ValueError, OSError) as error:
        pipe.send(("error", str(error)))
    else:
        pipe.send(("done", manifest.root_hash))
    pipe.close()

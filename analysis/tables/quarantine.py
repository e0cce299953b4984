"""Set damaged runs of a sweep aside by name, so that the others are still analysed."""

from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.identity import require_same
from trainer.record import StoredRun
from trainer.record_checks import read_whole_run

DAMAGED = "damaged"
_UNREADABLE = (RuntimeError, OSError, KeyError, TypeError, ValueError, AttributeError)


def open_runs(
    paths: Sequence[Path], probe: Callable[[StoredRun], object]
) -> tuple[list[StoredRun], dict[str, str]]:
    """Read run folders; of a damaged one, an empty run and the reason with its remedy, by name.

    Args:
        paths: of the folders.
        probe: computes all that a table takes from a run, so that an error there has a name.
    """
    runs, damage = [], {}
    for path in paths:
        try:
            run = read_whole_run(path)
            _require_own_folder(run)
            probe(run)
        except _UNREADABLE as error:
            damage[path.name] = _reason(path, error)
            run = StoredRun(path, {}, {}, {}, {}, [], [])
        runs.append(run)
    return runs, damage


def _require_own_folder(run: StoredRun) -> None:
    """Check that the folder, which is named after a run or a trunk, holds that one."""
    provenance, name = run.provenance, run.path.name.partition(".")[0]
    key = "trunk_id" if provenance.get("trunk_id") == name else "run_id"
    if key in provenance:
        require_same(
            str(run.path / "provenance.json"),
            {"run": provenance[key]},
            {"run": name},
            of=f"the folder {run.path}",
            remedy="restore that folder from a backup, or move it away and train the run again",
        )


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, RuntimeError | OSError):
        return f"damaged: {error}"
    return (
        f"damaged: config.yaml, provenance.json, summary.json or rows in {path} lack what the "
        f"table needs ({type(error).__name__}: {error}); restore them from a backup, or move the "
        "folder away and rerun the sweep to train the run again"
    )

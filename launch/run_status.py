"""The status of a run, read from its folder; its config is hashed again under today's schema."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from sweeps.grammar import Experiment
from trainer.config import RunConfig
from trainer.identity import require_same
from trainer.ids import evaluation_id, run_id
from trainer.record import ROW_FILES, StoredRun, read_json
from trainer.record_checks import read_whole_run
from trainer.schema import ConfigError, load
from untrusted.paths import inside


class RunStatus(Enum):
    """How far a run is."""

    MISSING = "waiting"
    PARTIAL = "partial"
    UNEVALUATED = "unevaluated"
    DIVERGED = "diverged"
    DONE = "done"
    DAMAGED = "damaged"

    @property
    def ended(self) -> bool:
        """Whether nothing is left to train or evaluate; a diverged run is a result."""
        return self in (RunStatus.DONE, RunStatus.DIVERGED)

    @property
    def open(self) -> bool:
        """Whether a worker can complete it; a damaged one waits for a person."""
        return not self.ended and self is not RunStatus.DAMAGED


def survey(
    experiments: Sequence[Experiment], sweep: Path
) -> tuple[dict[str, RunStatus], dict[str, str]]:
    """The status of every run of a sweep by its folder, and of damaged ones the reason."""
    statuses, damage = {}, {}
    for experiment in experiments:
        name = experiment.folder_name
        try:
            statuses[name] = status_of(experiment, inside(sweep, name))
        except (ConfigError, RuntimeError) as error:
            statuses[name], damage[name] = RunStatus.DAMAGED, str(error)
    return statuses, damage


def status_of(experiment: Experiment, folder: Path) -> RunStatus:
    """The status of the run in a folder.

    Raises:
        ConfigError: today's schema rejects its config.
        RuntimeError: the folder holds another run, or files of a finished run are damaged.
    """
    summary = read_json(folder / "summary.json")
    if not summary:
        begun = (folder / "config.yaml").exists()
        return RunStatus.PARTIAL if begun else RunStatus.MISSING
    stored = require_same_run(experiment, folder)
    if summary.get("state") == "diverged":
        return RunStatus.DIVERGED
    wanted = evaluation_id(experiment.evaluation)
    measured = [
        row
        for row in stored.evaluations
        if row.get("evaluation_id") == wanted
        and row["step"] == summary.get("step")
        and not row.get("error")
    ]
    return RunStatus.DONE if measured else RunStatus.UNEVALUATED


def require_same_data(folder: Path, root_hash: str) -> None:
    """Check that a finished run was trained on the dataset that exists now.

    Raises:
        ConfigError: it was trained on another one.
    """
    made = read_json(folder / "provenance.json").get("dataset_root_hash")
    if made is not None and made != root_hash:
        raise ConfigError(
            f"{folder} was trained on the dataset with hash {made[:12]}, which is now "
            f"{root_hash[:12]}; move the run folder away, or restore the old dataset"
        )


def require_same_run(
    experiment: Experiment, folder: Path, row_files: Sequence[str] = ROW_FILES
) -> StoredRun:
    """Read a record and check that it is of one run, which is this one, and whole.

    Args:
        experiment: the run that it should be.
        folder: of the record.
        row_files: those that must be there.

    Raises:
        ConfigError: it is of another run, or today's schema rejects its config.
        IdentityError: its files are not of one run.
    """
    stored = read_whole_run(folder, row_files)
    try:
        found = run_id(load(RunConfig, stored.config))
    except ConfigError as error:
        raise ConfigError(f"{folder}/config.yaml: {error}") from error
    require_same(
        str(folder / "config.yaml"),
        {"run": found},
        {"run": experiment.run_id},
        of="the run that was asked for",
        remedy=f"restore that file, or move {folder} away",
    )
    return stored

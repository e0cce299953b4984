"""A sweep folder read into the run table: one row per evaluated point, and what was excluded."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.tables.document_losses import DocumentLosses, read_document_losses
from analysis.tables.machine_use import machine_use
from analysis.tables.probes import probe_frame, read_factors
from analysis.tables.quarantine import DAMAGED, open_runs
from analysis.tables.run_table import (
    BASELINE_COLUMNS,
    COLUMNS,
    LADDER_COLUMNS,
    RUN_COLUMNS,
    Exclusion,
    Table,
)
from analysis.tables.training_curves import training_curves
from trainer.record import Row, StoredRun, read_json
from untrusted.paths import inside
from untrusted.yaml_text import parse_yaml

_FLOAT_COLUMNS = [
    name for name, meaning in COLUMNS.items() if "[" in meaning and "true/false" not in meaning
] + [
    "learning_rate", "vocab_size", "tokens_per_second", "flops_per_device_second",
    "training_seconds",
]  # fmt: skip


def load(root: Path) -> Table:
    """Read every run of a sweep folder.

    Raises:
        ValueError: the folder is not a sweep.
    """
    sweep = _read_sweep(root)
    stored, damage = open_runs([inside(root, str(name)) for name in sweep["runs"]], _probe)
    trunks, lost = open_runs([inside(root, str(name)) for name in sweep.get("trunks", [])], _probe)
    factors = read_factors(sweep.get("probes"), str(root / "sweep.yaml"))
    probes, bad = open_runs([inside(root, name) for name in factors], _probe)
    damage |= lost | bad
    statuses = {run.path.name: _status(run) for run in stored + probes}
    statuses |= {run.path.name: "trunk" for run in trunks}
    statuses |= dict.fromkeys(damage, DAMAGED)
    exclusions = _other_data(stored + trunks + probes, statuses)
    exclusions += [Exclusion(name, reason, DAMAGED) for name, reason in damage.items()]
    exclusions += [_unused(run, statuses[run.path.name]) for run in stored + probes]
    exclusions += _not_in_sweep(root, set(statuses))
    wanted, other_evaluations = _one_evaluation(stored, probes)
    failures: list[Exclusion] = []
    points, probed = [], []
    for run in stored + trunks:
        points += _points(run, statuses[run.path.name], wanted, failures)
    for run in probes:
        probed += _points(run, statuses[run.path.name], wanted, failures)
    documents = {run.path.name: _documents(run, failures) for run in stored + probes if run.summary}
    neutral_set = str(sweep.get("neutral_set", "prose"))
    states = {run.path.name: _summary_row(run, statuses[run.path.name]) for run in stored + probes}
    return Table(
        name=str(sweep.get("name", root.name)),
        neutral_set=neutral_set,
        rows=_frame(points, list(COLUMNS)),
        runs=_frame([states[run.path.name] for run in stored], RUN_COLUMNS),
        probes=probe_frame(
            probes,
            factors,
            _frame(points + probed, list(COLUMNS)),
            _frame(list(states.values()), RUN_COLUMNS),
            neutral_set,
        ),
        use=machine_use(stored + trunks + probes),
        exclusions=tuple(
            [each for each in exclusions if each is not None] + other_evaluations + failures
        ),
        context=dict(sweep.get("context") or {}),
        tuning=dict(sweep.get("tuning") or {}),
        recipes={str(arm): str(own) for arm, own in dict(sweep.get("recipes") or {}).items()},
        rate_factors=_rate_factors(sweep.get("config") or {}),
        baselines=pd.DataFrame(
            read_json(root / "baselines.json").get("rows", []), columns=pd.Index(BASELINE_COLUMNS)
        ),
        ladder=_ladder(root / "ladder.parquet"),
        training=training_curves(stored, trunks),
        documents=documents,
        folder=_as_typed(root),
    )


def _probe(run: StoredRun) -> None:
    """Compute everything that the table takes from a run."""
    _frame([_summary_row(run, "")], RUN_COLUMNS)
    _frame(_points(run, "", None, []), list(COLUMNS))
    _unused(run, "running")
    training_curves([run], [])
    _dataset(run)


def _as_typed(root: Path) -> str:
    """The folder as a reader in the same place would type it: relative where it lies below."""
    here, there = Path.cwd(), root.resolve()
    return str(there.relative_to(here) if there.is_relative_to(here) else there)


def _read_sweep(root: Path) -> dict:
    file = root / "sweep.yaml"
    if not file.exists():
        raise ValueError(f"{root} holds no sweep.yaml; name a folder runs/<sweep>")
    try:
        sweep = parse_yaml(file.read_text())
    except ValueError:
        sweep = None
    if not isinstance(sweep, dict) or not isinstance(sweep.get("runs"), list):
        raise ValueError(f"{file} lists no runs; expand the sweep again to rewrite it")
    return sweep


def _rate_factors(config: dict) -> tuple[float, ...]:
    ladder = config.get("ladders", {}).get(config.get("ladder"), {})
    return tuple(sorted(float(each) for each in ladder.get("learning_rate_factors", [])))


def _ladder(file: Path) -> pd.DataFrame:
    if not file.exists():
        return pd.DataFrame(columns=pd.Index(LADDER_COLUMNS))
    try:
        return pd.read_parquet(file, columns=LADDER_COLUMNS)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read: {error}; delete it, and launch/sweep.py writes it anew"
        ) from error


def _status(run: StoredRun) -> str:
    if run.summary:
        return str(run.summary.get("state", "done"))
    if not run.config:
        return "not started"
    return str(run.status.get("state", "running"))


def _unused(run: StoredRun, status: str) -> Exclusion | None:
    """Why a run of the sweep adds no decayed point, or None if it does."""
    step = max((int(row["step"] or 0) for row in run.metrics), default=0)
    reasons = {
        "not started": "no configuration stored yet",
        "diverged": f"diverged at step {run.summary.get('step', step)}",
        "failed": f"failed at step {step}: {run.status.get('error', 'no error stored')}",
    }
    if status == "done" and not run.evaluations:
        reason = f"{run.path / 'evaluations.jsonl'} has no rows; rerun the sweep to evaluate it"
        return Exclusion(run.path.name, reason, "evaluation")
    if status in ("done", "other-data", DAMAGED):
        return None
    kind = status if status in reasons else "unfinished"
    return Exclusion(run.path.name, reasons.get(status, f"{status}, at step {step}"), kind)


def _not_in_sweep(root: Path, known: set[str]) -> list[Exclusion]:
    others = sorted(file.parent.name for file in root.glob("*/config.yaml"))
    reason = "not part of the sweep as last expanded"
    return [Exclusion(name, reason, "not in sweep") for name in others if name not in known]


def _other_data(runs: list[StoredRun], statuses: dict[str, str]) -> list[Exclusion | None]:
    """Mark runs whose data differ from what most runs of the same dataset were made from."""
    hashes: dict[str, Counter] = {}
    for run in runs:
        if run.provenance.get("dataset_root_hash"):
            seen = hashes.setdefault(_dataset(run), Counter())
            seen[run.provenance["dataset_root_hash"]] += 1
    found: list[Exclusion | None] = []
    for run in runs:
        own = run.provenance.get("dataset_root_hash")
        usual = hashes[_dataset(run)].most_common(1)[0][0] if own else own
        if own != usual:
            statuses[run.path.name] = "other-data"
            reason = f"made from data {own}, the other runs of this dataset from {usual}"
            found.append(Exclusion(run.path.name, reason, "other-data"))
    return found


def _dataset(run: StoredRun) -> str:
    return str(run.config.get("corpus", {}).get("dataset"))


def _one_evaluation(
    runs: list[StoredRun], probes: list[StoredRun]
) -> tuple[object, list[Exclusion]]:
    """The evaluation most runs carry; points measured otherwise do not mix with it."""
    count = Counter(
        evaluation
        for run in runs
        for evaluation in {row["evaluation_id"] for row in run.evaluations}
    )
    if not count:
        return None, []
    wanted = max(count, key=lambda evaluation: (count[evaluation], str(evaluation)))
    others = [
        Exclusion(
            run.path.name,
            f"also evaluated as {row['evaluation_id']}; the report is about {wanted}",
            "evaluation",
        )
        for run in runs + probes
        for row in {r["evaluation_id"]: r for r in run.evaluations}.values()
        if row["evaluation_id"] != wanted
    ]
    return wanted, others


def _points(
    run: StoredRun, status: str, wanted: object, failures: list[Exclusion]
) -> list[dict[str, object]]:
    points = []
    for row in run.evaluations:
        if wanted is not None and row["evaluation_id"] != wanted:
            continue
        if row.get("error") or not row.get("total_nats") or not row.get("targets"):
            place = f"{row['evaluation_set']} at step {row['step']}"
            reason = f"evaluation of {place} failed: {row.get('error') or 'no finite loss'}"
            failures.append(Exclusion(run.path.name, reason, "evaluation"))
            continue
        points.append(_point(run, status, row))
    return points


def _documents(run: StoredRun, failures: list[Exclusion]) -> dict[str, DocumentLosses]:
    try:
        return read_document_losses(run.path, run.evaluations)
    except ValueError as error:
        failures.append(Exclusion(run.path.name, str(error), "evaluation"))
        return {}


def _point(run: StoredRun, status: str, row: Row) -> dict[str, object]:
    accounting = run.provenance["accounting"]
    # Counts pass 2**63 in honest studies: float64 before any product.
    tokens, nats = float(row["tokens"] or 0), float(row["total_nats"] or 0)

    def flops(name: str) -> float:
        return float(accounting[name]) * tokens

    return {
        **_identity(run, status),
        "nominal_parameters": run.config["nominal_parameters"],
        "non_embedding_parameters": accounting["non_embedding_parameters"],
        "flops": flops("training_flops_per_token"),
        "flops_full_attention": flops("training_flops_per_token_full_attention"),
        "flops_six_n": flops("training_flops_per_token_six_n"),
        "scan_flops": flops("scan_flops_per_token"),
        "state_bytes": accounting["state_bytes"],
        "loss_nats": nats / float(row["targets"] or np.nan),
        "batch_tokens": run.config["optimizer"]["batch_tokens"],
        "learning_rate": _peak_rate(run),
        "tokenizer": _tokenizer(run.config.get("corpus", {})),
        "vocab_size": run.config.get("model", {}).get("vocab_size"),
        "unique_tokens": _unique_tokens(run.config.get("corpus", {}), row),
        "domain_repeats": _domain_repeats(run.summary),
        "dataset_root_hash": run.provenance.get("dataset_root_hash"),
        "commit": run.provenance.get("commit"),
        **{name: row.get(name) for name in _STORED},
    }


def _tokenizer(corpus: dict) -> str | None:
    """A name that two runs share if, and only if, they cut text alike."""
    stored = corpus.get("tokenizer")
    if not stored:
        return None
    trained_on = corpus.get("dataset") if stored["kind"] == "bpe" else None
    parts = (stored["kind"], stored.get("vocab_size"), stored.get("path"), trained_on)
    return " ".join(str(part) for part in parts if part is not None)


def _unique_tokens(corpus: dict, row: Row) -> float | None:
    size, text = corpus.get("unique_bytes"), float(row.get("utf8_bytes") or 0)
    return float(size) * float(row["targets"] or 0) / text if size and text else None


def _domain_repeats(summary: dict) -> float | None:
    """Of a run that has ended; its summary counts the blocks that were read of each domain."""
    read = summary.get("read_blocks")
    if not isinstance(read, dict):
        return None
    return max(
        (each["blocks"] / each["unique_blocks"] for each in read.values() if each["unique_blocks"]),
        default=None,
    )


_STORED = [
    "step", "tokens", "evaluation_set", "subset", "blocks", "documents", "evaluation_id", "decayed",
    "certificate", "total_nats", "targets", "utf8_bytes", "bits_per_byte",
]  # fmt: skip


def _identity(run: StoredRun, status: str) -> dict[str, object]:
    config = run.config
    return {
        "run_id": run.path.name,
        "trunk_id": str(run.provenance.get("trunk_id") or run.path.name),
        "status": status,
        "architecture": config.get("architecture"),
        "corpus": config.get("corpus", {}).get("name"),
        "rung": config.get("rung"),
        "seed": config.get("seed"),
        "order_seed": config.get("corpus", {}).get("shuffle_seed", config.get("seed")),
        "parameters": run.provenance.get("accounting", {}).get("total_parameters"),
        "horizon_tokens": config.get("budget", {}).get("tokens"),
    }


def _peak_rate(run: StoredRun) -> float | None:
    optimizer = run.config.get("optimizer")
    if optimizer is None:
        return None
    return optimizer["learning_rate"] * optimizer.get("learning_rate_scale", 1.0)


def _summary_row(run: StoredRun, status: str) -> dict[str, object]:
    last = run.metrics[-1]["tokens"] if run.metrics else None
    speeds = [row.get("tokens_per_second") for row in run.metrics]
    known = [float(speed) for speed in speeds if speed is not None]
    speed = float(np.median(known)) if known else None
    seconds = [float(row.get("step_seconds") or 0) for row in run.metrics]
    cost = run.provenance.get("accounting", {}).get("training_flops_per_token")
    ranks = run.provenance.get("execution", {}).get("ranks", 1)
    return {
        **_identity(run, status),
        "device": run.provenance.get("gpu") or run.provenance.get("processor"),
        "flops_per_device_second": speed * cost / ranks if speed and cost else None,
        "tokens": run.summary.get("tokens", last),
        "nominal_parameters": run.config.get("nominal_parameters"),
        "batch_tokens": run.config.get("optimizer", {}).get("batch_tokens"),
        "learning_rate": _peak_rate(run),
        "vocab_size": run.config.get("model", {}).get("vocab_size"),
        "tokens_per_second": speed,
        "training_seconds": sum(seconds) or None,
    }


def _frame(records: list[dict[str, object]], columns: list[str]) -> pd.DataFrame:
    frame = pd.DataFrame(records, columns=pd.Index(columns))
    numbers = [name for name in columns if name in _FLOAT_COLUMNS]
    return frame.astype(dict.fromkeys(numbers, "float64"))

"""The command that evaluates a trained run with HiP attention in place of its own, untrained.

python launch/swap.py runs/hip --swap attention=hip [--k 8 64] [--selection row block recent]
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis.benchmarks.hip import draw, table_rows
from data_pipelines.batch import IGNORED, Batch, join_batches
from data_pipelines.evaluation_sets import evaluation_batches, evaluation_sets
from launch.trained_run import TrainedRun, load_run
from models.backbone import Backbone
from models.mixers.softmax.hip import HipConfig
from trainer.exit_codes import ExitCode
from trainer.record import write_json
from trainer.schema import ConfigError, read_yaml
from trainer.swap import Measured, measure, swapped
from untrusted.paths import inside

AT_ONCE = 4
SEARCHED_BLOCKS = 4096
SAME = 1e-5
"""Nats per token of a sequence; single tokens differ by float32's rounding."""
EXAMPLES = """
examples:
  python launch/swap.py runs/hip --swap attention=hip        the run that `make hip` trains
  python launch/swap.py runs/scaling/<id> --swap attention=hip --k 8 32 256 --selection row

selections: with row, each query chooses its keys. With block, 32 queries choose together, as
published for HiP; a token's loss then depends a little on later tokens. recent is the control: as
many keys, but the most recent ones and 2 that it searches for."""


def main(words: list[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = _parse(words)
    console = Console(width=max(Console().width, 118))
    torch.set_num_threads(arguments.threads)
    try:
        folder = only_run(arguments.run)
        report = evaluate(folder, arguments)
    except (ValueError, RuntimeError, OSError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return int(ExitCode.BAD_CONFIG)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    out = arguments.out or folder / "swaps"
    plate = draw(report)
    plate.save(out)
    write_json(out / f"{plate.name}.json", report)
    console.print(_table(report), highlight=False)
    console.print(f"{plate.title}\n{plate.caption}", highlight=False)
    console.print(f"Figure: {out / plate.name}.png, data beside it", highlight=False)
    return int(ExitCode.DONE)


def only_run(folder: Path) -> Path:
    """The folder of a run; of a sweep's folder, its one run.

    Raises:
        ConfigError: it is a sweep of several runs.
    """
    if (folder / "config.yaml").exists() or not (folder / "sweep.yaml").exists():
        return folder
    runs = read_yaml(folder / "sweep.yaml")["runs"]
    if len(runs) != 1:
        one = inside(folder, runs[0])
        raise ConfigError(
            f"{folder} is a sweep of {len(runs)} runs; give one of them, such as {one}"
        )
    return inside(folder, runs[0])


def evaluate(folder: Path, arguments: argparse.Namespace) -> dict:
    """Evaluate the run as it was trained and under every swap, on the same sequences.

    Raises:
        ConfigError: the swap does not fit the run, or no document is long enough.
        RuntimeError: a swap that keeps every key does not equal the run as it was trained.
    """
    run = load_run(folder)
    if run.config.objective != "causal_lm":
        raise ConfigError(
            f"{folder} was trained for {run.config.objective}, but swaps need causal_lm; "
            "choose another run"
        )
    settings = [
        (selection, k, swapped(run.config.model, _swap(arguments, selection, k)))
        for selection, k in itertools.product(arguments.selection, arguments.k)
    ]
    backbones = [(selection, k, run.backbone(model)) for selection, k, model in settings]
    name, batch = long_documents(run, arguments.data, arguments.set, arguments.sequences)
    dense = _measure(run.backbone(), batch)
    rows = [
        {"selection": selection, "k": k} | _row(backbone, batch, dense.nats, arguments)
        for selection, k, backbone in backbones
    ]
    _require_same(rows, run.config.corpus.seq_len)
    return {
        "run": folder.name,
        "step": run.step,
        "architecture": run.config.architecture,
        "rung": run.config.rung,
        "trained_tokens": run.step * run.config.optimizer.batch_tokens,
        "swap": arguments.swap,
        "n_sink": arguments.n_sink,
        "window": arguments.window,
        "evaluation_set": name,
        "sequences": len(batch),
        "seq_len": batch.tokens.shape[1],
        "dense_loss_nats": float(_means(dense.nats, batch).mean()),
        "dense_keys_scored": (batch.tokens.shape[1] + 1) / 2,
        "rows": rows,
    }


def long_documents(run: TrainedRun, data: Path, wanted: str, sequences: int) -> tuple[str, Batch]:
    """Held-out sequences that lie in a single document, and the set that they are from.

    They are spread evenly over the wanted set, or over all sets together where it has too few:
    neighbours often share a document.

    Raises:
        ConfigError: the set is unknown, or there are too few everywhere.
    """
    known = evaluation_sets(data, run.config.corpus.dataset)
    if wanted not in known:
        raise ConfigError(f"unknown evaluation set {wanted!r}; known: {', '.join(known)}")
    found = list(_whole(run, data, wanted))
    if len(found) < sequences:
        wanted, others = "all sets", [name for name in known if name != wanted]
        found += [x for name in others for x in _whole(run, data, name)]
    if len(found) < sequences:
        raise ConfigError(
            f"{run.config.corpus.dataset} has {len(found)} held-out sequences of "
            f"{run.config.corpus.seq_len} tokens within one document; ask for at most that many"
        )
    spread = [found[i * len(found) // sequences] for i in range(sequences)]
    return wanted, join_batches(spread)


def _whole(run: TrainedRun, data: Path, name: str) -> Iterator[Batch]:
    batches = evaluation_batches(
        run.config.corpus, data, name, batch_sequences=1, max_blocks=SEARCHED_BLOCKS
    )
    return (batch for batch in batches if not bool(batch.documents.any()))


def _swap(arguments: argparse.Namespace, selection: str, k: int) -> dict[str, dict]:
    """What `--swap` asks for, with the fields of one point; recent keeps the last keys instead."""
    old, _, new = arguments.swap.partition("=")
    if not old or not new:
        raise ConfigError(
            f"--swap {arguments.swap} is not a swap; write old=new, such as attention=hip"
        )
    fields = {"k": k, "n_sink": arguments.n_sink, "window": arguments.window}
    if selection == "recent":
        fewest = min(k, HipConfig.key_block)
        fields |= {"k": fewest, "window": arguments.window + k - fewest}
        selection = "row"
    return {old: {"kind": new, "selection": selection, **fields}}


def _measure(backbone: Backbone, batch: Batch) -> Measured:
    parts = [measure(backbone, part) for part in batch.split(AT_ONCE)]
    recall = [part.recall for part in parts if part.recall is not None]
    return Measured(torch.cat([p.nats for p in parts]), torch.cat(recall) if recall else None)


def _row(
    backbone: Backbone, batch: Batch, dense: torch.Tensor, arguments: argparse.Namespace
) -> dict:
    """One point: losses against dense, what searches found, and how many keys they scored."""
    measured = _measure(backbone, batch)
    T = batch.tokens.shape[1]
    config = next(b.mixer for b in backbone.config.layers() if isinstance(b.mixer, HipConfig))
    places = torch.arange(T)
    ends = places
    if config.selection == "block":
        ends = ((places // config.query_block + 1) * config.query_block).clamp(max=T) - 1
    read = (places + 1).clamp(max=config.k + config.n_sink + config.window)
    # Where a list holds all keys there are, nothing is searched.
    chooses = places + 1 > config.k
    recall = measured.recall if bool(chooses.any()) else None
    if config.window != arguments.window:
        recall = None
    difference = _means(measured.nats, batch) - _means(dense, batch)
    return {
        "loss_nats": float(_means(measured.nats, batch).mean()),
        "differences_nats": difference.tolist(),
        "largest_token_difference_nats": float((measured.nats - dense).abs().max()),
        "recall": None if recall is None else float(recall[:, chooses].mean()),
        "chance_recall": None
        if recall is None
        else float((config.k / (places[chooses] + 1).double()).mean()),
        "keys_scored": float(config.keys_scored(ends).double().mean()),
        "most_keys_read": float(read.double().mean()),
    }


def _means(nats: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Nats per token of each sequence."""
    return nats.double().sum(dim=1) / (batch.targets != IGNORED).sum(dim=1)


def _require_same(rows: Sequence[dict], seq_len: int) -> None:
    for row in rows:
        worst = max(map(abs, row["differences_nats"]))
        if row["k"] >= seq_len and worst > SAME:
            raise RuntimeError(
                f"selection {row['selection']} with k {row['k']} keeps all of {seq_len} keys, but "
                f"a sequence's loss differs from dense by {worst:.3g} nats, more than {SAME}; "
                "one of the two implementations is wrong: run the tests"
            )


def _table(report: dict) -> Table:
    table = Table(title=f"{report['run']}: {report['swap']}, dense {report['dense_loss_nats']:.4f}")
    columns, rows = table_rows(report)
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _positive(word: str) -> int:
    if int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not above 0; take 1 or more")
    return int(word)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/swap.py",
        description="Evaluate a trained run with HiP attention in place of its own, untrained.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, help="run folder, or that of a sweep of one run")
    add("--swap", default="attention=hip", help="old kind=new kind (default: attention=hip)")
    add("--k", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 1024], help="keys per query")
    add("--selection", nargs="+", default=["row", "block", "recent"], help="see below",
        choices=["row", "block", "recent"])  # fmt: skip
    add("--n-sink", type=int, default=4, help="first keys, always read (default: 4)")
    add("--window", type=int, default=32, help="last keys, always read (default: 32)")
    add("--set", default="prose", help="evaluation set (default: prose)")
    add("--sequences", type=_positive, default=16, help="held-out sequences (default: 16)")
    add("--data", type=Path, default=Path("data"), help="folder of the datasets (default: data)")
    add("--out", type=Path, help="folder of the results (default: swaps in the run's folder)")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

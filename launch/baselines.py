"""Baselines: n-gram models of the same tokens that the runs train on.

They are fitted in a separate process, because reading blocks loads slow libraries, and stored in
the sweep's `baselines.json`; they are fitted again only if data, budgets or orders have changed.
"""

import multiprocessing
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from trainer.config import EvaluationConfig, RunConfig
from trainer.record import read_json, write_json
from trainer.schema import dump, load

FILE = "baselines.json"


def write_baselines(
    runs: Sequence[RunConfig],
    evaluation: EvaluationConfig,
    orders: Sequence[int],
    places: tuple[Path, Path, str],
    console: Console,
) -> None:
    """Write the losses of n-grams of these orders, fitted to what each corpus's longest run reads.

    Args:
        runs: all runs of the sweep.
        evaluation: how much of each held-out set is read.
        orders: 2 for a bigram.
        places: the sweep's folder, the datasets' root, and the dataset's root hash.
        console: for a line of progress.
    """
    folder, root, root_hash = places
    longest: dict[str, RunConfig] = {}
    for run in sorted(runs, key=lambda run: run.budget.tokens):
        longest[run.corpus.name] = run
    asked = [
        {
            "corpus": dump(run.corpus),
            "tokens": run.budget.tokens,
            "batch_sequences": run.batch_sequences,
            "blocks_per_set": evaluation.final_blocks_per_set,
            **({"final_sets": list(evaluation.final_sets)} if evaluation.final_sets else {}),
            "orders": list(orders),
            "dataset_root_hash": root_hash,
        }
        for run in longest.values()
    ]
    if not orders or _written(folder / FILE).get("asked") == asked:
        return
    console.print(
        f"fitting n-gram baselines of orders {', '.join(map(str, orders))}", highlight=False
    )
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        plain = [(dump(run), dump(evaluation), list(orders), str(root)) for run in longest.values()]
        rows = [row for part in pool.starmap(_count, plain) for row in part]
    write_json(folder / FILE, {"asked": asked, "rows": rows})


def _written(file: Path) -> dict:
    """What was fitted before; a damaged file is fitted anew."""
    try:
        return read_json(file)
    except RuntimeError:
        return {}


def _count(run_plain: dict, evaluation_plain: dict, orders: list[int], root: str) -> list[dict]:
    from data_pipelines.evaluation_sets import evaluation_batches, evaluation_sets
    from data_pipelines.ngram import NGram
    from data_pipelines.stream import TokenStream
    from data_pipelines.tokenizers import vocabulary_size

    run, evaluation = load(RunConfig, run_plain), load(EvaluationConfig, evaluation_plain)
    corpus, place = run.corpus, Path(root)
    stream = TokenStream(
        corpus, place, rank=0, ranks=1, batch_sequences=run.batch_sequences, first_step=0
    )
    read = [batch for batch, _ in zip(stream, range(run.steps), strict=False)]
    stream.close()
    models = [NGram(order, vocabulary_size(corpus.tokenizer)).fit(read) for order in orders]
    rows = []
    for name in evaluation_sets(place, corpus.dataset):
        held_out = list(
            evaluation_batches(
                corpus,
                place,
                name,
                batch_sequences=evaluation.batch_sequences,
                max_blocks=evaluation.final_blocks(name),
            )
        )
        targets = sum(int((batch.targets >= 0).sum()) for batch in held_out)
        for model in models:
            rows.append(
                {
                    "corpus": corpus.name,
                    "evaluation_set": name,
                    "order": model.order,
                    "tokens": run.budget.tokens,
                    "total_nats": sum(model.total_nats(batch) for batch in held_out),
                    "targets": targets,
                }
            )
    return rows

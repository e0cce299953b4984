"""Loss against peak learning rate at several widths, under muP and the standard parametrisation.

python -m tests.benchmarks.training.rate_transfer
    trains what the table lacks, about five minutes of one core, and draws the figure
python -m tests.benchmarks.training.rate_transfer --architectures mamba --table mamba.csv
    one architecture, into another table

Model, optimizer, schedule and corpus are those of a sweep; every run of a seed reads the same
batches. At the smallest width both parametrisations are the same model, and one run stands for
both. The loss is that of the batches after the last one, which no run has read.
"""

import argparse
import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

from analysis.benchmarks.mup import draw_transfer
from data_pipelines.batch import IGNORED, Batch
from data_pipelines.stream import TokenStream
from models.backbone import Backbone, build_backbone
from models.mup import MupConfig
from models.sequences.whole import WholeSequence
from sweeps.grammar import read_sweep_file
from tests.models.coordinates import HEADS, model_at
from trainer.config import RunConfig
from trainer.objective import total_nats
from trainer.optimizer import build_optimizer
from trainer.schedule import learning_rate

ROOT = Path(__file__).parents[3]
TABLE = ROOT / "analysis" / "mup_transfer.csv"
WIDTHS = (32, 64, 128)
DEPTHS = {"transformer": 3, "mamba": 6}
"""As many Mamba blocks as a Transformer has mixers."""
RATES = (2.0**-7, 2.0**-6, 2.0**-8, 2.0**-5, 2.0**-9, 2.0**-4)
"""From the middle outwards, so that an unfinished table has an optimum at all widths."""
STEPS, WARMUP, HELD_OUT = 120, 12, 24
SEQ_LEN, BATCH = 128, 512
MUP = MupConfig(base_width=WIDTHS[0], base_head_dim=WIDTHS[0] // HEADS)
KEY = ["architecture", "parametrisation", "d_model", "learning_rate", "seed"]


@dataclass(frozen=True)
class Trial:
    """One run: a row of the table without its loss."""

    architecture: str
    parametrisation: str
    d_model: int
    learning_rate: float
    seed: int


def trials(architectures: Sequence[str], seeds: Sequence[int]) -> Iterator[Trial]:
    """Every run; `both` is one of the width at which the parametrisations are equal."""
    for seed in seeds:
        for rate in RATES:
            for name in architectures:
                for width in WIDTHS:
                    for kind in ("both",) if width == MUP.base_width else ("standard", "muP"):
                        yield Trial(name, kind, width, rate, seed)


@functools.cache
def template(seed: int) -> RunConfig:
    """A run of the default study, shortened."""
    words = [
        "ladder=nano",
        f"ladders.nano.seq_len={SEQ_LEN}",
        f"ladders.nano.batch_tokens={BATCH}",
        f"ladders.nano.warmup_tokens={WARMUP * BATCH}",
        f"ladders.nano.horizons=[{STEPS * BATCH}]",
        f"ladders.nano.seeds=[{seed}]",
        "ladders.nano.precision=fp32",
    ]
    return read_sweep_file(ROOT / "sweeps" / "scaling.yaml", words).experiments[0].run


def config_of(trial: Trial) -> RunConfig:
    """The run of a trial."""
    run = template(trial.seed)
    mup, depth = MUP if trial.parametrisation == "muP" else None, DEPTHS[trial.architecture]
    model = model_at(trial.architecture, trial.d_model, mup, depth=depth, length=SEQ_LEN)
    peak = {"learning_rate": trial.learning_rate, "learning_rate_scale": 1.0}
    optimizer = replace(run.optimizer, **peak)
    return replace(run, architecture=trial.architecture, model=model, optimizer=optimizer)


def final_loss(config: RunConfig, batches: Sequence[Batch]) -> float:
    """Train on the first batches; the loss per target of the rest, NaN if it diverged."""
    backbone = build_backbone(config.model, config.seed)
    optimizer = build_optimizer(backbone, config)
    for step, batch in enumerate(batches[: config.steps]):
        optimizer.zero_grad()
        loss = _nats(backbone, batch) / _targets(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), config.optimizer.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step) * group["rate_multiplier"]
        optimizer.step()
    rest = batches[config.steps :]
    with torch.no_grad():
        nats = sum(float(_nats(backbone, batch)) for batch in rest)
    return nats / sum(_targets(batch) for batch in rest)


def read_batches(config: RunConfig, data_root: Path) -> list[Batch]:
    """The batches of a run, and those after it that its loss is measured on."""
    stream = iter(
        TokenStream(
            config.corpus,
            data_root,
            rank=0,
            ranks=1,
            batch_sequences=config.batch_sequences,
            first_step=0,
        )
    )
    return [next(stream) for _ in range(STEPS + HELD_OUT)]


def main() -> None:
    """Train what is missing, and draw."""
    parser = argparse.ArgumentParser(description="Loss against learning rate at several widths.")
    parser.add_argument("--architectures", default=",".join(DEPTHS))
    parser.add_argument("--seeds", default="17")
    parser.add_argument("--data-root", type=Path, default=ROOT / "data")
    parser.add_argument("--table", type=Path, default=TABLE)
    choices = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    table = pd.read_csv(choices.table) if choices.table.exists() else pd.DataFrame(columns=KEY)
    done = {tuple(row[key] for key in KEY) for row in table.to_dict("records")}
    batches: list[Batch] = []
    seeds = [int(word) for word in choices.seeds.split(",")]
    for trial in trials(choices.architectures.split(","), seeds):
        if tuple(asdict(trial).values()) in done:
            continue
        config = config_of(trial)
        batches = batches or read_batches(config, choices.data_root)
        loss = final_loss(config, batches)
        Console().print(f"{trial}: {loss:.4f} nats")
        row = pd.DataFrame([{**asdict(trial), "loss_nats": round(loss, 5)}])
        table = row if table.empty else pd.concat([table, row], ignore_index=True)
        table.to_csv(choices.table, index=False)
    draw_transfer(table, "mup_transfer").figure.savefig(choices.table.with_suffix(".png"), dpi=110)


def _nats(backbone: Backbone, batch: Batch) -> torch.Tensor:
    return total_nats(
        backbone, backbone(batch.tokens, WholeSequence(batch.documents)), batch.targets
    )


def _targets(batch: Batch) -> int:
    return int((batch.targets != IGNORED).sum())


if __name__ == "__main__":
    main()

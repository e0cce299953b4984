"""What the benchmark trains: sizes, inputs, and ours as a bare module and behind the engine.

The bare module is what the peers are comparable with; `trainer.engine.Engine` is what a run gets.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig, TokenizerConfig
from models.backbone import Backbone, BackboneConfig, build_backbone
from models.compiled import compile_blocks
from models.sequences.whole import WholeSequence
from sweeps.architecture import read_architectures
from sweeps.rungs import Rung
from sweeps.sizing import Shape, size_architecture
from trainer.config import BudgetConfig, ExecutionConfig, RunConfig
from trainer.engine import Engine
from trainer.objective import total_nats
from trainer.recipe import OptimizerConfig, ScheduleConfig

VOCAB = 257
RATE = 1e-3
SEED = 17
THREADS = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Size:
    """A width, and the tokens of a step.

    Attributes:
        rung: the Transformer's shape; its parameters are what both architectures are matched to.
    """

    rung: Rung
    seq_len: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.seq_len * self.batch

    def shape(self, architecture: str) -> BackboneConfig:
        """The architecture's shape, by the ladder's own search."""
        known = read_architectures()[architecture]
        return size_architecture(architecture, known, Shape(self.rung, VOCAB, self.seq_len)).model


@dataclass(frozen=True)
class Task:
    """What a contender is asked to build."""

    model: BackboneConfig
    size: Size


@dataclass(frozen=True)
class Built:
    """A contender ready to train.

    Attributes:
        step: one training step; returns its mean loss in nats.
        setting: how it runs, where there was a choice.
    """

    step: Callable[[], float]
    parameters: int
    close: Callable[[], None] = lambda: None
    setting: str = ""


def bare(task: Task) -> Built:
    """Our module under a plain loop."""
    return _plain_loop(build_backbone(task.model, SEED), task)


def compiled(task: Task) -> Built:
    """Our module with compiled blocks, as `execution.compile` has them, under a plain loop."""
    backbone = build_backbone(task.model, SEED)
    compile_blocks(backbone)
    return _plain_loop(backbone, task)


def _plain_loop(backbone: Backbone, task: Task) -> Built:
    batch = random_batch(task.size)

    def loss() -> Tensor:
        hidden = backbone(batch.tokens, WholeSequence(batch.documents))
        return total_nats(backbone, hidden, batch.targets) / batch.targets.numel()

    return Built(plain_step(backbone, loss), count_parameters(backbone))


def engine(task: Task) -> Built:
    """Our module as a run trains it."""
    built = build_engine(task)
    batch = random_batch(task.size)
    parameters = count_parameters(built.backbone)
    return Built(lambda: built.step(batch, RATE).loss_nats, parameters, built.close)


def build_engine(task: Task) -> Engine:
    """Our module as a run sets it up."""
    size = task.size
    corpus = DataConfig(
        name="random",
        dataset="random",
        tokenizer=TokenizerConfig(),
        domains={"random": 1.0},
        seq_len=size.seq_len,
        block_tokens=size.seq_len,
        epoch_blocks=size.batch,
    )
    config = RunConfig(
        architecture="bench",
        rung=size.rung.name,
        nominal_parameters=1,
        model=task.model,
        corpus=corpus,
        optimizer=OptimizerConfig(learning_rate=RATE, batch_tokens=size.tokens),
        schedule=ScheduleConfig(warmup_tokens=0),
        budget=BudgetConfig(tokens=size.tokens),
        precision="fp32",
        seed=SEED,
    )
    execution = ExecutionConfig(threads=THREADS, device="cpu")
    return Engine(build_backbone(task.model, SEED), config, execution)


def plain_step(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """Forward, loss, backward and AdamW, with nothing around them."""
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)

    def step() -> float:
        mean = loss()
        mean.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(mean.detach())

    return step


def random_batch(size: Size) -> Batch:
    """Uniform bytes, one document a sequence."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(VOCAB, (size.batch, size.seq_len + 1), generator=generator)
    return Batch(
        drawn[:, :-1].contiguous(),
        drawn[:, 1:].contiguous(),
        torch.zeros(size.batch, size.seq_len, dtype=torch.int32),
        np.arange(size.batch, dtype=np.uint64),
    )


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

"""Mixers and backbones on rows of documents, and what one process makes of them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.backbone import Backbone, BackboneConfig, build_backbone
from models.mixer import Mixer, MixerConfig, Pattern, Slot
from models.mixers.composed.hybrid import HybridConfig
from models.mixers.convolution.monarch import MonarchConfig
from models.mixers.recurrent.gated_recurrence import GatedRecurrenceConfig
from models.mixers.recurrent.mamba2 import Mamba2Config
from models.mixers.softmax.attention import AttentionConfig
from models.mixers.softmax.hip import HipConfig
from models.mixers.softmax.scout import ScoutConfig
from models.mixers.softmax.window import WindowConfig
from models.mixers.structured.semiseparable import SemiseparableConfig
from models.mixers.structured.toeplitz import ToeplitzConfig
from models.ranks.schemes import Scheme
from models.sequences.positions import PADDING
from models.sequences.recurrence import Recurrence
from models.sequences.whole import WholeSequence
from sweeps.architecture import read_architectures
from sweeps.rungs import RUNGS
from sweeps.sizing import Shape, size_architecture
from tests.conformance.case import CROSS, Rows, case_of, declared_cases, documents_of
from tests.models.conftest import D_MODEL, drawn

VOCABULARY = 19
CAUSAL = "transformer mamba mamba2 m2 scout_mamba scout_window hybrid samba"
"""Named causal architectures; `hydra` is the encoder that stands beside them."""
ARCHITECTURES = (*CAUSAL.split(), "hydra")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Layout:
    """Documents of each row, and how the length is cut: `cuts` by ranks, evenly where not given."""

    rows: Rows
    length: int
    cuts: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def documents(self) -> Tensor:
        """The ids of whole rows."""
        return documents_of(self.rows, self.length)

    def lengths(self, ranks: int) -> tuple[int, ...]:
        """Tokens of each rank."""
        T = self.length
        even = tuple(T * (r + 1) // ranks - T * r // ranks for r in range(ranks))
        return self.cuts.get(ranks, even)


LAYOUTS = {
    # No number of ranks divides it; states must come through from the first rank to the last.
    "one document": Layout(((61,), (61,)), 61),
    # Documents that cross boundaries, span several ranks, begin on a boundary and end on one (32
    # and 48 of 64); one that begins within a shard after another and goes on past its end; a row
    # that ends with padding, which fills the last of eight ranks.
    "packed": Layout(((5, 27, 16, 16), (20, 9, 35), (3, 50, 1)), 64),
    # Shards shorter than convolutions and windows.
    "short shards": Layout(
        ((2, 37, 9, 15), (63,)),
        63,
        {2: (61, 2), 4: (40, 1, 2, 20), 8: (1, 1, 2, 1, 30, 2, 1, 25)},
    ),
}


@dataclass(frozen=True)
class Problem:
    """A mixer in a pattern or a named architecture, on a layout, in a dtype.

    Attributes:
        config: the architecture's, fitted once: it takes longer than to solve the problem.
        scheme: how states go from rank to rank; None for what the cost model chooses.
    """

    name: str
    layout: str
    dtype: str
    config: BackboneConfig | None = field(default=None, compare=False, repr=False)
    recompute: bool = False
    scheme: Scheme | None = None

    @property
    def whole(self) -> "Problem":
        """The problem whose solution on one process is that of this one."""
        return dataclasses.replace(self, recompute=False, scheme=None)

    def build(self) -> Mixer | Backbone:
        """The module, the same at each call."""
        module = _mixer(self.name) if self.config is None else build_backbone(self.config, seed=3)
        slow_down(module)
        module = module.to(DTYPES[self.dtype])
        if isinstance(module, Backbone):
            module.recompute = self.recompute
        return module

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Features or tokens of whole rows, and the weight of each output in the loss."""
        documents = LAYOUTS[self.layout].documents()
        generator = torch.Generator().manual_seed(5)
        weights = torch.rand(documents.shape, generator=generator, dtype=torch.float64) + 0.5
        weights = weights.masked_fill(documents == PADDING, 0.0) / (documents != PADDING).sum()
        if self.config is not None:
            return torch.randint(VOCABULARY, documents.shape, generator=generator), weights
        return torch.randn(*documents.shape, D_MODEL, generator=generator), weights


VARIANTS: dict[str, MixerConfig] = {
    "attention, grouped keys": AttentionConfig(n_heads=4, n_kv_heads=2),
    "window, one key": WindowConfig(n_heads=2, window=1),
    "scout, means of segments": ScoutConfig(n_heads=2, every=4, pooling="mean"),
    "scout, learned weights": ScoutConfig(n_heads=2, every=4, pooling="learned"),
    "hip, staged": HipConfig(n_heads=2, k=8, window=5, method="staged"),
    "mamba2, two groups": Mamba2Config(d_state=5, head_dim=8, n_groups=2, d_conv=1),
    "gated recurrence, minGRU": GatedRecurrenceConfig(n_heads=2, mode="mingru"),
    "hybrid, recurrence alone": HybridConfig(n_heads=2, window=5, branches="recurrence"),
    "monarch, residual": MonarchConfig(max_len=64, filter_hidden=16, residual=True),
    "toeplitz, learned": ToeplitzConfig(n_heads=2, max_len=64, sequence_aligned=False),
    "semiseparable, learned": SemiseparableConfig(n_heads=2, max_len=64, sequence_aligned=False),
}
"""Settings that go other ways through a mixer, all of them causal."""


@dataclass
class Solution:
    """Outputs, the gradient of the inputs where they are features, and of every parameter."""

    outputs: Tensor
    d_inputs: Tensor | None
    d_parameters: dict[str, Tensor]


def solve(
    module: nn.Module, x: Tensor, weights: Tensor, sequence: WholeSequence, dtype: torch.dtype
) -> Solution:
    """Run forward and back on the tokens at hand: the loss is a weighted sum of distances.

    Squares alone would not do: behind a norm their sum hardly depends on anything.
    """
    module.zero_grad(set_to_none=True)
    features = x.to(dtype).requires_grad_() if x.is_floating_point() else x
    outputs = module(features, sequence)
    aims = torch.cos(torch.arange(outputs.shape[-1]) * (1 + weights * 1e3)[..., None])
    (weights[..., None] * (outputs - aims.to(dtype)).square()).sum().backward()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
    }
    d_inputs = features.grad if features.is_floating_point() else None
    return Solution(outputs.detach(), d_inputs, found)


def solve_whole(problem: Problem) -> Solution:
    """The problem on one process."""
    x, weights = problem.inputs()
    sequence = WholeSequence(LAYOUTS[problem.layout].documents())
    return solve(problem.whole.build(), x, weights, sequence, DTYPES[problem.dtype])


def sharded_mixers() -> list[str]:
    """Every registered mixer, in each pattern, that says that it has a sharded form."""
    return [name_of(kind, pattern) for kind, pattern in _cases() if not _reason(kind, pattern)]


def refusing_mixers() -> dict[str, str]:
    """Every other, with its reason."""
    reasons = {name_of(kind, pattern): _reason(kind, pattern) for kind, pattern in _cases()}
    return {name: reason for name, reason in reasons.items() if reason}


@functools.cache
def schemes_of(name: str) -> tuple[Scheme | None, ...]:
    """Every scheme for a mixer whose state is carried over ranks, or none to choose."""
    watched = _Watched(documents_of(((7,),), 7))
    _mixer(name)(torch.zeros(1, 7, D_MODEL), watched)
    return tuple(Scheme) if watched.carries else (None,)


class _Watched(WholeSequence):
    """Tokens that note whether an affine recurrence is run over them."""

    carries = False

    def recur(self, outputs: Callable[[Tensor | None], tuple[Tensor, Tensor]]) -> Tensor:
        self.carries |= isinstance(outputs, Recurrence)
        return super().recur(outputs)


def carried_problems() -> list[Problem]:
    """Every mixer whose state is carried over ranks, under each scheme, in float64."""
    mixers = [problem for problem in problems() if problem.scheme is not None]
    return [p for p in mixers if p.dtype == "float64" and p.layout == "packed"]


def name_of(kind: str, pattern: Pattern) -> str:
    """A name for a mixer in a pattern."""
    return kind if pattern is Pattern.CAUSAL_SELF else f"{kind} {pattern.value}"


def problems() -> list[Problem]:
    """Everything that is tried."""
    mixers = [
        Problem(name, layout, dtype, scheme=scheme)
        for name in (*sharded_mixers(), *VARIANTS)
        for layout in LAYOUTS
        for dtype in DTYPES
        for scheme in schemes_of(name)
    ]
    backbones = [
        model(name, layout, dtype, recompute=recompute)
        for name in ARCHITECTURES
        for layout in LAYOUTS
        for dtype in DTYPES
        for recompute in ((False, True) if layout == "packed" else (False,))
    ]
    return mixers + backbones


def fewer_problems(ranks: int) -> list[Problem]:
    """What is tried before each push: more in float64, and more on more ranks."""
    mixers = [problem for problem in problems() if problem.config is None]
    models = [problem for problem in problems() if problem.recompute]
    if ranks == 2:
        packed = [problem for problem in mixers if problem.layout == "packed"]
        return packed + [problem for problem in models if problem.dtype == "float32"]
    mixers = [problem for problem in mixers if problem.dtype == "float64"]
    return mixers + [problem for problem in models if problem.dtype == "float64"]


@torch.no_grad()
def slow_down(module: nn.Module) -> None:
    """Let states decay so slowly that they come through whole rows."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "A_log": lambda x: x.sub_(2.0),
        "Lambda": lambda x: x.sub_(1.0),
    }
    for name, parameter in module.named_parameters():
        change = changes.get(name.rpartition(".")[2])
        if change is not None:
            change(parameter)


def _mixer(name: str) -> Mixer:
    if name in VARIANTS:
        return drawn(VARIANTS[name].build(Slot(D_MODEL, 2)), seed=0)
    kind, _, pattern = name.partition(" ")
    return case_of(kind, Pattern(pattern or Pattern.CAUSAL_SELF)).fresh()


def model(name: str, layout: str, dtype: str, *, recompute: bool) -> Problem:
    """A named architecture at the smallest size; mixers have the same names."""
    return Problem(f"model {name}", layout, dtype, _fitted(name), recompute)


@functools.cache
def _fitted(name: str) -> BackboneConfig:
    place = Shape(RUNGS["10k"], VOCABULARY, seq_len=max(x.length for x in LAYOUTS.values()))
    return size_architecture(name, read_architectures()[name], place, math.inf).model


def _cases() -> list[tuple[str, Pattern]]:
    return [(kind, pattern) for kind, pattern in declared_cases() if pattern not in CROSS]


@functools.cache
def _reason(kind: str, pattern: Pattern) -> str:
    return case_of(kind, pattern).mixer.unsharded()

"""Which layers the wire benchmark measures, and the bytes that each rank should send of each."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from models.mixer import MixerConfig
from models.mixers.composed.hybrid import HybridConfig
from models.mixers.convolution.monarch import MonarchConfig
from models.mixers.recurrent.hydra import HydraConfig
from models.mixers.recurrent.mamba import MambaConfig
from models.mixers.recurrent.mamba2 import Mamba2Config
from models.mixers.softmax.attention import AttentionConfig
from models.mixers.softmax.scout import ScoutConfig
from models.mixers.softmax.window import WindowConfig
from models.ranks.schemes import Payload, Scheme
from sweeps.architecture import read_architectures
from sweeps.rungs import RUNGS
from sweeps.sizing import Shape, size_architecture
from tests.oracles import prefix_messages, wire
from tests.sequence_parallel.problem import ARCHITECTURES

RANKS, ROWS, FLOAT = 4, 2, 4
"""How many ranks, rows of tokens, and bytes of a number in float32."""
ONCE = ("lengths", "documents")
"""What a sequence sends when it is made: once for all layers."""

Sums = dict[str, list[int]]
"""Bytes of each rank, by what they were."""


@dataclass(frozen=True)
class Layer:
    """A mixer of a named architecture on so many tokens; `scheme` where it carries a state."""

    architecture: str
    mixer: MixerConfig
    d_model: int
    tokens: int
    scheme: Scheme | None

    @property
    def name(self) -> str:
        """The architecture, the kind of mixer, and how states are passed."""
        named = f"{self.architecture}: {self.mixer.kind}"
        return named if self.scheme is None else f"{named}, {self.scheme}"


def layers(lengths: Sequence[int]) -> list[Layer]:
    """Every mixer of each named architecture at its smallest size, at each length."""
    place = Shape(RUNGS["10k"], vocab_size=19, seq_len=max(lengths))
    found = []
    for name in ARCHITECTURES:
        model = size_architecture(name, read_architectures()[name], place, math.inf).model
        for block in model.blocks.values():
            carries = payload(block.mixer, model.d_model) is not None
            found += [
                Layer(name, block.mixer, model.d_model, tokens, scheme)
                for scheme in (tuple(Scheme) if carries else (None,))
                for tokens in lengths
            ]
    return found


def expected(layer: Layer) -> Sums:
    """What every rank should send of a layer, and once for all of them."""
    shares = ROWS * FLOAT * layer.tokens // RANKS * (RANKS - 1)
    total = {"lengths": [(RANKS - 1) * 2 * 8] * RANKS, "documents": [shares] * RANKS}
    for what, count in _parts(layer):
        for name, sent in ((what, count(False)), (f"{what} gradient", count(True))):
            before = total.get(name, [0] * RANKS)
            total[name] = [a + b for a, b in zip(before, sent, strict=True)]
    return {what: sent for what, sent in total.items() if any(sent)}


def payload(mixer: MixerConfig, d_model: int) -> Payload | None:
    """What a rank tells of its tokens for rows of its own; None where no state is carried."""
    each = ROWS * FLOAT
    match mixer:
        case MambaConfig():
            E = mixer.expand * d_model
            return Payload(each * E * mixer.d_state, each * E)
        case Mamba2Config():
            E = mixer.expand * d_model
            return Payload(each * E * mixer.d_state, each * E // mixer.head_dim)
        case HydraConfig():
            E = 2 * mixer.expand * d_model
            return Payload(each * E * mixer.d_state, each * E // mixer.head_dim, directions=2)
        case HybridConfig():
            return Payload(each * d_model, each * d_model)
    return None


Count = Callable[[bool], list[int]]
"""Bytes of each rank, of what goes there or, if true, of gradients that come back."""


def _parts(layer: Layer) -> Iterator[tuple[str, Count]]:
    """What is sent for a layer itself."""
    config, D, T = layer.mixer, layer.d_model, layer.tokens // RANKS
    token = ROWS * FLOAT
    match config:
        case AttentionConfig():
            yield "gather", _all_before([T] * RANKS, token * 2 * D)
        case ScoutConfig():
            ends = wire.checkpoints(RANKS, T, config.every)
            yield "collect", _all_before(ends, token * 2 * D)
        case WindowConfig():
            yield "halo", _around(T, config.window - 1, 0, token * 2 * D)
        case HybridConfig():
            yield "halo", _around(T, config.window - 1, 0, token * 2 * D)
            yield "halo", _around(T, config.d_conv - 1, 0, token * D)
        case MonarchConfig():
            yield "halo", _around(T, config.d_conv - 1, 0, token * 3 * D)
            yield "channels", lambda _: wire.channels_swapped(RANKS, T, D, token)
        case MambaConfig():
            yield "halo", _around(T, config.d_conv - 1, 0, token * config.expand * D)
        case Mamba2Config():
            width = config.expand * D + 2 * config.n_groups * config.d_state
            yield "halo", _around(T, config.d_conv - 1, 0, token * width)
        case HydraConfig():
            half, GN = config.d_conv // 2, config.n_groups * config.d_state
            yield "halo", _around(T, half, half, token * (config.expand * D + 4 * GN))
            # C of both ways, of the one token before and of the one after.
            yield "halo", _around(T, 1, 1, token * 2 * GN)
        case _:
            raise ValueError(
                f"{config.kind} has no formula; add one to tests.benchmarks.wire.wire_formulas"
            )
    carried = payload(config, D)
    if layer.scheme is not None and carried is not None:
        yield "state", functools.partial(_state, layer.scheme, carried)


def _around(T: int, left: int, right: int, width: int) -> Count:
    return lambda back: wire.stretches(RANKS, T, left, right, width, back=back)


def _all_before(tokens: list[int], width: int) -> Count:
    return lambda back: wire.everything_before(tokens, width, back=back)


def _state(scheme: Scheme, carried: Payload, back: bool) -> list[int]:
    rounds = prefix_messages.messages(scheme, RANKS, prefix_messages.Sizes(*carried), back=back)
    return [sum(count for _, count in prefix_messages.sent(rounds, rank)) for rank in range(RANKS)]

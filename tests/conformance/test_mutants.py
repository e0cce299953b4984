"""Each property can fail: an attention that breaks it on purpose is caught."""

import re
from dataclasses import dataclass

import pytest
import torch
from torch.autograd.function import once_differentiable

from models.mixer import MixFlops, Pattern
from models.mixers.softmax.attention import Attention, AttentionConfig
from models.sequences.continued import Memory
from models.sequences.whole import WholeSequence
from tests.conformance.case import Case
from tests.conformance.property import Reason
from tests.conformance.suite import PROPERTIES
from tests.conformance.table import judge

CS, NS, CC = Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_CROSS
BY_NAME = {each.name: each for each in PROPERTIES}


def mutant(**members):
    return type("Mutant", (Attention,), members)


def after(change):
    """An attention whose outputs are changed: y, x -> y."""

    def forward(self, x, sequence, memory=None):
        return change(Attention.forward(self, x, sequence, memory), x)

    return mutant(forward=forward)


def outputs(change):
    """An attention whose outputs are changed without a look at its inputs."""
    return after(lambda *given: change(given[0]))


def before(change):
    """An attention that is given other inputs: x, sequence, memory -> the same three."""

    def forward(self, x, sequence, memory=None):
        return Attention.forward(self, *change(x, sequence, memory))

    return mutant(forward=forward)


def mixing(change):
    """An attention whose mixed values are changed: y, values -> y."""

    def mix(self, values, coefficients, sequence):
        return change(Attention.mix(self, values, coefficients, sequence), values)

    return mutant(mix=mix)


def scaled_by(make):
    """An attention scaled by a buffer that is made with it and stored nowhere."""

    def initialise(self, config, slot):
        Attention.__init__(self, config, slot)
        self.register_buffer("scale", make(), persistent=False)

    def forward(self, x, sequence, memory=None):
        return self.scale * Attention.forward(self, x, sequence, memory)

    return mutant(__init__=initialise, forward=forward)


def with_extra(make):
    """An attention with a parameter that nothing reads."""

    def initialise(self, config, slot):
        Attention.__init__(self, config, slot)
        self.extra = torch.nn.Parameter(torch.empty(3))

    def draw(self, name, generator):
        return make()

    return mutant(__init__=initialise, draw=draw)


def silent(leak):
    """A leak that gradients take and outputs do not."""
    return after(lambda y, x: y + leak(x) - leak(x).detach())


def blind(x, sequence, memory):
    return x, WholeSequence(torch.zeros_like(sequence.documents)), memory


def deaf(x, sequence, memory):
    return x, sequence, Memory(memory.x.detach(), memory.sequence)


def unmasked(x, sequence, memory):
    ids = torch.zeros_like(memory.sequence.documents)
    return x, sequence, Memory(memory.x.nan_to_num(0.0), WholeSequence(ids))


def limited(y, x):
    assert x.shape[1] <= 64
    return y


def reads_padding(self, x, sequence, memory=None):
    values, coefficients = self.project(x, sequence, memory)
    return self.merge(self.mix(values, coefficients, sequence), coefficients)


def leaking_nan():
    """An attention that says it stops a NaN, and multiplies it by zero."""

    def mix(self, values, coefficients, sequence):
        return Attention.mix(self, values, coefficients, sequence) + 0.0 * values.sum(1, True)

    return mutant(stops_nan=True, mix=mix)


class Sine(torch.autograd.Function):
    """A sine that `torch.autograd.grad` cannot differentiate twice, which nobody is told."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_sine):
        (x,) = ctx.saved_tensors
        return d_sine * x.cos()


def miscounted(self, queries, keys):
    return MixFlops(needed=1.0)


MUTANTS = {
    "float32": (NS, outputs(lambda y: y.double())),
    "float64": (NS, outputs(lambda y: y.float())),
    "bfloat16": (NS, outputs(lambda y: y.to(torch.promote_types(y.dtype, torch.float32)))),
    "lengths": (NS, after(lambda y, x: y / x.std(dim=1, keepdim=True))),
    "long_documents": (NS, after(limited)),
    "matrix": (NS, mixing(lambda y, values: y + torch.ones_like(values))),
    "derivatives": (NS, before(lambda x, s, m: (x + x.sin() - x.sin().detach(), s, m))),
    "second_derivatives": (NS, before(lambda x, s, m: (Sine.apply(x), s, m))),
    "determinism": (NS, outputs(lambda y: torch.dropout(y, 0.1, True))),
    "future_outputs": (CS, after(lambda y, x: y + 1e-6 * x.sum(1, keepdim=True))),
    "future_mixing": (CS, mixing(lambda y, values: y + 1e-6 * values.sum(1, keepdim=True))),
    "future_gradients": (CS, silent(lambda x: x.sum(1, keepdim=True))),
    "triangle": (CS, mixing(lambda y, values: y + 1e-6 * values.sum(1, keepdim=True))),
    "prefix": (CC, after(lambda y, x: y * x.shape[1])),
    "any_split": (CC, after(lambda y, x: y + x[:, :1])),
    "padded_pieces": (CS, after(lambda y, x: y + x[:, -1:])),
    "state_bytes": (CS, mutant(constant_state=True)),
    "packed_outputs": (CS, before(blind)),
    "packed_gradients": (NS, silent(lambda x: x.mean(1, keepdim=True))),
    "loud_documents": (NS, after(lambda y, x: y + 1e-9 * x.sum(1, keepdim=True))),
    "nan_elsewhere": (NS, leaking_nan()),
    "documents_apart": (NS, mixing(lambda y, values: y + 1e-6 * values.sum(1, keepdim=True))),
    "padded_outputs": (NS, after(lambda y, x: y * x.shape[1])),
    "nan_padding": (NS, mutant(forward=reads_padding)),
    "memory_padding": (CC, before(unmasked)),
    "memory_order": (CC, mutant(ordered_memory=True)),
    "memory_reached": (CC, before(deaf)),
    "overfit": (NS, outputs(lambda y: 0.0 * y)),
    "every_parameter": (NS, with_extra(lambda: torch.ones(3))),
    "initial_values": (NS, with_extra(lambda: torch.randn(3))),
    "meta_device": (NS, scaled_by(lambda: torch.ones(()))),
    "stored_weights": (NS, scaled_by(lambda: 1 + torch.rand(()))),
    "no_decay": (NS, mutant(no_decay=frozenset({"A_log"}))),
    "refusals": (NS, mutant(patterns=frozenset({NS}))),
    "counted_flops": (NS, mutant(mix_flops=miscounted)),
}


@dataclass(frozen=True)
class MutantConfig(AttentionConfig):
    """An attention's that makes a mutant of it, with a longest document or without."""

    mixer: type[Attention] = Attention
    max_len: int | None = None

    def build(self, slot):
        return self.mixer(self, slot)


def case_with(mixer: type[Attention], pattern: Pattern, max_len: int | None = None) -> Case:
    return Case("mutant", pattern, MutantConfig(2, initial_std=0.3, mixer=mixer, max_len=max_len))


@pytest.mark.parametrize("name", BY_NAME)
def test_a_mixer_that_breaks_a_property_is_caught(name: str) -> None:
    pattern, mixer = MUTANTS[name]
    verdict = judge(case_with(mixer, pattern), BY_NAME[name])
    assert verdict.reason is None
    assert verdict.failure is not None
    # An error of another type would be one of the mutant's own.
    assert not re.match(r"\w+Error:", verdict.failure)


@pytest.mark.parametrize("pattern", list(Pattern))
@pytest.mark.parametrize("name", BY_NAME)
def test_the_mixer_that_mutants_are_made_of_breaks_nothing(name: str, pattern: Pattern) -> None:
    assert judge(case_with(Attention, pattern), BY_NAME[name]).failure is None


def test_rounding_of_an_fft_is_excused_in_float32_alone() -> None:
    leak = mixing(lambda y, values: y + 1e-9 * values.sum(1, keepdim=True))
    transformed = type("Transformed", (leak,), {"uses_fft": True, "filter_norm": lambda *_: 1.0})
    failure = judge(case_with(transformed, CS), BY_NAME["future_mixing"]).failure
    assert failure is not None
    assert "torch.float64" in failure


def test_an_fft_without_a_norm_of_its_filters_is_caught() -> None:
    verdict = judge(case_with(mutant(uses_fft=True), CS), BY_NAME["future_mixing"])
    assert verdict.failure is not None
    assert "filter_norm()" in verdict.failure


def test_a_longest_document_that_is_not_enforced_is_caught() -> None:
    verdict = judge(case_with(Attention, CS, max_len=64), BY_NAME["refusals"])
    assert verdict.failure == "asked for too long a document it says 'nothing'"


def test_a_longest_document_excuses_from_longer_ones_alone() -> None:
    case = case_with(Attention, CS, max_len=64)
    excused = {name for name, each in BY_NAME.items() if each.excuse(case) is Reason.FIXED_LENGTH}
    assert excused == {"long_documents"}


def test_an_approximation_is_excused_from_exact_equalities_alone() -> None:
    case = case_with(mutant(approximate="it forgets"), CS)
    excused = {name for name, each in BY_NAME.items() if each.excuse(case) is Reason.APPROXIMATE}
    assert excused == {"prefix", "any_split", "padded_pieces"}

"""The profile accounts for all of a step, and its bound counts what a known step does."""

import math
from collections import Counter

import pandas as pd
import pytest
import torch

from analysis.benchmarks.profile import BARS, draw
from models.mixers.recurrent.mamba import MambaConfig
from models.mixers.recurrent.mamba2 import Mamba2Config
from tests.benchmarks.training import step_bound
from tests.benchmarks.training.bench_architectures import QUICK
from tests.benchmarks.training.bench_models import Task, bare
from tests.benchmarks.training.profile_rows import Found, capped, verdict
from tests.benchmarks.training.step_bound import Bound, Rates
from tests.benchmarks.training.step_profile import GROUPS as TIME_GROUPS
from tests.benchmarks.training.step_profile import group_of, profile_step
from tests.benchmarks.training.step_trace import ADAM_WORDS, StepTrace, bytes_of

WORD = 4
RATES = Rates({1024: 2e9, 2**20: 1e9}, 1e9)


def traced(step):
    trace = StepTrace()
    with trace:
        step()
    return trace


@pytest.mark.parametrize("architecture", ["transformer", "scout_window"])
def test_the_groups_of_a_profile_sum_to_the_step(architecture):
    built = bare(Task(QUICK.size.shape(architecture), QUICK.size))
    built.step()
    found = profile_step(built.step, 2)
    assert set(found) == {*TIME_GROUPS, "total"}
    assert sum(found[group] for group in TIME_GROUPS) == pytest.approx(found["total"], rel=1e-6)
    assert min(found["products"], found["optimizer"]) > 0
    assert (found["passes of kernels"] > 0) is (architecture == "scout_window")


def test_operators_are_found_in_their_groups():
    names = (
        "aten::addmm",
        "aten::_fft_r2c",
        "aten::cat",
        "aten::mul_",
        "aten::view",
        "MmBackward0",
    )
    groups = ("products", "FFT", "copies, layout", "norms, elementwise")
    assert tuple(map(group_of, names)) == (*groups, "dispatch, Python", "dispatch, Python")
    assert group_of("crossladder::selective_scan_forward") == "scans, convolutions"
    assert group_of("crossladder::rglru_forward") == "norms, elementwise"
    assert group_of("crossladder::rms_norm_backward") == "norms, elementwise"
    assert group_of("crossladder::interval_attention_backward") == "attention kernel"


def test_a_perceptron_has_the_flops_and_bytes_of_its_closed_form():
    m, k, h, n = 8, 16, 32, 4
    first, second = (torch.randn(size, requires_grad=True) for size in ((k, h), (h, n)))
    optimizer = torch.optim.AdamW([first, second], fused=True)
    x = torch.randn(m, k)

    def step():
        ((x @ first).tanh() @ second).sum().backward()
        optimizer.step()

    trace = traced(step)
    # Forward twice; weights' gradients twice; the gradient of the hidden layer once.
    assert trace.flops() == 2.0 * m * (2 * k * h + 3 * h * n)
    assert trace.optimizer_parameters == k * h + h * n
    terms = Bound(trace).terms(RATES, fused=True)
    moved = ADAM_WORDS * WORD * (k * h + h * n)
    assert terms["optimizer"] == pytest.approx(moved / RATES.passes[2**20])
    # Read by products: x, tanh, the gradient before tanh, and a one that stands for all of the
    # sum's. Written by them and read by passes: two outputs, and the gradient after tanh.
    least = sum(size * count for size, count in trace.least().items())
    assert least == WORD * (m * (k + 2 * h) + 1 + m * (2 * h + n))


def test_equal_products_are_one_call_with_a_count():
    a, b = torch.randn(3, 5, 7), torch.randn(3, 7, 2)
    trace = traced(lambda: [torch.bmm(a, b) for _ in range(4)])
    (call,) = trace.calls.values()
    assert (call.count, call.flops, call.name) == (4, 2.0 * 3 * 5 * 7 * 2, "bmm")


def test_what_is_run_has_the_operands_and_the_order_of_the_step():
    x, w = torch.randn(2, 8, 16), torch.randn(16, 16)
    trace = traced(lambda: [torch.mm(x[0], w), torch.exp(w), torch.mm(x[1], w)])
    assert len(trace.calls) == 1
    assert [torch.equal(run(), y @ w) for (_, run), y in zip(trace.order, x, strict=True)] == [
        True, True
    ]  # fmt: skip


def test_a_product_counts_with_its_best_time_at_its_place(monkeypatch):
    x, w = torch.randn(8, 16), torch.randn(16, 16)
    bound = Bound(traced(lambda: [torch.mm(x, w), torch.mm(x, w)]))
    ordered = iter([3.0, 5.0, 4.0, 4.0])
    monkeypatch.setattr(step_bound, "_seconds_of", lambda _: next(ordered))
    monkeypatch.setattr(step_bound, "best_seconds", lambda _: 1.0)
    bound.measure()
    assert bound.terms(RATES, fused=True)["products"] == 3.0 + 4.0
    assert bound.alone()["products"] == 2.0


def test_passes_move_what_they_read_and_write():
    x, y = torch.randn(8, 16), torch.randn(16)
    assert traced(lambda: x * y).written == Counter({8 * 16 * WORD: 2, 16 * WORD: 1})
    assert bytes_of(y.expand(8, 16)) == 16 * WORD
    out = torch.empty(8, 16)
    assert traced(lambda: out.copy_(x)).written == Counter({8 * 16 * WORD: 2})
    assert not traced(lambda: x.t().reshape(2, 64).view(-1)[:3].detach()).calls


def test_only_what_lies_between_heavy_operators_is_the_least():
    x, w = torch.randn(8, 16), torch.randn(16, 16)
    trace = traced(lambda: torch.mm(torch.mm(x, w).exp().log(), w).sum())
    size = 8 * 16 * WORD
    # exp reads the first product, log writes what the second reads, sum reads that; x and w are
    # read alone, as they would be were they made by a pass.
    assert sum(s * c for s, c in trace.least().items()) == 3 * size + size + 16 * 16 * WORD


def test_a_scan_needs_two_exponentials_of_every_state():
    task = Task(QUICK.size.shape("mamba"), QUICK.size)
    calls = traced(bare(task).step).calls.values()
    scans = [call for call in calls if call.exponentials]
    mixer = task.model.layers()[0].mixer
    assert isinstance(mixer, MambaConfig)
    states = QUICK.size.tokens * 2 * task.model.d_model * mixer.d_state
    assert sum(c.exponentials * c.count for c in scans) == 2.0 * states * task.model.n_layers


def test_ssd_is_the_products_that_it_consists_of():
    task = Task(QUICK.size.shape("mamba2"), QUICK.size)
    calls = [c for c in traced(bare(task).step).calls.values() if c.name.startswith("ssd_")]
    assert [(call.name, call.count) for call in calls] == [
        ("ssd_forward", task.model.n_layers), ("ssd_backward", task.model.n_layers)
    ]  # fmt: skip
    mixer = task.model.layers()[0].mixer
    assert isinstance(mixer, Mamba2Config)
    H, P, N = mixer.n_heads(task.model.d_model), mixer.head_dim, mixer.d_state
    # C B, into the state and out of it, and the masked matrix times values; 64 tokens a chunk.
    chunks = QUICK.size.batch * -(-QUICK.size.seq_len // 64)
    forward = 2.0 * chunks * 64 * (64 * N + 2 * N * H * P + 64 * H * P)
    assert calls[0].flops == forward
    assert all(call.group == "products" for call in calls)


def test_a_tensor_moves_as_fast_as_the_fastest_that_is_no_smaller():
    assert RATES.pass_seconds({512: 2}) == pytest.approx(2 * 512 / 2e9)
    assert RATES.pass_seconds({2048: 1}) == pytest.approx(2048 / 1e9)
    assert RATES.pass_seconds({2**30: 1}) == pytest.approx(2**30 / 1e9)


def found_of(products, passes, written):
    terms = {"products": products, "attention kernel": 0.0, "FFT": 0.0, "passes": passes}
    return Found(1e9, {"": [0.5]}, peaks=[1e9], run_over_model=1.0, least=terms,
                 written={**terms, "passes": written})  # fmt: skip


def test_a_bound_below_the_goal_is_told_from_a_gap():
    held = verdict(0.8, 0.5, found_of(1000.0, 1000.0, 1000.0))
    assert held.startswith("BOUND")
    assert "passes" in held
    assert verdict(0.8, 0.5, found_of(1000.0, 100.0, 1000.0)).startswith("GAP OF OURS: passes")
    assert verdict(0.8, 0.5, found_of(1000.0, 100.0, 100.0)).startswith("GAP OF OURS: both")
    assert verdict(0.8, 0.9, found_of(1000.0, 100.0, 100.0)).startswith("goal kept")
    assert math.isclose(found_of(1000.0, 1000.0, 1.0).bound_share({"products": 2000.0}), 0.5)


def test_no_term_of_a_bound_lies_above_what_a_step_took():
    profiles = [dict.fromkeys(TIME_GROUPS, ms) for ms in (3.0, 2.0)]
    terms = {"products": 9.0, "optimizer": 1.0, "passes": 9.0}
    assert capped(terms, profiles) == {"products": 2.0, "optimizer": 1.0, "passes": 8.0}


def test_the_figure_has_a_bar_for_each_profile_and_bound(tmp_path):
    times = pd.DataFrame(
        {"contender": "a", "bar": list(BARS), "term": "products", "milliseconds": [3.0, 2.0, 1.0]}
    )
    plate = draw(times, "profile_quick")
    widths = sorted(patch.get_extents().width for patch in plate.figure.axes[0].patches)
    assert [width / widths[0] for width in widths] == pytest.approx([1.0, 2.0, 3.0])
    plate.save(tmp_path)
    assert (tmp_path / "profile_quick.svg").is_file()

"""The benchmark measures what it says; how fast anything is, is no matter of these tests."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.benchmarks.training.bench import LITTLE, QUICK, TINY, sits_out
from tests.benchmarks.training.bench_models import Task
from tests.benchmarks.training.bench_peers import llama
from tests.benchmarks.training.bench_processes import CONTENDERS, Child, serve
from tests.benchmarks.training.bench_rows import (
    ARCHITECTURES,
    IMPLEMENTATIONS,
    STEP_SECONDS,
    Timing,
    ratio_rows,
    spread_rows,
)

ROOT = Path(__file__).parents[3]


def sleep_when_told(connection):
    while True:
        time.sleep(connection.recv())
        connection.send("awake")


def fail_at_once(connection):
    raise SystemExit(3)


@pytest.fixture
def timings():
    return {contender: Timing(1000, "", 1.0, {1: 0.5, 2: 0.25}) for contender in CONTENDERS}


def values(rows):
    return {row.name: row.value for row in rows}


def test_a_child_that_takes_too_long_is_gone_and_the_next_question_starts_another():
    child = Child(sleep_when_told)
    child.ask(600.0)
    assert child.answer(0.5) is None
    child.ask(0.0)
    assert child.answer(60.0) == "awake"
    child.stop()


def test_a_child_that_ends_by_itself_is_an_error_with_its_exit_code():
    child = Child(fail_at_once)
    with pytest.raises(RuntimeError, match="exit code 3"):
        child.answer(60.0)


def test_ratios_are_taken_within_rounds(timings):
    timings["transformer", "transformers"].rounds = {1: 1.5, 2: 0.75, 3: 9.0}
    ratios = values(ratio_rows(LITTLE, timings))
    assert ratios["transformer d48: speed of bare over transformers"] == 3.0
    assert ratios["transformer d48: speed of bare over transformers, quartile range"] == 0.0
    assert ratios["mamba d48: speed of bare over transformers"] == 1.0


def test_a_peer_that_was_stopped_counts_as_if_it_had_finished_at_the_limit(timings):
    timings["mamba", "transformers"] = Timing(1000, "", stopped=True)
    ratios = values(ratio_rows(LITTLE, timings))
    assert ratios["mamba d48: speed of bare over transformers"] == STEP_SECONDS / 0.375


@pytest.mark.parametrize(
    ("timing", "waits"),
    [
        (Timing(1, ""), False),
        (Timing(1, "", stopped=True), True),
        (Timing(1, "", 30.0), False),
        (Timing(1, "", 30.0, {1: 30.0}), True),
        (Timing(1, "", 30.0, {1: 20.0}), False),
    ],
)
def test_a_contender_sits_out_when_it_was_stopped_or_its_time_is_spent(timing, waits):
    assert sits_out(timing) is waits


def test_a_spread_is_the_median_and_the_distance_of_the_quartiles():
    rows = list(spread_rows("x", [1.0, 2.0, 3.0, 4.0, 100.0], "s", 2.5))
    assert [(row.value, row.holds) for row in rows] == [(3.0, False), (2.0, None)]


def test_llama_attends_without_a_dense_mask(monkeypatch):
    calls = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def listen(*tensors, attn_mask=None, is_causal=False, **rest):
        calls.append((attn_mask, is_causal))
        return attention(*tensors, attn_mask=attn_mask, is_causal=is_causal, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", listen)
    llama(Task(TINY.shape("transformer"), TINY)).step()
    assert calls == [(None, True)] * TINY.rung.n_layers


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_contender_learns_and_the_engine_starts_from_the_loss_of_the_bare_module(
    architecture,
):
    children = {name: Child(serve, (architecture, name)) for name in IMPLEMENTATIONS}
    for child in children.values():
        child.ask(Task(TINY.shape(architecture), TINY))
    losses = {name: _losses(child, steps=8) for name, child in children.items()}
    assert all(each[-1] < each[0] for each in losses.values())
    assert losses["engine"][0] == pytest.approx(losses["bare"][0], rel=1e-5)


@pytest.mark.slow
def test_the_quick_benchmark_reports_every_contender_with_finite_figures(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.training.bench",
        "--quick",
        "--root",
        str(tmp_path),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "reports" / "bench_quick.json").read_text())
    figures = {row["name"]: row["value"] for row in report["rows"]}
    assert len(figures) == len(report["rows"])
    assert all(math.isfinite(value) for value in figures.values())
    expected = {"GEMM peak", "checkpoint save", "start-up, later runs of a process"}
    expected |= {"selective scan forward: time over torch.exp"}
    for width in (size.rung.name for size, _ in QUICK.sizes):
        expected |= {f"{a} {width} {i}: speed" for a, i in CONTENDERS}
        expected |= {f"{a} {width} {i}: share of GEMM peak" for a, i in CONTENDERS}
        expected |= {f"{a} {width}: speed of bare over transformers" for a in ARCHITECTURES}
    assert expected <= set(figures)
    assert all(figures[name] > 0 for name in expected)


def _losses(child, steps):
    assert child.answer(120.0) is not None
    losses = []
    for _ in range(steps):
        child.ask("step")
        losses.append(child.answer(60.0)[1])
    child.stop()
    return losses

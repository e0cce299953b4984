"""The ahead-of-time report: what is recorded, what is compiled, and which limits hold."""

import dataclasses

import pytest
import torch

from kernels.ahead_of_time import CHIPS, Compiled, occupancy_of, roofline_seconds
from kernels.attention.block_sparse_attention import query_blocks
from kernels.attention.hip_selection import Search, tree_search
from kernels.attention.interval_attention import Intervals, Own, interval_attention
from kernels.triton_launch import interpreting, recording
from tests.benchmarks.kernels.report import (
    EXCEPTIONS,
    Line,
    compile_all,
    distinct,
    record_hip,
    record_layer,
    traffic,
)

RUNG = "1.3B"
ARCHITECTURES = ("mamba", "mamba2", "hydra", "hybrid", "scout_window")
"""Together they start every kernel that a named architecture starts."""
HOPPER = CHIPS[1]
SCORES = "_score_kernel"

compiles = pytest.mark.skipif(interpreting(), reason="an interpreted kernel cannot be compiled")


def compile_layer(name):
    return compile_all(distinct({f"{RUNG} {name}": record_layer(name, RUNG)}), [HOPPER])


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kernels_keep_the_limits_of_the_chip_or_are_excused(name):
    lines = compile_layer(name)
    assert lines
    assert {line.name: line.broken() for line in lines if line.broken()} == {}


@compiles
@pytest.mark.slow
def test_a_layer_that_is_excused_needs_its_excuse():
    lines = compile_layer("mamba")
    excused = {name for name, limit in EXCEPTIONS if limit == "occupancy"}
    least = [x.compiled.occupancy for x in lines if x.name in excused]
    assert least
    assert max(least) < 0.5


@compiles
@pytest.mark.slow
def test_attention_with_wide_float32_heads_does_not_spill():
    q, k, v = (torch.empty(1, 64, 2, 128, device="meta", requires_grad=True) for _ in range(3))
    seen = Intervals(*(torch.empty(1, 64, device="meta", dtype=torch.int32) for _ in range(2)))
    with recording() as launches:
        interval_attention(q, k, v, seen, Own(k, v)).sum().backward()
    assert len(launches) == 4
    lines = compile_all([("float32", each) for each in launches], [HOPPER])
    assert {line.name: line.broken() for line in lines if line.broken()} == {}


@compiles
@pytest.mark.slow
def test_the_search_and_attention_to_listed_keys_keep_the_limits_forward_and_backward():
    launches = record_hip(RUNG)
    names = [each.kernel.fn.__name__ for each in launches if each.kernel.fn.__name__ != SCORES]
    assert names == ["_forward_kernel", "_query_kernel", "_key_kernel", "_forward_kernel"]
    assert len(launches) > len(names) + 1
    lines = compile_all(distinct({"hip": launches}), [HOPPER])
    assert {line.name: line.broken() for line in lines if line.broken()} == {}


@compiles
@pytest.mark.slow
def test_a_search_with_wide_float32_heads_does_not_spill():
    queries, keys = (torch.empty(1, 64, 2, 128, device="meta") for _ in range(2))
    blocks = query_blocks(torch.empty(1, 64, device="meta", dtype=torch.int64), 64, 32, 32)
    with recording() as launches:
        tree_search(queries, keys, blocks, Search(4, 2, 64, exact=False))
    lines = compile_all(distinct({"float32": launches}), CHIPS)
    assert len(lines) == len(CHIPS)
    assert {line.name: line.broken() for line in lines if line.broken()} == {}


def test_a_layer_of_mamba_starts_eight_kernels_in_order():
    names = [each.kernel.fn.__name__ for each in record_layer("mamba", "360M")]
    scan = ["_summary_kernel", "_carry_kernel"]
    forward = ["_forward_kernel", *scan, "_output_kernel"]
    assert names == [*forward, *scan, "_backward_kernel", "_backward_kernel"]


def test_a_bf16_run_reads_bf16_values_and_float32_steps():
    output = record_layer("mamba", "360M")[3]
    assert output.types["values"] == output.types["B"] == "*bf16"
    assert output.types["dt"] == output.types["A"] == output.types["borders"] == "*fp32"
    assert output.types["documents"] == "*i32"


def test_launches_of_two_places_that_are_the_same_are_reported_once():
    launches = record_layer("mamba", "360M")
    assert len(distinct({"a": launches, "b": launches})) == len(distinct({"a": launches}))


def test_a_kernel_over_a_limit_is_named_with_the_limit():
    launch = record_layer("mamba", "360M")[0]
    compiled = Compiled(64, 8, 0, HOPPER.shared_per_block + 1, 0.4, dots=False)
    line = Line("360M mamba", launch, HOPPER, compiled)
    assert line.broken() == ["spills", "shared", "occupancy"]
    whole = dataclasses.replace(compiled, spills=0, shared=0, occupancy=0.5)
    assert dataclasses.replace(line, compiled=whole).broken() == []


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "share"),
    [(32, 0, 4, 1.0), (64, 0, 8, 0.5), (128, 0, 8, 0.25), (16, 0, 1, 0.5), (32, 100_000, 4, 0.125)],
)
def test_occupancy_is_that_of_the_scarcest_thing(registers, shared, warps, share):
    assert occupancy_of(HOPPER, registers, shared, warps) == share


def test_time_by_bytes_is_that_of_every_tensor_once():
    launch = record_layer("mamba", "360M", batch=1)[0]
    compiled = Compiled(32, 0, 0, 0, 1.0, dots=False)
    by_bytes, by_flops = roofline_seconds(launch, compiled, HOPPER)
    assert by_bytes == launch.bytes / 3.35e12
    assert by_flops == launch.flops / 67e12


def test_traffic_is_told_beside_the_documented_one():
    (row,) = traffic({"360M mamba": record_layer("mamba", "360M")})
    assert "mamba_ssm's contract" in row

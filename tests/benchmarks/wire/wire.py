"""Bytes on the wire for each layer of the named architectures, measured and by formula.

python -m tests.benchmarks.wire.wire          four ranks over gloo, 256 to 4096 tokens
python -m tests.benchmarks.wire.wire --quick  two short lengths; for tests

Each mixer of each causal architecture, and of the encoder Hydra, runs forward and back on real
processes, recurrences in each way to pass their states, in float32 on rows of one document. What
every rank sent is held against `tests.oracles.wire` and `tests.oracles.prefix_messages`, byte for
byte; another figure fails the command. Beside that, by formula alone: a Mamba-2 of published size
against an all-to-all over its heads and ring attention, and the schemes on up to 1,024 ranks.
Writes reports/wire.json, .csv, .png and .svg.
"""

import argparse
import functools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from analysis.benchmarks.wire import draw
from analysis.tables.frames import floats, groups, keep
from launch.measurements import Measurement, write_measurements
from models.mixer import Pattern, Slot, mixer_class
from models.mixers.recurrent.mamba2 import Mamba2Config
from models.mixers.softmax.attention import AttentionConfig
from models.ranks.schemes import ASSUMED, Payload, Scheme, choose
from models.sequences.sharded import ShardedSequence
from tests.benchmarks.wire.wire_formulas import (
    FLOAT,
    ONCE,
    RANKS,
    ROWS,
    Layer,
    Sums,
    expected,
    layers,
)
from tests.models.conftest import drawn
from tests.oracles import prefix_messages, wire
from tests.sequence_parallel.world import on_ranks

ROOT = Path(__file__).parents[3]
LENGTHS, QUICK = (256, 512, 1024, 2048, 4096), (128, 192)
INNER, STATE, HEADS, WIDTH = 4096, 128, 64, 2048
"""A Mamba-2 layer of width 2048 as published: inner width, state and heads, of one group."""
LARGE_RANKS, BFLOAT16 = 8, 2
TOKENS = tuple(256 << i for i in range(13))
SIZES = tuple(2 << i for i in range(10))
SMALL_SIZES = SIZES[:6]


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.wire.wire")
    parser.add_argument("--quick", action="store_true", help="two short lengths, fewer ranks")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder that gets reports/")
    options = parser.parse_args(words)
    begin, console = time.monotonic(), Console(width=None if sys.stdout.isatty() else 130)
    tried = layers(QUICK if options.quick else LENGTHS)
    found = on_ranks(RANKS, functools.partial(measure, tried))
    wrong = differing(tried, found)
    large, simulated = at_published_size(), simulate(SMALL_SIZES if options.quick else SIZES)
    points = pd.concat([measured_points(tried, found), instead(tried), large, simulated])
    target = "wire_quick" if options.quick else "wire"
    draw(points, target, _titles()).save(options.root / "reports")
    console.print(layer_table(tried, found, wrong), rank_table(simulated))
    for name, (sent, should) in wrong.items():
        console.print(f"FAILED {name}: sent {sent}, by formula {should}", soft_wrap=True)
    rows = [*measurements(tried, found, points), Measurement("differing", len(wrong), "layers", 0)]
    rows.append(Measurement("time", time.monotonic() - begin, "s"))
    console.print(f"written to {write_measurements(target, rows, options.root)}", soft_wrap=True)
    return 1 if wrong else 0


def measure(requested: Sequence[Layer], group: dist.ProcessGroup) -> list[Sums]:
    """What every rank sends of each layer, forward and back, in bytes."""
    return [_sent(layer, group) for layer in requested]


def differing(tried: Sequence[Layer], found: Sequence[Sums]) -> dict[str, tuple[Sums, Sums]]:
    """Layers whose ranks sent other bytes than by formula, with both."""
    pairs = [(layer, sent, expected(layer)) for layer, sent in zip(tried, found, strict=True)]
    return {
        f"{x.name} at {x.tokens}": (sent, should) for x, sent, should in pairs if sent != should
    }


def measured_points(tried: Sequence[Layer], found: Sequence[Sums]) -> pd.DataFrame:
    """The most bytes that a rank sent of each layer, forward and back, against the length."""
    return pd.DataFrame(
        {"panel": "measured", "line": layer.name, "x": layer.tokens, "y": most_sent(sent)}
        for layer, sent in zip(tried, found, strict=True)
    )


def most_sent(sums: Sums) -> int:
    """The most bytes that a rank sent for a layer itself."""
    own = [sent for what, sent in sums.items() if what not in ONCE]
    return max(sum(each) for each in zip(*own, strict=True))


def at_published_size() -> pd.DataFrame:
    """Bytes of a rank, one way and one row, against the length, by formula."""
    lines = {f"states, {scheme}": _states(scheme) for scheme in Scheme}
    rows = []
    for tokens in TOKENS:
        share, sizes = tokens // LARGE_RANKS, (INNER, 1, STATE, HEADS)
        lines["all-to-all over heads"] = wire.heads_swapped(LARGE_RANKS, share, sizes, BFLOAT16)
        lines["ring attention"] = wire.keys_turned_around(LARGE_RANKS, share, WIDTH, BFLOAT16)
        rows += [{"panel": "size", "line": k, "x": tokens, "y": v} for k, v in lines.items()]
    return pd.DataFrame(rows)


def simulate(sizes: Sequence[int]) -> pd.DataFrame:
    """Bytes of the busiest rank, rounds and time of each scheme on so many ranks."""
    state = Payload(4 * INNER * STATE, 4 * HEADS)
    rows = []
    for ranks in sizes:
        chosen = choose(ranks, state, ASSUMED)
        for scheme in Scheme:
            there, back = (
                prefix_messages.messages(scheme, ranks, prefix_messages.Sizes(*state), back=back)
                for back in (False, True)
            )
            out = Counter()
            for message in (m for each in there + back for m in each):
                out[message.sender] += message.bytes
            seconds = prefix_messages.seconds(there + back, *ASSUMED)
            row = {"panel": "time", "line": scheme.value, "x": ranks, "y": seconds}
            row |= {"bytes": max(out.values()), "rounds": len(there + back)}
            rows.append(row | {"chosen": scheme is chosen})
    return pd.DataFrame(rows)


def measurements(
    tried: Sequence[Layer], found: Sequence[Sums], points: pd.DataFrame
) -> Iterator[Measurement]:
    """The rows of the report."""
    for layer, sent in zip(tried, found, strict=True):
        name = f"{layer.name} at {layer.tokens} tokens"
        for what, each in sent.items():
            yield Measurement(f"{name}: {what}, all ranks", sum(each), "bytes")
        yield Measurement(f"{name}: most of a rank", most_sent(sent), "bytes")
        yield Measurement(f"{name}: off the formula", _off(sent, expected(layer)), "bytes", 0)
    for row in keep(points, points["panel"].isin(["instead", "size"])).to_dict("records"):
        size = "as measured" if row["panel"] == "instead" else f"width {WIDTH}"
        yield Measurement(f"{row['line']} at {row['x']} tokens, {size}", row["y"], "bytes")
    for row in keep(points, points["panel"] == "time").to_dict("records"):
        name = f"{row['line']} on {row['x']} ranks, simulated"
        yield Measurement(f"{name}: time", row["y"], "s")
        yield Measurement(f"{name}: most of a rank", row["bytes"], "bytes")
        yield Measurement(f"{name}: rounds", row["rounds"], "")


def _off(sent: Sums, should: Sums) -> int:
    """Bytes that ranks sent too many or too few."""
    nothing = [0] * RANKS
    return sum(
        abs(a - b)
        for what in {*sent, *should}
        for a, b in zip(sent.get(what, nothing), should.get(what, nothing), strict=True)
    )


def layer_table(
    tried: Sequence[Layer], found: Sequence[Sums], wrong: dict[str, tuple[Sums, Sums]]
) -> Table:
    """The most bytes that a rank sent of each layer, by length."""
    lengths = sorted({layer.tokens for layer in tried})
    title = f"bytes of a layer, forward and back, of the rank that sends most of {RANKS}"
    table = Table(title=f"{title}; {ROWS} rows, float32")
    table.add_column("layer", no_wrap=True)
    for tokens in lengths:
        table.add_column(f"{tokens} tokens", justify="right")
    table.add_column("formula", no_wrap=True)
    for name in dict.fromkeys(layer.name for layer in tried):
        these = [(x, sent) for x, sent in zip(tried, found, strict=True) if x.name == name]
        holds = not any(f"{x.name} at {x.tokens}" in wrong for x, _ in these)
        table.add_row(name, *(f"{most_sent(s):,}" for _, s in these), "equal" if holds else "OFF")
    for (line,), rows in groups(instead(tried), ["line"]):
        table.add_row(str(line), *(f"{each:,.0f}" for each in floats(rows, "y")), "alone")
    return table


def instead(tried: Sequence[Layer]) -> pd.DataFrame:
    """What a rank would send of the measured Mamba-2 and attention in the usual other ways.

    There and back: an all-to-all takes as much again for gradients; a ring of keys and values
    about twice as much, as their gradients go round with them.
    """
    rows = []
    for layer in tried:
        share = ROWS * layer.tokens // RANKS
        match layer.mixer:
            case Mamba2Config() if layer.scheme is Scheme.GATHER:
                E = layer.mixer.expand * layer.d_model
                sizes = (E, layer.mixer.n_groups, layer.mixer.d_state, E // layer.mixer.head_dim)
                y, line = 2 * wire.heads_swapped(RANKS, share, sizes, FLOAT), "all-to-all"
            case AttentionConfig():
                y = 3 * wire.keys_turned_around(RANKS, share, layer.d_model, FLOAT)
                line = "ring attention"
            case _:
                continue
        name = f"{layer.architecture}: {line} instead"
        rows.append({"panel": "instead", "line": name, "x": layer.tokens, "y": y})
    return pd.DataFrame(rows)


def rank_table(simulated: pd.DataFrame) -> Table:
    """Bytes, rounds and time of each scheme by ranks; the chosen one is starred."""
    title = "simulated, there and back: MB of the busiest rank / rounds / ms (* chosen)"
    table = Table(title=f"{title}; a Mamba-2 of width {WIDTH}, one row")
    table.add_column("ranks", justify="right")
    for scheme in Scheme:
        table.add_column(scheme.value, justify="right")
    for (ranks,), rows in groups(simulated, ["x"]):
        cells = [
            f"{row['bytes'] / 1e6:,.1f} / {row['rounds']} / {row['y'] * 1e3:.2f}"
            + ("*" if row["chosen"] else " ")
            for row in rows.to_dict("records")
        ]
        table.add_row(str(ranks), *cells)
    return table


def _sent(layer: Layer, group: dist.ProcessGroup) -> Sums:
    patterns = mixer_class(layer.mixer.kind).patterns
    causal = Pattern.CAUSAL_SELF in patterns
    pattern = Pattern.CAUSAL_SELF if causal else Pattern.NONCAUSAL_SELF
    mixer = drawn(layer.mixer.build(Slot(layer.d_model, 2, pattern)), seed=0)
    T = layer.tokens // RANKS
    sequence = ShardedSequence(torch.zeros(ROWS, T, dtype=torch.int32), group, layer.scheme)
    mixer(torch.randn(ROWS, T, layer.d_model).requires_grad_(), sequence).sum().backward()
    mine: Counter[str] = Counter()
    for sent in sequence.ranks.sent:
        mine[sent.what] += sent.bytes
    everyones: list[dict[str, int]] = [{} for _ in range(RANKS)]
    dist.all_gather_object(everyones, dict(mine), group=group)
    names = sorted({what for each in everyones for what in each})
    sums = {what: [each.get(what, 0) for each in everyones] for what in names}
    return {what: sent for what, sent in sums.items() if any(sent)}


def _states(scheme: Scheme) -> float:
    return wire.states_sent(scheme, LARGE_RANKS, INNER, STATE, HEADS)


def _titles() -> dict[str, str]:
    link = f"{ASSUMED.latency * 1e6:.0f} us, {ASSUMED.bandwidth / 1e9:.0f} GB/s a rank (assumed)"
    return {
        "measured": f"measured: {RANKS} ranks, {ROWS} rows, width 12 to 16, float32",
        "size": f"by formula: {LARGE_RANKS} ranks, 1 row, width {WIDTH}, N {STATE}, bf16 tokens",
        "time": f"simulated: {link}",
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

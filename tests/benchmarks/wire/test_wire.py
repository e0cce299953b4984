"""The command that measures bytes on the wire, and the formulas that it holds them against."""

import json
from pathlib import Path

import pytest

from models.mixers.recurrent.mamba2 import Mamba2Config
from models.ranks.schemes import Scheme
from tests.benchmarks.wire import wire as command
from tests.benchmarks.wire.wire_formulas import RANKS, ROWS, Layer, expected, layers
from tests.oracles import wire

MEGABYTES = {
    # Tokens of a share, width, ranks: gathered, ring, doubling, all-to-all, ring attention; the
    # reference card's examples for heads of 64 channels, a state of 128 and one group, in bf16.
    (4096, 2048, 8): (14.7, 2.1, 6.3, 103, 235),
    (16_384, 2048, 8): (14.7, 2.1, 6.3, 413, 940),
    (32_768, 2560, 16): (39, 2.6, 10.5, 1200, 5033),
}


@pytest.mark.distributed
def test_what_is_measured_equals_the_formulas(tmp_path: Path) -> None:
    assert command.main(["--quick", "--root", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "reports" / "wire_quick.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["differing"]["holds"]
    for ending in ("csv", "png", "svg"):
        assert (tmp_path / "reports" / f"wire_quick.{ending}").stat().st_size > 0


def test_one_byte_more_is_a_difference() -> None:
    layer = layers((256,))[0]
    sent = expected(layer)
    assert not command.differing([layer], [sent])
    first = next(iter(sent))
    sent[first] = [sent[first][0] + 1, *sent[first][1:]]
    assert list(command.differing([layer], [sent])) == [f"{layer.name} at 256"]


def test_what_a_recurrence_should_send_does_not_depend_on_the_length() -> None:
    recurrent = [x for x in layers((256, 4096)) if x.scheme and x.mixer.kind != "hybrid"]
    assert len(recurrent) == 2 * len(Scheme) * 5
    for short, long in zip(recurrent[::2], recurrent[1::2], strict=True):
        assert command.most_sent(expected(short)) == command.most_sent(expected(long))


@pytest.mark.parametrize("shape", MEGABYTES)
def test_formulas_give_the_examples_of_the_reference_card(shape: tuple[int, int, int]) -> None:
    T, width, ranks = shape
    E, N, H = 2 * width, 128, 2 * width // 64
    found = [wire.states_sent(scheme, ranks, E, N, H) for scheme in Scheme]
    found.append(wire.heads_swapped(ranks, T, (E, 1, N, H), 2))
    found.append(wire.keys_turned_around(ranks, T, width, 2))
    assert [x / 1e6 for x in found] == pytest.approx(MEGABYTES[shape], rel=0.02)


def test_a_gathered_state_is_the_message_of_the_reference_card() -> None:
    config = Mamba2Config(d_state=16, head_dim=8)
    E, H = 2 * 32, 2 * 32 // 8
    sent = expected(Layer("some", config, 32, 256, Scheme.GATHER))["state"]
    assert sent == [(RANKS - 1) * ROWS * 4 * (E * 16 + H)] * RANKS

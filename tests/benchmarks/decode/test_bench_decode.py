"""The benchmark of decoding measures what it says; how fast anything is, is no matter here."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
import pytest
import torch

from analysis.benchmarks.decode import draw, ratios, summarise
from models.generate import Sampling, generate, next_logits
from tests.benchmarks.decode import bench_decode
from tests.benchmarks.decode.bench_decode import (
    COLUMNS,
    FULL,
    MIXERS,
    QUICK,
    DecodeBench,
    copy_cache,
    fresh_generation,
    fresh_logits,
    main,
    replay_lengths,
    small_backbone,
    some_text,
)

CONTEXTS = (64, 256, 1024)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made_up(hybrid: float, attention: tuple[float, ...], copied: float = 1e9) -> pd.DataFrame:
    """Three rounds, each twice as fast as the one before, of made-up speeds by context."""
    speeds = {}
    for context, speed in zip(CONTEXTS, attention, strict=True):
        speeds["step", "hybrid", "cached", context] = hybrid
        speeds["step", "attention", "cached", context] = speed
        speeds["step", "hybrid", "uncached", context] = hybrid / context
        speeds["step", "attention", "copying its cache alone", context] = copied
    speeds["generation", "hybrid", "cached", 107] = 100.0
    speeds["generation", "hybrid", "uncached", 107] = 50.0
    speeds["generation", "hybrid", "replayed", 107] = 2.0
    speeds["generation", "attention", "cached", 107] = 400.0
    rows = [
        dict(zip(COLUMNS, (*key, round_, speed * 2**round_, 1000), strict=True))
        for round_ in range(3)
        for key, speed in speeds.items()
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("name", MIXERS)
def test_a_step_with_a_cache_and_a_pass_without_one_give_the_same_logits(name: str) -> None:
    backbone, text = small_backbone(MIXERS[name]), some_text(150)
    _, state = next_logits(backbone, text[:, :-1], None)
    cached, fresh = next_logits(backbone, text[:, -1:], state)[0], fresh_logits(backbone, text)
    assert (cached - fresh).abs().max() < 1e-5 * fresh.abs().max()


@pytest.mark.parametrize("name", MIXERS)
def test_both_ways_to_generate_give_the_same_tokens(name: str) -> None:
    backbone, prompt = small_backbone(MIXERS[name]), some_text(7)
    pieces = generate(backbone, prompt, 12, Sampling(temperature=0.0))
    cached = torch.stack([piece.tokens for piece in pieces], dim=1)
    assert torch.equal(fresh_generation(backbone, prompt, 12)[:, 7:], cached)


def test_what_is_copied_is_all_of_the_cache_and_a_token_more() -> None:
    backbone, text = small_backbone(MIXERS["attention"]), some_text(9)
    before, after = (next_logits(backbone, text[:, :n], None)[1] for n in (8, 9))
    copied = sum(each.numel() * each.element_size() for each in copy_cache(before))
    assert copied == after.bytes()


def test_replayed_texts_are_as_long_on_average_as_those_of_the_generation() -> None:
    lengths = list(replay_lengths(FULL))
    generated = range(FULL.prompt, FULL.prompt + FULL.tokens)
    assert sum(lengths) / len(lengths) == pytest.approx(sum(generated) / FULL.tokens, abs=1)


def test_without_a_cache_no_context_is_begun_at_which_a_token_would_take_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_decode, "TOKEN_SECONDS", 0.0)
    bench = DecodeBench(replace(QUICK, tokens=1, generations=1), lambda _: None)
    bench.run()
    steps = [row for row in bench.rounds if row["kind"] == "step"]
    contexts = {mode: {row["context"] for row in steps if row["mode"] == mode} for mode in
                ("cached", "uncached")}  # fmt: skip
    assert contexts == {"cached": set(QUICK.contexts), "uncached": {QUICK.contexts[0]}}


def test_ratios_are_taken_within_rounds() -> None:
    rows = ratios(made_up(100.0, (400.0, 100.0, 50.0))).to_dict("records")
    found = {
        row["context"]: row["ratio"]
        for row in rows
        if row["kind"] == "step" and row["lower"] == "attention cached"
    }
    assert found == {64: 0.25, 256: 1.0, 1024: 2.0}
    assert all(row["low"] == row["high"] for row in rows)


def test_a_cache_that_is_not_copied_is_reckoned_by_taking_the_copies_off_the_time() -> None:
    rows = ratios(made_up(100.0, (50.0, 50.0, 50.0), copied=200.0)).to_dict("records")
    spared = [row["ratio"] for row in rows if row["lower"] == "attention cached less its copying"]
    assert spared == pytest.approx([100.0 * (1 / 50 - 1 / 200)] * 3)


def test_a_contender_has_its_median_over_rounds() -> None:
    data = summarise(made_up(100.0, (1.0, 1.0, 1.0)))
    row = data[(data["model"] == "hybrid") & (data["mode"] == "cached")].iloc[0]
    assert (row["low"], row["tokens_per_second"], row["high"]) == (150.0, 200.0, 300.0)


def test_the_figure_draws_every_contender_that_was_measured() -> None:
    plate = draw(made_up(100.0, (400.0, 100.0, 50.0)), "decode")
    written = {text.get_text() for text in plate.figure.axes[0].texts}
    assert written == {"hybrid, cached", "hybrid, no cache", "attention, cached"}


def test_the_quick_form_writes_finite_figures_their_circumstances_and_the_figure(tmp_path) -> None:
    assert main(["--quick", "--root", str(tmp_path)]) == 0
    reports = tmp_path / "reports"
    stored = json.loads((reports / "decode_quick.json").read_text())
    figures = {row["name"]: row["value"] for row in stored["rows"]}
    assert len(figures) == len(stored["rows"])
    assert all(math.isfinite(value) for value in figures.values())
    assert all(row["bound"] is None for row in stored["rows"])
    for context in QUICK.contexts:
        expected = {f"step, {m} {how}, context {context}" for m in MIXERS
                    for how in ("cached", "uncached")}  # fmt: skip
        assert expected <= set(figures)
        assert figures[f"step, hybrid, context {context}: difference of logits, "
                       "cached and uncached"] < 1e-5  # fmt: skip
    assert "random weights" in stored["circumstances"]
    assert {path.suffix for path in reports.iterdir()} == {".json", ".csv", ".png", ".svg"}

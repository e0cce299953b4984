"""Maximal-update parametrisation: the standard one at its base, and the same at all widths.

The oracle of the rate multipliers is that of the authors' package: the shapes of the same model at
two widths.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from models.backbone import Backbone, build_backbone, multipliers
from models.channel import SwiGLUConfig
from models.mixer import MixerConfig, Slot
from models.mixers.composed.hybrid import HybridConfig
from models.mixers.recurrent.mamba import MambaConfig
from models.mixers.softmax.attention import AttentionConfig
from models.mixers.softmax.window import WindowConfig
from models.mup import MupConfig, at_width
from models.parts.layers import Linear
from models.sequences.whole import WholeSequence
from sweeps.architecture import read_architectures
from tests.models.coordinates import (
    HEADS,
    LENGTH,
    MUP,
    WIDTHS,
    changes_by_width,
    model_at,
    run_of,
    slopes,
)
from tests.trainer.conftest import PLAIN
from trainer.config import RunConfig
from trainer.optimizer import build_optimizer
from trainer.schema import ConfigError, dump, load, merge

NAMES = sorted(read_architectures())
BASE, WIDE = WIDTHS[0], 4 * WIDTHS[0]
SEEDS = (0, 1)
LOOKED_UP = ("embedding.weight", "places.weight", "filter.features")
"""Tables of vectors: a row is chosen, not multiplied with, so its length is no fan in."""


def shapes(name: str, width: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        backbone = Backbone(model_at(name, width, None))
    return {name: weight.shape for name, weight in backbone.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_multipliers_are_those_of_the_shapes_at_two_widths(name: str) -> None:
    narrow, wide = shapes(name, BASE), shapes(name, WIDE)
    with torch.device("meta"):
        found = multipliers(Backbone(model_at(name, WIDE, MUP)))
    assert set(found) == set(wide)
    for parameter, shape in wide.items():
        inputs = -2 if parameter.endswith("out_weight") else -1
        grows = len(shape) > 1 and not parameter.endswith(LOOKED_UP)
        wanted = narrow[parameter][inputs] / shape[inputs] if grows else 1.0
        # Inner widths are rounded to 4 channels.
        assert found[parameter] == pytest.approx(wanted, rel=0.03), parameter


@pytest.mark.parametrize("name", NAMES)
def test_at_the_base_width_nothing_differs_by_a_bit(name: str) -> None:
    weights = []
    for mup in (None, MUP):
        config = model_at(name, BASE, mup)
        backbone = build_backbone(config, 0)
        tokens = torch.arange(LENGTH)[None] % 7
        logits = backbone.head(backbone(tokens, WholeSequence(torch.zeros_like(tokens))))
        logits.logsumexp(-1).sum().backward()
        optimizer = build_optimizer(backbone, run_of(config))
        assert {group["rate_multiplier"] for group in optimizer.param_groups} == {1.0}
        optimizer.step()
        weights.append({"logits": logits, **dict(backbone.named_parameters())})
    standard, mup_weights = weights
    assert standard.keys() == mup_weights.keys()
    for key, value in standard.items():
        assert torch.equal(value, mup_weights[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_activations_change_by_the_same_amount_at_all_widths(name: str) -> None:
    found = slopes(changes_by_width(name, MUP, SEEDS))
    assert len(found) > 2
    assert all(abs(slope) < 0.3 for slope in found.values()), found


@pytest.mark.parametrize("name", NAMES)
def test_under_the_standard_parametrisation_changes_grow_with_the_width(name: str) -> None:
    widths = (WIDTHS[0], WIDTHS[2])
    found = slopes(changes_by_width(name, None, SEEDS[:1], widths), widths)
    hidden = [slope for place, slope in found.items() if place != "logits"]
    assert found["logits"] > 0.4, found
    assert np.mean(hidden) > 0.15, found


def test_without_the_rates_of_the_table_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.backbone.rate_multipliers", lambda model, *_: _ones(model))
    found = slopes(changes_by_width("transformer", MUP, SEEDS))
    assert max(found.values()) > 0.3, found


def _ones(model: nn.Module) -> dict[str, float]:
    return {name: 1.0 for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "config",
    [AttentionConfig(2), AttentionConfig(2, qk_norm=False), WindowConfig(2, window=LENGTH)],
    ids=["attention", "attention without norms", "window"],
)
def test_scores_fall_with_head_dim_not_with_its_root(config: MixerConfig) -> None:
    config = replace(config, initial_std=0.3)
    torch.manual_seed(0)
    plain, scaled = (config.build(Slot(WIDE, mup=mup)) for mup in (None, MUP))
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    scaled.load_state_dict(plain.state_dict())
    x, documents = torch.randn(1, 12, WIDE), torch.zeros(1, 12, dtype=torch.int32)
    sequence = WholeSequence(documents)
    _, coefficients = plain.project(x, sequence)
    queries, keys = coefficients[0].double()[0], coefficients[1].double()[0]
    P, base = WIDE // HEADS, BASE // HEADS
    scores = torch.einsum("lhp,shp->hls", queries, keys) * base**0.5 / P
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    wanted = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    found = scaled.materialize(x, sequence)[0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_divided_by_the_width(tied: bool) -> None:
    config = replace(model_at("transformer", WIDE, MUP), tied=tied)
    backbone = build_backbone(config, 0)
    table = backbone.embedding if tied else backbone.unembedding
    hidden = torch.randn(3, WIDE)
    wanted = hidden.double() @ table.weight.double().T / 4
    torch.testing.assert_close(backbone.head(hidden).double(), wanted, rtol=1e-4, atol=1e-6)
    assert table.weight.std().item() == pytest.approx(config.embedding_std, rel=0.05)


def test_a_given_initial_std_falls_with_the_root_of_the_width() -> None:
    mup = MupConfig(BASE)
    for part in (AttentionConfig(2), SwiGLUConfig(8), HybridConfig(2, 8)):
        assert part.initial_std is not None
        assert at_width(part, mup, WIDE).initial_std == pytest.approx(part.initial_std / 2)
        assert at_width(part, mup, BASE) == part
    assert at_width(MambaConfig(), mup, WIDE) == MambaConfig()
    unscaled = AttentionConfig(2, initial_std=None)
    assert at_width(unscaled, mup, WIDE) == unscaled


def test_a_rank_of_its_own_gives_dt_proj_a_constant_rate() -> None:
    found = {}
    for rank in (None, 2):
        mixer = MambaConfig(dt_rank=rank).build(Slot(WIDE))
        dt_proj = mixer.get_submodule("dt_proj")
        assert isinstance(dt_proj, Linear)
        found[rank] = "weight" in dt_proj.fan_in
    assert found == {None: True, 2: False}


def test_rate_times_weight_decay_is_the_same_for_all_decayed_weights() -> None:
    config = model_at("hybrid", WIDE, MUP)
    groups = build_optimizer(build_backbone(config, 0), run_of(config)).param_groups
    factors = [(g["rate_multiplier"], g["weight_decay"]) for g in groups]
    assert {factor for factor, _ in factors} == {0.25, 1.0}
    assert {factor * decay for factor, decay in factors} == {0.0, 0.1}


def test_heads_of_one_width_keep_scores_and_gates() -> None:
    mup = MupConfig(BASE)
    queries = torch.randn(1, 2, HEADS, 16)
    assert Slot(WIDE, mup=mup).scaled(queries) is queries
    config = replace(model_at("hybrid", WIDE, MUP), mup=mup)
    with torch.device("meta"):
        found = multipliers(Backbone(config))
    assert found["layers.0.mixer.candidate.weight"] == 1.0
    assert found["layers.0.mixer.qkv.weight"] == 0.25


def test_muon_is_refused() -> None:
    mup = {"model": {"mup": {"base_width": 8}}}
    load(RunConfig, merge(PLAIN, mup))
    with pytest.raises(ConfigError, match="muon, whose updates are not AdamW's"):
        load(RunConfig, merge(PLAIN, {**mup, "optimizer": {"kind": "muon"}}))


@pytest.mark.parametrize("field", ["base_width", "base_head_dim"])
def test_a_base_without_a_size_is_refused(field: str) -> None:
    mup = {"base_width": 8, field: 0}
    with pytest.raises(ConfigError, match=f"mup.{field} 0 is outside"):
        load(RunConfig, merge(PLAIN, {"model": {"mup": mup}}))


def test_all_widths_share_the_sizes_of_the_base() -> None:
    wide = dump(model_at("mamba2", 512, MUP))["blocks"]["m"]["mixer"]
    base = dump(model_at("mamba2", BASE, MUP))["blocks"]["m"]["mixer"]
    assert wide == base
    assert dump(model_at("mamba2", 512, None))["blocks"]["m"]["mixer"] != base

"""Swaps: the same weights under another mixer, and nothing but the same weights."""

import copy

import pytest
import torch

from data_pipelines.batch import Batch
from models.backbone import BackboneConfig, build_backbone
from models.mixers.softmax.hip import HipConfig
from tests.trainer.conftest import PLAIN
from trainer.schema import ConfigError, load
from trainer.swap import measure, swapped

LENGTH = 48


@pytest.fixture(scope="module")
def model() -> BackboneConfig:
    plain = copy.deepcopy(PLAIN["model"])
    plain["blocks"]["a"]["mixer"] |= {"initial_std": 0.5, "rope_theta": 500.0}
    return load(BackboneConfig, plain)


@pytest.fixture(scope="module")
def batch() -> Batch:
    tokens = torch.randint(0, 257, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    documents = torch.zeros(2, LENGTH, dtype=torch.long)
    return Batch(tokens[:, :-1], tokens[:, 1:], documents, torch.arange(2).numpy())


def under(model: BackboneConfig, **fields: object):
    """The same weights with HiP of some fields."""
    config = swapped(model, {"attention": {"kind": "hip", "n_sink": 1, "window": 2, **fields}})
    other = build_backbone(config, seed=99)
    other.load_state_dict(build_backbone(model, seed=5).state_dict(), strict=True)
    return other.eval()


@pytest.mark.parametrize("selection", ["row", "block"])
def test_a_swap_that_keeps_every_key_equals_dense(model, batch, selection) -> None:
    dense = measure(build_backbone(model, seed=5).eval(), batch)
    every = measure(under(model, k=LENGTH, selection=selection), batch)
    few = measure(under(model, k=4, selection=selection), batch)
    assert (every.nats - dense.nats).abs().max() < 1e-5
    assert (few.nats - dense.nats).abs().max() > 1e-3


def test_fields_that_a_swap_does_not_name_are_kept(model) -> None:
    mixer = swapped(model, {"attention": {"kind": "hip", "k": 4}}).layers()[0].mixer
    assert isinstance(mixer, HipConfig)
    assert (mixer.n_heads, mixer.initial_std, mixer.rope_theta) == (2, 0.5, 500.0)
    assert mixer.k == 4


def test_recall_is_one_where_every_key_is_kept_and_less_where_few_are(model, batch) -> None:
    every, few = (measure(under(model, k=k), batch).recall for k in (LENGTH, 4))
    assert every is not None
    assert few is not None
    assert bool((every == 1).all())
    assert bool((few[:, :4] == 1).all())
    assert 0 < float(few[:, 4:].mean()) < 0.95


def test_an_exact_judge_of_single_keys_finds_all_of_the_best(model, batch) -> None:
    fields = {"k": 4, "key_block": 1, "representative": "oracle"}
    recall = measure(under(model, **fields), batch).recall
    assert recall is not None
    assert float(recall.min()) == 1.0


def test_without_a_search_there_is_no_recall(model, batch) -> None:
    assert measure(build_backbone(model, seed=5), batch).recall is None


@pytest.mark.parametrize(
    ("swap", "message"),
    [
        ({"attention": {"kind": "hipp"}}, "unknown mixer kind 'hipp'; did you mean 'hip'"),
        ({"atention": {"kind": "hip"}}, "unknown mixer kind 'atention'"),
        ({"mamba": {"kind": "hip"}}, "the model's mixers are attention"),
        ({"attention": {"kind": "mamba"}}, "unknown key model.blocks.a.mixer.n_heads"),
        ({"attention": {"kind": "hip", "k": 3}}, "k 3 is not a multiple of key_block"),
    ],
)
def test_a_swap_that_cannot_be_is_one_clear_message(model, swap, message) -> None:
    with pytest.raises(ConfigError, match=message):
        swapped(model, swap)


def test_a_swap_for_other_parameters_does_not_load(model) -> None:
    other = swapped(model, {"attention": {"kind": "hip", "n_kv_heads": 1}})
    with pytest.raises(RuntimeError, match="size mismatch"):
        build_backbone(other, seed=0).load_state_dict(
            build_backbone(model, seed=5).state_dict(), strict=True
        )

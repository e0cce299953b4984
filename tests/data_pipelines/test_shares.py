"""What was asked of each domain is what is read, and what is read again is known before."""

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest
from streaming import Stream

from data_pipelines.build import build_dataset
from data_pipelines.manifest import read_manifest
from data_pipelines.notes import notes_of, repeat_notes
from data_pipelines.packing import key_document
from data_pipelines.shares import (
    Apportionment,
    apportion,
    expected_repeats,
    require_amounts,
    unique_blocks,
)
from data_pipelines.stream import TokenStream
from tests.data_pipelines.conftest import DOMAINS, corpus, dataset_config, silent, write_shards
from tests.oracles.packing import pack_documents


def draw_shares(draw):
    weights = [draw.choice([1, 1, 2, 5, 20, 100, 3000]) for _ in range(draw.randint(1, 12))]
    return [weight / sum(weights) for weight in weights]


def stock(shares, groups):
    """The counts that StreamingDataset gives to every epoch."""
    streams = [Stream(local="/nowhere", proportion=share) for share in shares]
    Stream.apply_weights(streams, np.full(len(shares), 10), groups, 17)
    return [int(stream.choose) for stream in streams]


def test_shares_below_a_block_an_epoch_are_given_in_time():
    """Of 6,400 blocks in 100 epochs: 128, 96, 64 and 44.8."""
    shares = [0.02, 0.015, 0.01, 0.007, 0.948]
    apportioned = Apportionment(shares, 64, stock(shares, 64))
    total = np.sum([apportioned[epoch] for epoch in range(100)], axis=0)
    assert total[:3].tolist() == [128, 96, 64]
    assert total[3] in (44, 45)
    assert total.sum() == 6400


@pytest.mark.parametrize("seed", range(40))
def test_every_domain_has_its_share_to_within_two_blocks_at_the_end_of_every_epoch(seed):
    draw = random.Random(seed)
    shares, groups = draw_shares(draw), draw.choice([1, 2, 7, 64, 96, 1000])
    apportioned, given = Apportionment(shares, groups, stock(shares, groups)), np.zeros(len(shares))
    for epoch in range(200):
        assert min(apportioned[epoch]) >= 0
        assert sum(apportioned[epoch]) == groups
        given += apportioned[epoch]
        asked = np.array(shares) * groups * (epoch + 1)
        assert np.abs(given - asked).max() < 2


@pytest.mark.parametrize(
    ("shares", "groups"), [([0.75, 0.25], 96), ([0.29, 0.71], 100), ([0.7, 0.15, 0.15], 20)]
)
def test_whole_numbers_of_blocks_are_given_exactly_in_every_epoch(shares, groups):
    apportioned = Apportionment(shares, groups, stock(shares, groups))
    for epoch in range(30):
        assert apportioned[epoch] == [round(share * groups) for share in shares]


def test_the_first_epoch_is_the_one_of_streaming_dataset():
    shares = [0.7, 0.15, 0.15]
    assert Apportionment(shares, 8192, stock(shares, 8192))[0] == stock(shares, 8192)


def test_a_first_epoch_that_is_off_by_a_block_is_not_kept():
    assert Apportionment([0.5, 0.5], 10, [6, 4])[0] == [5, 5]


def test_what_was_given_too_much_is_taken_back():
    assert apportion([Fraction(-1, 2), Fraction(-1, 2), Fraction(5)], 4) == [0, 0, 4]


def test_small_domains_are_read_as_asked_across_epochs(built_root):
    config = corpus(domains={"alpha": 0.96, "beta": 0.04}, epoch_blocks=16)
    stream = TokenStream(config, built_root, rank=0, ranks=1, batch_sequences=8, first_step=100)
    realised = stream.realised()
    assert realised["beta"].blocks == 32
    assert realised["alpha"].blocks == 768
    other = TokenStream(config, built_root, rank=0, ranks=1, batch_sequences=8, first_step=0)
    whole = list(itertools.islice(other, 30))
    later = TokenStream(config, built_root, rank=0, ranks=1, batch_sequences=8, first_step=21)
    assert [b.samples.tolist() for b in itertools.islice(later, 9)] == [
        b.samples.tolist() for b in whole[21:]
    ]


def test_a_share_of_less_than_a_block_of_the_run_is_refused():
    config = corpus(domains={"alpha": 0.999, "beta": 0.001})
    require_amounts(config, 64 * 1000)
    with pytest.raises(ValueError, match=r"domains\.beta is 0\.001 of the 999 blocks .* less than"):
        require_amounts(config, 64 * 999)


def test_less_unique_text_than_a_block_is_refused(built_root):
    manifest = read_manifest(built_root / "tiny")
    with pytest.raises(ValueError, match=r"unique_bytes 80 asks for 20 bytes of beta, less than a"):
        unique_blocks(corpus(unique_bytes=80), manifest, "beta")


@pytest.mark.parametrize("changes", [{}, {"epoch_blocks": 48}, {"seq_len": 192}])
@pytest.mark.parametrize("steps", [5, 100, 400])
def test_repeats_are_known_before_anything_is_read(built_root, changes, steps):
    shares = {"alpha": 0.1, "beta": 0.9}
    config = corpus(**{"domains": shares, "epoch_blocks": 960, **changes})
    stream = TokenStream(config, built_root, rank=0, ranks=1, batch_sequences=8, first_step=steps)
    manifest = read_manifest(built_root / "tiny")
    expected = expected_repeats(config, manifest, steps * 8 * config.seq_len)
    for domain, read in stream.realised().items():
        assert expected[domain].blocks == pytest.approx(read.blocks, rel=0.25, abs=12)
        times = read.blocks / read.unique_blocks
        assert expected[domain].times == pytest.approx(times, rel=0.15)
    if steps == 400:
        assert expected["beta"].times > 3


def bytes_of(manifest, domain):
    return sum(manifest.stream(domain, s).document_bytes for s in ("train", "validation"))


@pytest.mark.parametrize("length", [5_000, 300_000])
def test_one_long_document_does_not_cut_a_domain_short(tmp_path, length):
    texts = [*DOMAINS["alpha"], *("\u2192" * (length // 3 + i) for i in range(6))]
    config = dataset_config(write_shards(tmp_path / "s", {"alpha": texts}), domain_bytes=30_000)
    manifest = build_dataset(config, tmp_path, processes=1, report=silent)
    assert 0.99 * 30_000 - 3 < bytes_of(manifest, "alpha") <= 30_000


def test_a_domain_that_is_nearly_full_is_left_as_it_is(tmp_path):
    source = write_shards(tmp_path / "s", DOMAINS)
    config = dataset_config(source, domain_bytes=60_000)
    manifest = build_dataset(config, tmp_path, processes=1, report=silent)
    for domain in manifest.domains:
        assert 0.99 * 60_000 < bytes_of(manifest, domain) <= 60_000
        expected = pack_documents(
            DOMAINS[domain], seed=3, validation_fraction=0.1, block_tokens=64, domain_bytes=60_000
        )
        assert manifest.stream(domain, "train").blocks == len(expected["train"])


def test_long_documents_that_fall_to_validation_are_told(tmp_path):
    seed = next(s for s in range(99) if key_document(b"x" * 90_000, s).split(0.1) == "validation")
    texts = [*DOMAINS["alpha"], "x" * 90_000]
    config = dataset_config(write_shards(tmp_path / "s", {"alpha": texts}), seed=seed)
    (note,) = notes_of(build_dataset(config, tmp_path, processes=1, report=silent))
    assert "domain alpha holds out 6" in note or "domain alpha holds out 5" in note


def test_a_small_domain_at_a_large_share_is_told_to_repeat(built_root):
    manifest = read_manifest(built_root / "tiny")
    config = corpus(domains={"alpha": 0.1, "beta": 0.9}, epoch_blocks=9600)
    available = manifest.stream("beta", "train").blocks
    (note,) = repeat_notes(config, manifest, round(64 * 10 * available / 0.9))
    assert note.startswith("W-REPEAT: corpus mixed reads each block of beta 10.00 times")
    assert repeat_notes(config, manifest, 6400) == []

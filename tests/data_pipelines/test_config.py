import pytest

from data_pipelines.config import DatasetConfig, SourceConfig, TokenizerConfig
from tests.data_pipelines.conftest import corpus, dataset_config
from trainer.schema import dump, load


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"domains": {"alpha": 0.5}}, r"corpus\.domains sum to 0\.5"),
        ({"domains": {"alpha": 1.5, "beta": -0.5}}, r"corpus\.domains\.alpha is 1\.5"),
        ({"domains": {"alpha": float("nan")}}, r"corpus\.domains\.alpha is nan"),
        ({"domains": {"../x": 1.0}}, r"a key of corpus\.domains '\.\./x' cannot"),
        ({"domains": {}}, r"corpus\.domains sum to 0"),
        ({"dataset": "/etc"}, r"corpus\.dataset '/etc'"),
        ({"seq_len": 96}, r"corpus\.seq_len 96 does not divide .*, nor is it a multiple"),
        ({"seq_len": 320}, r"corpus\.seq_len 320 joins 5 blocks, .* epoch_blocks 96"),
        ({"seq_len": 48}, r"corpus\.seq_len 48 does not divide"),
        ({"seq_len": 0}, r"corpus\.seq_len 0 does not divide"),
        ({"epoch_blocks": 0}, r"corpus\.epoch_blocks 0"),
        ({"num_canonical_nodes": 5}, r"corpus\.num_canonical_nodes 5 does not divide"),
        ({"num_canonical_nodes": 0}, r"corpus\.num_canonical_nodes 0"),
        ({"unique_bytes": 0}, r"corpus\.unique_bytes 0"),
        ({"shuffle_seed": -1}, r"corpus\.shuffle_seed -1"),
    ],
)
def test_a_corpus_that_cannot_be_is_refused_by_key(changes, key):
    with pytest.raises(ValueError, match=key):
        corpus(**changes)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"name": "../x"}, r"dataset\.name"),
        ({"name": ""}, r"dataset\.name"),
        ({"block_tokens": 1}, r"dataset\.block_tokens 1"),
        ({"domain_bytes": 0}, r"dataset\.domain_bytes 0"),
        ({"validation_fraction": 0.0}, r"dataset\.validation_fraction 0\.0"),
        ({"validation_fraction": 1.0}, r"dataset\.validation_fraction 1\.0"),
        ({"seed": -1}, r"dataset\.seed -1"),
    ],
)
def test_a_dataset_that_cannot_be_is_refused_by_key(changes, key):
    with pytest.raises(ValueError, match=key):
        dataset_config("somewhere", **changes)


@pytest.mark.parametrize(
    ("kind", "path", "vocab_size", "key"),
    [
        ("words", None, None, r"tokenizer\.kind 'words'"),
        ("bytes", None, 300, r"tokenizer\.vocab_size is 300, but kind bytes"),
        ("bytes", "x.json", None, r"tokenizer\.path"),
        ("bpe", None, None, r"tokenizer\.vocab_size is None"),
        ("bpe", None, 257, r"tokenizer\.vocab_size is 257"),
        ("file", None, 500, r"tokenizer\.path"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused_by_key(kind, path, vocab_size, key):
    with pytest.raises(ValueError, match=key):
        TokenizerConfig(kind, path, vocab_size)


@pytest.mark.parametrize(("kind", "paths"), [("installed", ("x",)), ("jsonl", ()), ("web", ("x",))])
def test_a_source_that_cannot_be_is_refused_by_key(kind, paths):
    with pytest.raises(ValueError, match=r"source\.(kind|paths)"):
        SourceConfig(kind, paths)


def test_configs_survive_plain_data():
    tokenizer = TokenizerConfig("bpe", None, 400)
    config = dataset_config("shards", tokenizer=tokenizer)
    assert load(DatasetConfig, dump(config)) == config
    assert load(TokenizerConfig, {"kind": "bpe", "vocab_size": 400}) == tokenizer

import json

import numpy as np
import pytest

from data_pipelines.config import TokenizerConfig
from data_pipelines.tokenizers import (
    ByteTokenizer,
    SavedTokenizer,
    load_tokenizer,
    read_given_tokenizer,
    train_bpe,
    vocabulary_size,
)
from tests.data_pipelines.conftest import DOMAINS

TEXTS = [
    "",
    "plain",
    "na\u00efve \u2192 \u6f22\u5b57 \U0001f642",
    "  two  spaces\n\ttab",
    "<|endoftext|> in a text",
    "\x00\x7f",
    DOMAINS["alpha"][5],
]


@pytest.fixture(scope="module")
def saved():
    return train_bpe(iter(DOMAINS["alpha"]), 400)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back_from_their_tokens(saved, kind, text):
    tokenizer = ByteTokenizer() if kind == "bytes" else SavedTokenizer(saved)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.special not in ids
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    first, _ = tokenizer.encode_many([text, "a"])
    assert first.tolist() == ids.tolist()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_special_ids_stand_for_nothing(saved, kind):
    tokenizer = ByteTokenizer() if kind == "bytes" else SavedTokenizer(saved)
    ids = [tokenizer.special, *tokenizer.encode("text"), tokenizer.special]
    assert tokenizer.decode(ids) == "text"
    assert tokenizer.byte_lengths[tokenizer.special] == 0
    assert tokenizer.byte_lengths.shape == (tokenizer.size,)


def test_trained_tokens_are_fewer_than_bytes(saved):
    text = DOMAINS["alpha"][7]
    assert len(SavedTokenizer(saved).encode(text)) < 0.6 * len(text.encode())


def test_fingerprints_differ_with_the_merges(saved):
    other = SavedTokenizer(train_bpe(iter(DOMAINS["alpha"]), 390))
    again = SavedTokenizer(train_bpe(iter(DOMAINS["alpha"]), 400))
    assert SavedTokenizer(saved).fingerprint == again.fingerprint
    assert len({other.fingerprint, again.fingerprint, ByteTokenizer().fingerprint}) == 3


def test_a_saved_tokenizer_is_read_from_its_file(saved, tmp_path):
    file = tmp_path / "given.json"
    file.write_text(saved)
    config = TokenizerConfig("file", str(file), 400)
    (tmp_path / "tokenizer.json").write_text(read_given_tokenizer(config))
    loaded = load_tokenizer(config, tmp_path)
    assert loaded.fingerprint == SavedTokenizer(saved).fingerprint
    assert vocabulary_size(config) == loaded.size == 400
    assert vocabulary_size(TokenizerConfig()) == 257


def test_a_saved_tokenizer_of_another_size_is_refused(saved, tmp_path):
    file = tmp_path / "given.json"
    file.write_text(saved)
    with pytest.raises(
        ValueError, match=r"vocab_size is 500, but .*given\.json has 400 ids; set .* to 400"
    ):
        read_given_tokenizer(TokenizerConfig("file", str(file), 500))
    with pytest.raises(ValueError, match="does not exist"):
        read_given_tokenizer(TokenizerConfig("file", str(tmp_path / "none"), 500))
    with pytest.raises(RuntimeError, match=r"does not exist; .* build"):
        load_tokenizer(TokenizerConfig("bpe", None, 400), tmp_path)


def test_tokenizers_that_cannot_count_bytes_are_refused(saved):
    content = json.loads(saved)
    content["decoder"] = None
    with pytest.raises(ValueError, match="not byte-level BPE"):
        SavedTokenizer(json.dumps(content))
    content = json.loads(saved)
    content["added_tokens"][0]["content"] = "<|other|>"
    with pytest.raises(ValueError, match="none of which is known"):
        SavedTokenizer(json.dumps(content))


def test_ids_fit_numpy(saved):
    assert SavedTokenizer(saved).encode("text").dtype == np.uint32
    assert ByteTokenizer().encode("text").dtype == np.uint8

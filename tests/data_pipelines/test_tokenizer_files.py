"""Tokenizer files of others: those that change text, draw at random, or are none."""

import json

import numpy as np
import pytest
import tokenizers

from data_pipelines.build import build_dataset
from data_pipelines.config import TokenizerConfig
from data_pipelines.lossless import require_same_text
from data_pipelines.saved_tokenizer import SavedTokenizer
from data_pipelines.tokenizers import read_given_tokenizer, train_bpe
from tests.data_pipelines.conftest import DOMAINS, dataset_config, silent

SIZE = 300


@pytest.fixture(scope="module")
def plain():
    return json.loads(train_bpe(iter(DOMAINS["alpha"]), SIZE))


def write(tmp_path, content):
    file = tmp_path / "given.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def build(shards, tmp_path, content, lossy=False, size=SIZE, processes=1):
    kind = "lossy_file" if lossy else "file"
    tokenizer = TokenizerConfig(kind, str(write(tmp_path, content)), size)
    config = dataset_config(shards, tokenizer=tokenizer)
    return build_dataset(config, tmp_path / "root", processes=processes, report=silent)


def byte_level(**changes):
    given = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"type": "ByteLevel", **given, **changes}


def sequence(kind, *parts):
    return {"type": "Sequence", kind: list(parts)}


def added(content, i, **changes):
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized", "special"], False)
    return {"id": i, "content": content, **flags, **changes}


def split(pattern, behavior):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def upper(letter):
    return {"type": "Replace", "pattern": {"String": letter}, "content": letter.upper()}


def without_character(plain):
    """A model without the byte of a space, which it drops."""
    model, space = plain["model"], chr(0x120)
    vocab = [token for token in model["vocab"] if space not in token]
    kept = {token: place for place, token in enumerate(vocab)}
    merges = [pair for pair in model["merges"] if space not in "".join(pair)]
    special = {**plain["added_tokens"][0], "id": len(kept)}
    return {
        "model": {**model, "vocab": kept, "merges": merges},
        "added_tokens": [special],
    }


CHANGES = {
    "other case": lambda _: {"normalizer": upper("s")},
    "unicode form": lambda _: {"normalizer": {"type": "NFD"}},
    "stripped": lambda _: {
        "normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}
    },
    "replaced": lambda _: {
        "normalizer": {"type": "Replace", "pattern": {"String": "\n"}, "content": " "}
    },
    "prepended": lambda _: {"normalizer": {"type": "Prepend", "prepend": "_"}},
    "nested": lambda _: {"normalizer": sequence("normalizers", upper("s"))},
    "prefix space": lambda _: {"pre_tokenizer": byte_level(add_prefix_space=True)},
    "removed": lambda _: {
        "pre_tokenizer": sequence("pretokenizers", split({"String": " "}, "Removed"), byte_level())
    },
    "whitespace split": lambda _: {
        "pre_tokenizer": sequence("pretokenizers", {"type": "WhitespaceSplit"}, byte_level())
    },
    "not byte-level": lambda _: {"pre_tokenizer": None},
    "greedy token": lambda plain: {
        "added_tokens": [*plain["added_tokens"], added("the", SIZE, lstrip=True)]
    },
    "unknown character": without_character,
}


def size_of(content):
    return SavedTokenizer(json.dumps(content)).size


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_tokenizer_that_changes_the_text_is_refused_at_the_first_difference(
    shards, tmp_path, plain, change
):
    content = {**plain, **CHANGES[change](plain)}
    message = (
        r"changes the text of (alpha|beta)/(train|validation), document \d+ \(it begins .*\): "
        r"from byte \d+ on the text is .*, but its ids stand for .*lossy_file"
    )
    with pytest.raises(ValueError, match=message):
        build(shards, tmp_path, content, size=size_of(content))
    assert not (tmp_path / "root/tiny").exists()


@pytest.mark.parametrize(
    ("normalizer", "text", "message"),
    [
        ("Lowercase", "na\u00efve State", "byte 7 on .*'State', .*'state'"),
        ("NFKC", "5 \ufb01ve", "byte 2 on .* 'five'"),
        ("NFD", "na\u00efve", "byte 2 on "),
        ("StripAccents", "nai\u0308ve", "byte 3 on .* 've'"),
    ],
)
def test_the_first_byte_that_differs_is_named(plain, normalizer, text, message):
    tokenizer = SavedTokenizer(json.dumps({**plain, "normalizer": {"type": normalizer}}))
    with pytest.raises(ValueError, match=f"web, document 3 .* {message}"):
        require_same_text(text, tokenizer.bytes_of(tokenizer.encode(text)), "web, document 3")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_tokenizer_that_keeps_the_text_is_built_with(shards, tmp_path, plain, processes):
    manifest = build(shards, tmp_path, plain, processes=processes)
    assert manifest.vocab_size == SIZE
    for stream in manifest.streams:
        # All but the tail that fills no block.
        assert 0 <= stream.document_bytes - stream.utf8_bytes < 64 * 20


def test_a_tokenizer_that_may_change_the_text_must_be_called_so(shards, tmp_path, plain):
    content = {**plain, "normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}
    manifest = build(shards, tmp_path, content, lossy=True)
    assert manifest.config["tokenizer"]["kind"] == "lossy_file"


def test_bytes_of_ids_are_those_of_the_text(plain):
    tokenizer = SavedTokenizer(json.dumps(plain))
    text = "".join(map(chr, range(0x300))) + "\u6f22\U0001f642"
    ids = tokenizer.encode(text)
    assert tokenizer.bytes_of(ids) == text.encode()
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.bytes_of(np.array([tokenizer.special], np.uint32)) == b""


def in_model(plain, **changes):
    return {**plain, "model": {**plain["model"], **changes}}


@pytest.mark.parametrize("key", ["dropout", "alpha", "nbest_size"])
@pytest.mark.parametrize("value", [0.1, 1.0])
def test_a_tokenizer_that_draws_at_random_is_refused(tmp_path, plain, key, value):
    file = write(tmp_path, in_model(plain, **{key: value}))
    with pytest.raises(ValueError, match=rf"given\.json has model\.{key} .* at random.* null"):
        read_given_tokenizer(TokenizerConfig("file", str(file), SIZE))


def test_dropout_hidden_behind_a_repeated_key_is_refused(plain):
    text = json.dumps(plain)
    place = text.index('"dropout": null')
    for first, second in (("0.5", "null"), ("null", "0.5")):
        both = f'"dropout": {first}, "dropout": {second}'
        twice = text[:place] + both + text[place + len('"dropout": null') :]
        try:
            drawn = tokenizers.Tokenizer.from_str(twice).model.dropout
        except Exception:  # noqa: BLE001
            drawn = "refused"
        if drawn:
            with pytest.raises(ValueError, match=r"at random|cannot be loaded"):
                SavedTokenizer(twice)


@pytest.mark.parametrize("value", [None, 0.0])
def test_dropout_of_nothing_is_no_randomness(plain, value):
    assert SavedTokenizer(json.dumps(in_model(plain, dropout=value))).size == SIZE


def moved(plain, old, new):
    vocab = {t: new if i == old else i for t, i in plain["model"]["vocab"].items()}
    return in_model(plain, vocab=vocab)


WRONG = {
    "gap": (lambda p: moved(p, 280, 5000), r"280 has no token"),
    "huge id": (lambda p: moved(p, 280, 4_000_000_000), r"280 has no token"),
    "one id twice": (lambda p: moved(p, 280, 281), r"id 280 has no token|id 281 has two"),
    "empty": (lambda _: "", "is not JSON"),
    "not JSON": (lambda _: "{", "is not JSON"),
    "deep": (lambda _: "[" * 100_000, "is not JSON"),
    "deep in the model": (
        lambda p: json.dumps(p).replace('"dropout": null', '"x": ' + "[" * 500 + "]" * 500),
        "cannot be loaded",
    ),
    "list": (lambda _: "[]", "it has no model"),
    "number": (lambda _: "3", "it has no model"),
    "package.json": (lambda _: {"name": "x", "version": "1"}, "it has no model"),
    "config.json": (lambda _: {"model_type": "gpt2", "vocab_size": 50257}, "it has no model"),
    "vocab.json": (lambda p: p["model"]["vocab"], "it has no model"),
    "tokenizer_config.json": (lambda _: {"model": "gpt2"}, "it has no model"),
    "empty model": (lambda p: {**p, "model": {}}, "not byte-level BPE"),
    "WordPiece": (lambda p: in_model(p, type="WordPiece"), "not byte-level BPE"),
    "decoder as text": (lambda p: {**p, "decoder": "ByteLevel"}, "cannot be loaded"),
    "no vocab": (lambda p: {**p, "model": {"type": "BPE"}}, "cannot be loaded"),
    "merge of nothing": (lambda p: in_model(p, merges=[["zz", "yy"]]), "cannot be loaded"),
    "token without flags": (
        lambda p: {**p, "added_tokens": [{"id": 299, "content": "<s>"}]},
        r"cannot be loaded|special tokens",
    ),
    "added tokens as text": (lambda p: {**p, "added_tokens": "x"}, "cannot be loaded"),
    "no special token": (lambda p: {**p, "added_tokens": []}, r"none of which is known|vocab_size"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_file_as_tokenizer_is_named_with_its_fault(tmp_path, plain, name):
    make, message = WRONG[name]
    file = write(tmp_path, make(plain))
    with pytest.raises(ValueError, match=message) as raised:
        read_given_tokenizer(TokenizerConfig("file", str(file), SIZE))
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "binary", "too large"])
def test_what_is_no_text_file_is_named(tmp_path, monkeypatch, kind):
    file = tmp_path / "given.json"
    if kind == "folder":
        file.mkdir()
    elif kind != "missing":
        file.write_bytes(b"\xff\xfe\x00" * 100)
    if kind == "too large":
        monkeypatch.setattr("data_pipelines.saved_tokenizer.MAX_FILE_BYTES", 10)
    with pytest.raises(ValueError, match=rf"{file} (does not exist|is not UTF-8|has 300 bytes)"):
        read_given_tokenizer(TokenizerConfig("file", str(file), SIZE))


def test_a_wrong_tokenizer_is_refused_before_documents_are_read(tmp_path):
    stages = []
    tokenizer = TokenizerConfig("file", str(write(tmp_path, "{}")), SIZE)
    config = dataset_config(tmp_path / "none", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="it has no model"):
        build_dataset(config, tmp_path, processes=1, report=lambda s, _: stages.append(s))
    assert not stages


def test_another_tokenizer_does_not_go_on_with_a_build_begun_before(shards, tmp_path, plain):
    changed = {**plain, "normalizer": {"type": "Prepend", "prepend": "_"}}
    with pytest.raises(ValueError, match="changes the text"):
        build(shards, tmp_path, changed)
    assert build(shards, tmp_path, plain).vocab_size == SIZE

"""Text to token ids and back: bytes, and byte-level BPE, behind one interface."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers as library

from data_pipelines.config import TokenizerConfig

SAVED = "tokenizer.json"
"""Name of a trained tokenizer inside its dataset."""
SPECIAL_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<s>")
"""Special tokens of saved tokenizers that may open and close documents, in this order."""


class Tokenizer(Protocol):
    """What every tokenizer offers.

    Attributes:
        size: number of ids.
        special: the id that opens and closes every document; no text encodes to it.
        fingerprint: hash that differs when two tokenizers may encode a text differently.
        byte_lengths: UTF-8 bytes that each id stands for (size,), 0 for special ones.
    """

    size: int
    special: int
    fingerprint: str
    byte_lengths: np.ndarray

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, without the special one."""
        ...

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of several texts."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text that ids stand for; special ids stand for nothing."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 opens and closes documents."""

    size = 257
    special = 256

    def __init__(self) -> None:
        self.fingerprint = hashlib.sha256(b"bytes, special 256").hexdigest()
        self.byte_lengths = np.array([1] * 256 + [0], dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        """The bytes of a text."""
        return np.frombuffer(text.encode(), np.uint8)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The bytes of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of bytes; broken UTF-8 shows as replacement characters."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class SavedTokenizer:
    """A byte-level BPE from a tokenizers JSON.

    Raises:
        ValueError: the JSON is no byte-level BPE, or has no special token that is known.
    """

    def __init__(self, saved: str) -> None:
        self._library = library.Tokenizer.from_str(saved)
        self._library.encode_special_tokens = True
        self._library.no_truncation()
        self._library.no_padding()
        content = json.loads(saved)
        self.size = self._library.get_vocab_size(with_added_tokens=True)
        self._specials = {
            token["id"]: token["content"]
            for token in content.get("added_tokens", [])
            if token["special"]
        }
        self.special = _choose_special(self._specials)
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.byte_lengths = self._measure(content)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text; the names of special tokens in it are ordinary text."""
        return np.array(self._library.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of several texts, encoded by the library's own threads."""
        encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.uint32) for e in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text that ids stand for."""
        plain = [int(i) for i in ids if int(i) not in self._specials]
        return self._library.decode(plain, skip_special_tokens=False)

    def _measure(self, content: dict) -> np.ndarray:
        decoder = content.get("decoder") or {}
        if content["model"].get("type") != "BPE" or decoder.get("type") != "ByteLevel":
            raise ValueError(
                f"tokenizer model {content['model'].get('type')} with decoder "
                f"{decoder.get('type')} is not byte-level BPE; save one that is"
            )
        added = {token["id"]: token["content"] for token in content.get("added_tokens", [])}
        lengths = np.zeros(self.size, np.int64)
        for token, i in self._library.get_vocab(with_added_tokens=True).items():
            # In byte-level BPE each character of a token stands for one byte.
            lengths[i] = len(added[i].encode()) if i in added else len(token)
        lengths[list(self._specials)] = 0
        return lengths


def vocabulary_size(config: TokenizerConfig) -> int:
    """Number of ids, without loading anything."""
    return ByteTokenizer.size if config.vocab_size is None else config.vocab_size


def load_tokenizer(config: TokenizerConfig, folder: Path) -> Tokenizer:
    """The tokenizer of a dataset.

    Args:
        config: as the dataset was built with.
        folder: where the dataset lies, with the tokenizer that was trained on it or copied to it.

    Raises:
        RuntimeError: the saved tokenizer is missing or has another size.
    """
    if config.kind == "bytes":
        return ByteTokenizer()
    file = folder / SAVED
    if not file.is_file():
        raise RuntimeError(f"{file} does not exist; build the dataset again")
    return _sized(SavedTokenizer(file.read_text()), config, file)


def read_given_tokenizer(config: TokenizerConfig) -> str:
    """The JSON of a tokenizer of kind `file`.

    Raises:
        ValueError: it is not there, or its size is not the one configured.
    """
    file = Path(str(config.path))
    if not file.is_file():
        raise ValueError(f"tokenizer.path {file} does not exist; give the JSON file of a tokenizer")
    text = file.read_text()
    try:
        _sized(SavedTokenizer(text), config, file)
    except RuntimeError as error:
        raise ValueError(f"tokenizer.vocab_size: {error}") from error
    return text


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Train byte-level BPE with `vocab_size` ids, the last one special; returns its JSON."""
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = library.decoders.ByteLevel()  # type: ignore[assignment]
    trainer = library.trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=vocab_size - 1,
        show_progress=False,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([SPECIAL_NAMES[0]])
    return tokenizer.to_str(pretty=True)


def _sized(tokenizer: SavedTokenizer, config: TokenizerConfig, file: Path) -> SavedTokenizer:
    if tokenizer.size != config.vocab_size:
        raise RuntimeError(
            f"{file} has {tokenizer.size} ids, but the config says {config.vocab_size}; "
            f"set tokenizer.vocab_size to {tokenizer.size}, or train on more text"
        )
    return tokenizer


def _choose_special(specials: dict[int, str]) -> int:
    for name in SPECIAL_NAMES:
        for i, content in specials.items():
            if content == name:
                return i
    raise ValueError(
        f"tokenizer has the special tokens {sorted(specials.values())}, none of which is known "
        f"to separate documents; add one of {', '.join(SPECIAL_NAMES)}"
    )

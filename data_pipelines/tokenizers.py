"""Text to token ids and back: bytes, and byte-level BPE, behind one interface."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers as library

from data_pipelines.config import TokenizerConfig
from data_pipelines.saved_tokenizer import SPECIAL_NAMES, SavedTokenizer, read_tokenizer_file

SAVED = "tokenizer.json"
"""Name of a trained tokenizer inside its dataset."""


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

    def bytes_of(self, ids: np.ndarray) -> bytes:
        """The UTF-8 bytes that ids stand for; special ids stand for nothing."""
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

    def bytes_of(self, ids: np.ndarray) -> bytes:
        """The bytes that ids stand for."""
        return ids[ids < 256].astype(np.uint8).tobytes()


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
    try:
        return _sized(read_tokenizer_file(file), config, file)
    except ValueError as error:
        raise RuntimeError(f"{error}; or build the dataset again") from error


def read_given_tokenizer(config: TokenizerConfig) -> str:
    """The JSON of a tokenizer of kind `file` or `lossy_file`.

    Raises:
        ValueError: it is not there, cannot be used, or its size is not the one configured.
    """
    file = Path(str(config.path))
    text = read_tokenizer_file(file)
    _sized(text, config, file)
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


def _sized(saved: str, config: TokenizerConfig, file: Path) -> SavedTokenizer:
    tokenizer = SavedTokenizer(saved, file)
    if tokenizer.size != config.vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size is {config.vocab_size}, but {file} has {tokenizer.size} ids; "
            f"set tokenizer.vocab_size to {tokenizer.size}, or train on more text"
        )
    return tokenizer

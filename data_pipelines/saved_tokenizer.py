"""Byte-level BPE from a tokenizers JSON, whoever wrote it: what the file may hold, and its use."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers as library

MAX_FILE_BYTES = 256 << 20
"""Largest tokenizer file that is read; published ones have up to 35 MB."""
SPECIAL_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<s>")
"""Special tokens of saved tokenizers that may open and close documents, in this order."""
RANDOM_KEYS = ("dropout", "alpha", "nbest_size")
"""Keys of a model that draw at random how a text is cut."""


class SavedTokenizer:
    """A byte-level BPE from a tokenizers JSON.

    Args:
        saved: the JSON.
        file: where it is from, for messages.

    Raises:
        ValueError: it is no byte-level BPE, cuts text at random, leaves ids without a token, or has
            no special token that is known.
    """

    def __init__(self, saved: str, file: Path | str = "given") -> None:
        content = _read_json(saved, file)
        self._library = _read_library(saved, content, file)
        self._library.encode_special_tokens = True
        self._library.no_truncation()
        self._library.no_padding()
        tokens = self._library.get_vocab(with_added_tokens=True)
        self.size = len(tokens)
        _require_all_ids(tokens, file)
        added = self._library.get_added_tokens_decoder()
        self._specials = {i: token.content for i, token in added.items() if token.special}
        self.special = _choose_special(self._specials, file)
        self.fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        contents = {i: token.content for i, token in added.items()}
        self._pieces = self._find_pieces(tokens, contents)
        self.byte_lengths = np.array([len(piece) for piece in self._pieces], np.int64)

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

    def bytes_of(self, ids: np.ndarray) -> bytes:
        """The UTF-8 bytes that ids stand for; special ids stand for nothing."""
        return b"".join(map(self._pieces.__getitem__, ids.tolist()))

    def _find_pieces(self, tokens: dict[str, int], added: dict[int, str]) -> list[bytes]:
        byte_of = _byte_alphabet()
        pieces = [b""] * self.size
        for token, i in tokens.items():
            if i in self._specials:
                continue
            if i in added:
                pieces[i] = added[i].encode()
            elif all(character in byte_of for character in token):
                pieces[i] = bytes(byte_of[character] for character in token)
            else:
                pieces[i] = token.encode()
        return pieces


def read_tokenizer_file(file: Path) -> str:
    """The text of a tokenizer file, its size checked before it is read.

    Raises:
        ValueError: it is missing, too large or not UTF-8.
    """
    if not file.is_file():
        raise ValueError(f"tokenizer file {file} does not exist; {_GIVE}")
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(
            f"tokenizer file {file} has {size} bytes, more than the {MAX_FILE_BYTES} that are read;"
            f" {_GIVE}"
        )
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"tokenizer file {file} is not UTF-8: {error}; {_GIVE}") from error


_GIVE = "give the tokenizer.json of a byte-level BPE, as the tokenizers library saves it"


def _read_json(saved: str, file: Path | str) -> dict:
    """The JSON as plain data, with the parts that are looked at here of the right type."""
    try:
        content = json.loads(saved)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tokenizer file {file} is not JSON: {error}; {_GIVE}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(
            f"tokenizer file {file} is JSON, but no tokenizer: it has no model; {_GIVE}"
        )
    model, decoder = content["model"], content.get("decoder")
    decoded = decoder.get("type") if isinstance(decoder, dict) else decoder
    if model.get("type") != "BPE" or decoded != "ByteLevel":
        raise ValueError(
            f"tokenizer file {file} has model {model.get('type')} with decoder {decoded}, which is "
            f"not byte-level BPE; {_GIVE}"
        )
    return content


def _read_library(saved: str, content: dict, file: Path | str) -> library.Tokenizer:
    """The library's tokenizer, without randomness."""
    try:
        tokenizer = library.Tokenizer.from_str(saved)
    except (KeyboardInterrupt, SystemExit):
        raise
    # The library raises plain Exception, and BaseException where its Rust code panics.
    except BaseException as error:
        raise ValueError(
            f"tokenizer file {file} cannot be loaded by tokenizers {library.__version__}: {error}; "
            f"{_GIVE}"
        ) from error
    drawn = {key: content["model"].get(key) for key in RANDOM_KEYS}
    # The file may repeat a key, of which the library takes another one than json does.
    drawn["dropout"] = drawn["dropout"] or getattr(tokenizer.model, "dropout", None)
    for key, value in drawn.items():
        if value:
            raise ValueError(
                f"tokenizer file {file} has model.{key} {value}, so it cuts text at random, "
                f"outside every seed; set model.{key} to null"
            )
    return tokenizer


def _require_all_ids(tokens: dict[str, int], file: Path | str) -> None:
    """Check that ids count from 0 without a gap, before anything is sized by the largest."""
    found = sorted(tokens.values())
    for expected, i in enumerate(found):
        if i != expected:
            wrong = f"id {expected} has no token" if i > expected else f"id {i} has two tokens"
            raise ValueError(
                f"tokenizer file {file} has {len(found)} tokens with ids up to {found[-1]}, but "
                f"{wrong}; number its tokens from 0 without a gap"
            )


def _choose_special(specials: dict[int, str], file: Path | str) -> int:
    for name in SPECIAL_NAMES:
        for i, content in specials.items():
            if content == name:
                return i
    raise ValueError(
        f"tokenizer file {file} has the special tokens {sorted(specials.values())}, none of which "
        f"is known to separate documents; add one of {', '.join(SPECIAL_NAMES)}"
    )


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for (GPT-2's table)."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {
        **{chr(byte): byte for byte in printed},
        **{chr(256 + place): byte for place, byte in enumerate(others)},
    }

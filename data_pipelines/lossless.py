"""Whether the ids of a document stand for its text, byte for byte."""

SHOWN = 30
"""Bytes that a message shows of each text from the first difference on."""


def require_same_text(text: str, decoded: bytes, place: str) -> None:
    """Compare a document with the bytes that its ids stand for.

    Raises:
        ValueError: they differ; it names the first difference.
    """
    data = text.encode()
    if data == decoded:
        return
    byte = next(
        (i for i, (a, b) in enumerate(zip(data, decoded, strict=False)) if a != b),
        min(len(data), len(decoded)),
    )
    raise ValueError(
        f"the tokenizer changes the text of {place} (it begins {text[:SHOWN]!r}): from byte {byte} "
        f"on the text is {_shown(data, byte)}, but its ids stand for {_shown(decoded, byte)}; take "
        "out what changes text (a normalizer, a prefix space, an unknown token), or set "
        "tokenizer.kind to lossy_file, which marks bits per byte as those of the changed text"
    )


def _shown(data: bytes, byte: int) -> str:
    return repr(data[byte : byte + SHOWN].decode(errors="backslashreplace"))

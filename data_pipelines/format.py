"""The format of a block on disk: its columns, their types, compression and hashes."""

COMPRESSION = "zstd:3"


HASHES = ("sha256",)


SHARD_BYTES = 8 << 20


def columns(block_tokens: int, vocab_size: int) -> dict[str, str]:
    """The columns of a block, all of a fixed shape: no other encoding is ever read."""
    length = block_tokens + 1
    return {
        "tokens": f"ndarray:{token_dtype(vocab_size)}:{length}",
        "documents": f"ndarray:{token_dtype(length)}:{length}",
        "sample": "uint64",
    }


def token_dtype(size: int) -> str:
    """The narrowest type that holds `size` different numbers."""
    return "uint16" if size <= 1 << 16 else "uint32"

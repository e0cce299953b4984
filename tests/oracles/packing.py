"""Documents to blocks, one token at a time: what the builder must come to."""

import hashlib


def pack_documents(texts, *, seed, validation_fraction, block_tokens, domain_bytes=None):
    """Blocks of bytes with 256 around each document: {split: [(tokens, documents), ...]}.

    A document's content decides its place in the order and its split; equal ones count once. The
    one that crosses `domain_bytes` is cut there, or dropped if 99 % are reached before it.
    """
    keyed = []
    for text in set(texts):
        if not text:
            continue
        content = hashlib.blake2b(text.encode(), digest_size=16).digest()
        both = hashlib.blake2b(content, digest_size=16, key=seed.to_bytes(8, "little")).digest()
        place = int.from_bytes(both[:8], "little")
        draw = int.from_bytes(both[8:], "little")
        keyed.append((place, draw / 2**64 < validation_fraction, text))
    keyed.sort()

    streams = {"train": [], "validation": []}
    numbers = {"train": 0, "validation": 0}
    total = 0
    for _, held_out, text in keyed:
        room = domain_bytes - total if domain_bytes is not None else len(text.encode())
        if room <= 0 or (total >= 0.99 * (domain_bytes or 0) and len(text.encode()) > room):
            break
        total += len(text.encode())
        text = text.encode()[:room].decode(errors="ignore")
        split = "validation" if held_out else "train"
        for token in [256, *text.encode(), 256]:
            streams[split].append((token, numbers[split]))
        numbers[split] += 1

    blocks = {}
    for split, stream in streams.items():
        blocks[split] = []
        begin = 0
        while begin + block_tokens + 1 <= len(stream):
            part = stream[begin : begin + block_tokens + 1]
            first = part[0][1]
            blocks[split].append(([t for t, _ in part], [d - first for _, d in part]))
            begin += block_tokens
    return blocks

"""A small run configuration that tests change."""

from typing import Any

import pytest

PLAIN: dict[str, Any] = {
    "architecture": "transformer",
    "rung": "10k",
    "nominal_parameters": 9780,
    "model": {
        "blocks": {
            "a": {
                "mixer": {"kind": "attention", "n_heads": 2},
                "channel": {"kind": "swiglu", "d_hidden": 36},
            }
        },
        "pattern": "a",
        "n_layers": 2,
        "d_model": 16,
        "vocab_size": 257,
    },
    "corpus": {
        "name": "mostly_python",
        "dataset": "tiny",
        "tokenizer": {"kind": "bytes"},
        "domains": {"python": 0.7, "prose": 0.3},
        "seq_len": 64,
        "block_tokens": 128,
        "epoch_blocks": 64,
    },
    "optimizer": {"learning_rate": 0.01, "batch_tokens": 512},
    "schedule": {"warmup_tokens": 2048, "decay_fraction": 0.25},
    "budget": {"tokens": 10240},
    "precision": "fp32",
    "seed": 17,
}


@pytest.fixture
def plain() -> dict[str, Any]:
    """The plain data of a run, free to change."""
    import copy

    return copy.deepcopy(PLAIN)

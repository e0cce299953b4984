"""Counts of a backbone at a length: parameters, FLOPs, state. Conventions stand here, once.

- N is the number of all parameters, tied embeddings counted once.
- C, the headline, is training FLOPs: 3 x the forward pass (backward = 2 x forward), which is 2 per
  weight and token for every dense map, convolution tap and the head, plus each mixer's products
  with attention as causality needs it. Recomputation is never counted.
- Columns beside it: attention counted as the full square; 6 x non-embedding parameters; pointwise
  work of scans, which no matrix unit can do.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from models.backbone import Backbone, BackboneConfig, Block, Source
from models.mixer import MixFlops
from models.sequences.whole import WholeSequence

CONVENTIONS: Mapping[str, str] = {
    "total_parameters": "N: all parameters, tied embeddings once",
    "training_flops_per_token": "C/D: 3 x forward, causal attention as needed, head included",
    "training_flops_per_token_full_attention": "C/D with every query-key pair counted",
    "training_flops_per_token_six_n": "6 x non-embedding parameters",
    "scan_flops_per_token": "3 x pointwise work of scans, in no other column",
}


@dataclass(frozen=True)
class Account:
    """Counts of one backbone; FLOPs are per token at `seq_len`, training means 3 x forward.

    Attributes:
        state_bytes: float32 bytes that decoding keeps per sequence after `seq_len` tokens.
    """

    seq_len: int
    total_parameters: int
    non_embedding_parameters: int
    forward_flops_per_token: float
    training_flops_per_token: float
    training_flops_per_token_full_attention: float
    training_flops_per_token_six_n: float
    scan_flops_per_token: float
    state_bytes: int


def account(config: BackboneConfig, seq_len: int) -> Account:
    """Count a backbone without giving it memory."""
    with torch.device("meta"):
        backbone = Backbone(config)
    total = sum(p.numel() for p in backbone.parameters())
    embedding = backbone.embedding.weight.numel() * (1 if config.tied else 2)
    dense = dense_flops_per_token(backbone)
    mix = mix_flops(backbone, seq_len)
    forward = dense + mix.needed / seq_len
    return Account(
        seq_len=seq_len,
        total_parameters=total,
        non_embedding_parameters=total - embedding,
        forward_flops_per_token=forward,
        training_flops_per_token=3 * forward,
        training_flops_per_token_full_attention=3 * (dense + mix.full_square / seq_len),
        training_flops_per_token_six_n=6.0 * (total - embedding),
        scan_flops_per_token=3 * mix.elementwise / seq_len,
        state_bytes=_state_bytes(backbone, seq_len),
    )


def total_parameters(config: BackboneConfig) -> int:
    """N of a backbone, without giving it memory."""
    with torch.device("meta"):
        return sum(p.numel() for p in Backbone(config).parameters())


def dense_flops_per_token(backbone: Backbone) -> float:
    """2 per weight of every map of single tokens, short convolution and the head."""
    counts = (getattr(module, "token_flops", None) for module in backbone.modules())
    head = 2 * backbone.embedding.weight.numel() if backbone.config.tied else 0
    return float(sum(count() for count in counts if count is not None) + head)


def mix_flops(backbone: Backbone, seq_len: int) -> MixFlops:
    """Forward work of all `mix` calls on one whole sequence, and on a source of its length."""
    blocks = [module for module in backbone.modules() if isinstance(module, Block)]
    mixers = [block.mixer for block in blocks]
    mixers += [block.cross for block in blocks if block.cross is not None]
    each = [mixer.mix_flops(seq_len, seq_len) for mixer in mixers]
    return MixFlops(
        needed=sum(mix.needed for mix in each),
        full_square=sum(mix.full_square for mix in each),
        elementwise=sum(mix.elementwise for mix in each),
    )


def _state_bytes(backbone: Backbone, seq_len: int) -> int:
    """Bytes that decoding keeps; none for an encoder, which sees all tokens at once."""
    if backbone.config.form == "encoder":
        return 0
    tokens = torch.zeros(1, seq_len, dtype=torch.int64, device="meta")
    documents = torch.zeros(1, seq_len, dtype=torch.int32, device="meta")
    with torch.no_grad():
        memory = None
        if backbone.encoder is not None:
            memory = backbone.encode(Source(tokens, WholeSequence(documents)))
        _, state = backbone.extend(tokens, documents, None, memory)
    return state.bytes()

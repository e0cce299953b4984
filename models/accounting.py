"""Counts of a backbone at a length: parameters, FLOPs and state, and the conventions for them.

- N is the number of all parameters, tied embeddings counted once.
- C is training FLOPs: 3 x the forward pass, as the backward pass takes twice its work. A forward
  pass counts 2 per weight and token for every dense map, convolution tap and the head, plus each
  mixer's own products, attention's as far as causality needs them. Recomputation is not counted.
- Reported besides: attention counted as the full square; 6 x non-embedding parameters; the
  pointwise work of scans, which does not run on matrix units.
"""

from dataclasses import dataclass

import torch

from models.backbone import Backbone, BackboneConfig, Block, Source
from models.mixer import MixFlops
from models.sequences.whole import WholeSequence


@dataclass(frozen=True)
class Account:
    """Counts of one backbone; FLOPs are per token at `seq_len`, training means 3 x forward.

    Attributes:
        total_parameters: N, tied embeddings counted once.
        training_flops_per_token: C / D, with causal attention as needed and the head.
        training_flops_per_token_full_attention: the same with every query-key pair counted.
        training_flops_per_token_six_n: 6 x non-embedding parameters.
        scan_flops_per_token: 3 x the pointwise work of scans, in no other count.
        state_bytes: bytes of the float32 decoding state per sequence after `seq_len` tokens.
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
    """Count a backbone, on the meta device."""
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
    """N of a backbone, on the meta device."""
    with torch.device("meta"):
        return sum(p.numel() for p in Backbone(config).parameters())


def dense_flops_per_token(backbone: Backbone) -> float:
    """2 per weight of every dense map, short convolution and the head."""
    counts = (getattr(module, "token_flops", None) for module in backbone.modules())
    # An untied head is a `Linear`, already counted; a tied one is a product with the embedding.
    head = 2 * backbone.embedding.weight.numel() if backbone.config.tied else 0
    return float(sum(count() for count in counts if count is not None) + head)


def mix_flops(backbone: Backbone, seq_len: int) -> MixFlops:
    """Forward FLOPs of all `mix` calls on one sequence, and on a source of the same length."""
    blocks = [module for module in backbone.modules() if isinstance(module, Block)]
    mixers = [block.mixer for block in blocks]
    mixers += [block.cross for block in blocks if block.cross is not None]
    # Cross mixers too: the source is counted at the same length.
    each = [mixer.mix_flops(seq_len, seq_len) for mixer in mixers]
    return MixFlops(
        needed=sum(mix.needed for mix in each),
        full_square=sum(mix.full_square for mix in each),
        elementwise=sum(mix.elementwise for mix in each),
    )


def _state_bytes(backbone: Backbone, seq_len: int) -> int:
    """Bytes of the decoding state; 0 for an encoder, which does not decode."""
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

"""Text generation: one prefill of the prompt, then token by token from the decoding state."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.backbone import Backbone
from models.sequences.continued import DecodingState


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding.
        top_p: nucleus sampling from the smallest set of tokens whose probability reaches this
            (Holtzman et al. 2020, section 3.1).
        seed: seed of the draws.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is negative; 0 is the greedy choice")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]; take 1 for no truncation")


@dataclass(frozen=True)
class GeneratedTokens:
    """One generated token per row, and its cost.

    Attributes:
        seconds: time of the prefill for the first token, of one decoding step for later ones.
        state_bytes: bytes of the decoding state after the preceding tokens.
    """

    tokens: Int[Tensor, "B"]
    seconds: float
    state_bytes: int


@torch.no_grad()
def generate(
    backbone: Backbone, prompt: Int[Tensor, "B L"], tokens: int, sampling: Sampling
) -> Iterator[GeneratedTokens]:
    """Yield `tokens` tokens after the prompt, each as soon as it is generated.

    Args:
        backbone: a decoder.
        prompt: at least one token a row.
        tokens: how many to generate.
        sampling: how each is chosen.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    piece, state = prompt, None
    for _ in range(tokens):
        begin = time.perf_counter()
        logits, state = next_logits(backbone, piece, state)
        chosen = choose(logits, sampling, generator)
        yield GeneratedTokens(chosen, time.perf_counter() - begin, state.bytes())
        piece = chosen[:, None]


@torch.no_grad()
def next_logits(
    backbone: Backbone, piece: Int[Tensor, "B L"], state: DecodingState | None
) -> tuple[Float[Tensor, "B V"], DecodingState]:
    """Logits of the token after `piece`, which continues the document of `state`."""
    documents = torch.zeros(piece.shape, dtype=torch.int32, device=piece.device)
    hidden, state = backbone.extend(piece, documents, state)
    return backbone.head(hidden[:, -1]).float(), state


def choose(
    logits: Float[Tensor, "B V"], sampling: Sampling, generator: torch.Generator
) -> Int[Tensor, "B"]:
    """Choose a token of each row."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # In float64 on the CPU: the same draws from one seed on every device.
    shares = torch.softmax(logits.double() / sampling.temperature, dim=-1).cpu()
    if sampling.top_p < 1:
        ordered, index = shares.sort(dim=-1, descending=True, stable=True)
        # Keep a token if those before it sum to less than top_p; so the first is always kept.
        late = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        shares = shares.scatter(-1, index, ordered.masked_fill(late, 0.0))
    return torch.multinomial(shares, 1, generator=generator)[:, 0].to(logits.device)

"""Text generation: one prefill of the prompt, then token by token from the decoding state."""

import math
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
        ids: how many ids to choose from, the first ones: those that a tokenizer has a text for.
            None for all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    ids: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is negative; 0 is the greedy choice")
        if not math.isfinite(self.temperature):
            raise ValueError(f"temperature {self.temperature} is not finite; take 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not in (0, 1]; take 1 for no truncation")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is out of range; take 0 to 2^63 - 1")
        if self.ids is not None and self.ids < 1:
            raise ValueError(f"there are {self.ids} ids to choose from; give 1 or more")


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


def generate(
    backbone: Backbone, prompt: Int[Tensor, "B L"], tokens: int, sampling: Sampling
) -> Iterator[GeneratedTokens]:
    """Yield `tokens` tokens after the prompt, each as soon as it is generated.

    Args:
        backbone: a decoder.
        prompt: at least one token a row.
        tokens: how many to generate, 1 or more.
        sampling: how each is chosen.

    Raises:
        ValueError: there is nothing to generate, the prompt has no token or an unknown one, or it
            and the tokens exceed the model's positions.
        RuntimeError: while iterating: logits are not finite.
    """
    _check(backbone, prompt, tokens)
    return _generate(backbone, prompt, tokens, sampling)


@torch.no_grad()
def _generate(
    backbone: Backbone, prompt: Int[Tensor, "B L"], tokens: int, sampling: Sampling
) -> Iterator[GeneratedTokens]:
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
    """Choose a token of each row.

    Raises:
        RuntimeError: a logit is not finite.
    """
    if not bool(logits.isfinite().all()):
        raise RuntimeError(
            "the model's logits are not finite, so no token can be chosen; its weights may have "
            "diverged: take another checkpoint or run"
        )
    logits = logits[:, : sampling.ids]
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # In float64 on the CPU: the same draws from one seed on every device. The largest becomes 0: at
    # a tiny temperature it would overflow.
    wide = logits.double()
    scaled = (wide - wide.amax(dim=-1, keepdim=True)) / sampling.temperature
    shares = torch.softmax(scaled, dim=-1).cpu()
    if sampling.top_p < 1:
        ordered, index = shares.sort(dim=-1, descending=True, stable=True)
        # Keep a token if those before it sum to less than top_p; so the first is always kept.
        late = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        shares = shares.scatter(-1, index, ordered.masked_fill(late, 0.0))
    return torch.multinomial(shares, 1, generator=generator)[:, 0].to(logits.device)


def _check(backbone: Backbone, prompt: Int[Tensor, "B L"], tokens: int) -> None:
    if tokens < 1:
        raise ValueError(f"{tokens} tokens are to be generated; ask for 1 or more")
    if prompt.numel() == 0:
        raise ValueError(f"the prompt has shape {tuple(prompt.shape)}; give at least one token")
    size = backbone.config.vocab_size
    if int(prompt.min()) < 0 or int(prompt.max()) >= size:
        raise ValueError(
            f"the prompt has ids {int(prompt.min())} to {int(prompt.max())}, but the model has 0 "
            f"to {size - 1}; encode it with the model's own tokenizer"
        )
    # The last token is not read again.
    longest, wanted = backbone.config.longest_document(), prompt.shape[1] + tokens - 1
    if longest is not None and wanted > longest:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} tokens with {tokens} more needs {wanted} positions, "
            f"but the model has {longest}; ask for fewer tokens, or give a shorter prompt"
        )

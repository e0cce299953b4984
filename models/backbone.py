"""The backbone: embedding, a repeated pattern of named blocks, a norm; the head stands apart."""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.channel import ChannelConfig
from models.layers import Drawn, Embedding, Linear, RMSNorm
from models.mixer import MixerConfig
from models.sequence import ContinuedSequence, DecodingState, WholeSequence


@dataclass(frozen=True)
class BlockConfig:
    """A named block: a token mixer, then a channel mixer, each behind a norm and a residual."""

    mixer: MixerConfig
    channel: ChannelConfig


@dataclass(frozen=True)
class BackboneConfig:
    """An architecture at a size.

    Attributes:
        blocks: blocks by name.
        pattern: names of blocks, separated by spaces, repeated to `n_layers`.
        n_layers: blocks in all.
        d_model: width of the residual stream.
        vocab_size: ids of the tokenizer.
        tied: whether the head is the embedding, transposed.
        norm_eps: added to mean squares.
        embedding_std: standard deviation of initial embeddings.
    """

    blocks: dict[str, BlockConfig]
    pattern: str
    n_layers: int
    d_model: int
    vocab_size: int
    tied: bool = True
    norm_eps: float = 1e-5
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is not positive; take 1 or more")
        names = self.pattern.split()
        unknown = sorted(set(names) - set(self.blocks))
        if unknown or not names:
            raise ValueError(
                f"pattern {self.pattern!r} names {unknown or 'no block'}; "
                f"blocks are {', '.join(sorted(self.blocks))}"
            )

    def layers(self) -> list[BlockConfig]:
        """The block of each layer."""
        names = self.pattern.split()
        return [self.blocks[names[i % len(names)]] for i in range(self.n_layers)]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + channel(norm(x)) if there is a channel mixer."""

    def __init__(self, config: BlockConfig, backbone: BackboneConfig, n_residuals: int) -> None:
        super().__init__()
        D, eps = backbone.d_model, backbone.norm_eps
        self.mixer_norm = RMSNorm(D, eps)
        self.mixer = config.mixer.build(D, n_residuals)
        self.channel = config.channel.build(D, n_residuals)
        if self.channel is not None:
            self.channel_norm = RMSNorm(D, eps)

    def forward(self, x: Float[Tensor, "B L D"], sequence: WholeSequence) -> Float[Tensor, "B L D"]:
        """Run the block; the residual stream keeps its dtype."""
        x = x + self.mixer(self.mixer_norm(x), sequence)
        if self.channel is not None:
            x = x + self.channel(self.channel_norm(x))
        return x


class Backbone(nn.Module):
    """Tokens to hidden states; `head` maps hidden states to logits."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        layers = config.layers()
        n_residuals = len(layers) + sum(layer.channel.residuals for layer in layers)
        self.embedding = Embedding(config.vocab_size, config.d_model, config.embedding_std)
        self.layers = nn.ModuleList(Block(layer, config, n_residuals) for layer in layers)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tied:
            self.unembedding = Linear(config.d_model, config.vocab_size, std=config.embedding_std)

    def forward(
        self, tokens: Int[Tensor, "B L"], sequence: WholeSequence
    ) -> Float[Tensor, "B L D"]:
        """The hidden state of each token, normalised."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, sequence)
        return self.norm(x)

    def extend(
        self,
        tokens: Int[Tensor, "B L"],
        documents: Int[Tensor, "B L"],
        state: DecodingState | None,
    ) -> tuple[Float[Tensor, "B L D"], DecodingState]:
        """Hidden states of the tokens that follow `state`, and the state they leave.

        Args:
            tokens: the next piece, of any length from 1.
            documents: ids of its documents; 0 continues the last one seen.
            state: what earlier pieces left; None at the beginning.
        """
        sequence = ContinuedSequence(documents, state)
        x = self.embedding(tokens)
        for layer in self.layers:
            sequence.enter_layer()
            x = layer(x, sequence)
            sequence.leave_layer()
        return self.norm(x), sequence.state()

    def head(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Logits of the next token."""
        if self.config.tied:
            return F.linear(hidden, self.embedding.weight)
        return self.unembedding(hidden)


def build_backbone(config: BackboneConfig, seed: int) -> Backbone:
    """Make a backbone whose initial weights depend on (seed, parameter name) alone."""
    with torch.device("meta"):
        backbone = Backbone(config)
    backbone.to_empty(device="cpu")
    initialise(backbone, seed)
    return backbone


def initialise(backbone: Backbone, seed: int) -> None:
    """Draw every parameter from a generator of its own, keyed by the seed and its name."""
    with torch.no_grad():
        for path, module in backbone.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                assert isinstance(module, Drawn), f"{path} does not say how {name} starts"
                parameter.copy_(module.draw(name, _generator(seed, f"{path}.{name}")))


def undecayed(backbone: Backbone) -> set[str]:
    """Names of parameters without weight decay: below two dimensions, or marked by a mixer."""
    marked = {
        f"{path}.{name}"
        for path, module in backbone.named_modules()
        for name in getattr(module, "no_decay", ())
    }
    return {name for name, p in backbone.named_parameters() if p.ndim < 2 or name in marked}


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

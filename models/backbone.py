"""The backbone: embedding, a repeated pattern of named blocks and a final norm; and the head."""

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.channel import ChannelConfig
from models.mixer import MixerConfig, Pattern, Slot
from models.mup import MupConfig, at_width, rate_multipliers
from models.parts.layers import Drawn, Embedding, Linear, RMSNorm
from models.ranges import check_range, check_ranges
from models.sequences.continued import ContinuedSequence, DecodingState, Memory
from models.sequences.whole import WholeSequence

Form = Literal["decoder", "encoder"]
SELF = {"decoder": Pattern.CAUSAL_SELF, "encoder": Pattern.NONCAUSAL_SELF}
SIZES = (
    "n_layers", "d_model", "vocab_size", "norm_eps", "embedding_std", "learned_positions",
)  # fmt: skip
CROSS = {"decoder": Pattern.CAUSAL_CROSS, "encoder": Pattern.NONCAUSAL_CROSS}


@dataclass(frozen=True)
class BlockConfig:
    """A named block: a token mixer, then a channel mixer, each pre-norm with a residual.

    Attributes:
        cross: a cross mixer after the token mixer, which reads the encoder's memory; None for none.
    """

    mixer: MixerConfig
    channel: ChannelConfig
    cross: MixerConfig | None = None

    def __post_init__(self) -> None:
        check_ranges(self.mixer, "mixer.")
        check_ranges(self.channel, "channel.")
        if self.cross is not None:
            check_ranges(self.cross, "cross.")

    @property
    def residuals(self) -> int:
        """Residual branches."""
        return 1 + (self.cross is not None) + self.channel.residuals


class Source(NamedTuple):
    """What an encoder reads."""

    tokens: Int[Tensor, "B S"]
    sequence: WholeSequence


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder of a source; its blocks are those of the backbone, by name.

    Attributes:
        pattern: names of blocks, separated by spaces, repeated to `n_layers`.
        n_layers: number of blocks; None for as many as the backbone has.
    """

    pattern: str
    n_layers: int | None = None


@dataclass(frozen=True)
class BackboneConfig:
    """An architecture at a size.

    Attributes:
        blocks: blocks by name.
        pattern: names of blocks, separated by spaces, repeated to `n_layers`.
        n_layers: number of blocks.
        d_model: width of the residual stream.
        vocab_size: size of the vocabulary.
        tied: whether the head is the embedding, transposed.
        norm_eps: added to mean squares.
        embedding_std: standard deviation of initial embeddings.
        form: decoder for causal mixers, encoder for bidirectional ones.
        encoder: an encoder with the same embedding, whose output the blocks' `cross` mixers read.
        learned_positions: number of learned absolute positions; None for none.
        mup: maximal-update parametrisation; None for the standard one.
    """

    blocks: dict[str, BlockConfig]
    pattern: str
    n_layers: int
    d_model: int
    vocab_size: int
    tied: bool = True
    norm_eps: float = 1e-5
    embedding_std: float = 0.02
    form: Form = "decoder"
    encoder: EncoderConfig | None = None
    learned_positions: int | None = None
    mup: MupConfig | None = None

    def __post_init__(self) -> None:
        for name in SIZES:
            check_range(name, getattr(self, name))
        if self.encoder is not None:
            check_range("encoder.n_layers", self.encoder.n_layers)
        if self.mup is not None:
            check_ranges(self.mup, "mup.")
        self._check_pattern(self.pattern)
        if self.encoder is not None:
            self._check_pattern(self.encoder.pattern)
            if all(block.cross is None for block in self.layers()):
                raise ValueError(
                    "encoder is given, but no block has a cross mixer to read it; add cross to a "
                    "block or remove encoder"
                )

    def layers(self) -> list[BlockConfig]:
        """The block of each layer."""
        return self._repeat(self.pattern, self.n_layers)

    def encoder_layers(self) -> list[BlockConfig]:
        """The block of each layer of the encoder; none without one."""
        if self.encoder is None:
            return []
        return self._repeat(self.encoder.pattern, self.encoder.n_layers or self.n_layers)

    def longest_document(self) -> int | None:
        """The longest document it can read, in tokens; None if there is no longest."""
        limits = [getattr(block.mixer, "max_len", None) for block in self.layers()]
        return min((n for n in (self.learned_positions, *limits) if n is not None), default=None)

    def _repeat(self, pattern: str, n_layers: int) -> list[BlockConfig]:
        names = pattern.split()
        return [self.blocks[names[i % len(names)]] for i in range(n_layers)]

    def _check_pattern(self, pattern: str) -> None:
        names = pattern.split()
        unknown = sorted(set(names) - set(self.blocks))
        if unknown or not names:
            raise ValueError(
                f"pattern {pattern!r} names {unknown or 'no block'}; "
                f"choose from blocks {', '.join(sorted(self.blocks))}"
            )


class Block(nn.Module):
    """x + mixer(norm(x)), then the same with the cross mixer and the channel mixer, if any."""

    def __init__(
        self, config: BlockConfig, backbone: BackboneConfig, n_residuals: int, form: Form
    ) -> None:
        super().__init__()
        D, eps, mup = backbone.d_model, backbone.norm_eps, backbone.mup
        self.mixer_norm = RMSNorm(D, eps)
        self.mixer = at_width(config.mixer, mup, D).build(Slot(D, n_residuals, SELF[form], mup))
        self.cross = None
        if config.cross is not None:
            self.cross_norm = RMSNorm(D, eps)
            slot = Slot(D, n_residuals, CROSS[form], mup)
            self.cross = at_width(config.cross, mup, D).build(slot)
        self.channel = at_width(config.channel, mup, D).build(D, n_residuals)
        if self.channel is not None:
            self.channel_norm = RMSNorm(D, eps)

    def forward(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> Float[Tensor, "B L D"]:
        """Run the block; the residual stream keeps its dtype."""
        x = x + self.mixer(self.mixer_norm(x), sequence)
        if self.cross is not None:
            x = x + self.cross(self.cross_norm(x), sequence, memory)
        if self.channel is not None:
            x = x + self.channel(self.channel_norm(x))
        return x


class Stack(nn.Module):
    """A sequence of blocks and a final norm.

    Attributes:
        recompute: activation checkpointing: keep only each block's input, and recompute the rest in
            the backward pass.
    """

    recompute = False

    def __init__(self, layers: list[BlockConfig], config: BackboneConfig, form: Form) -> None:
        super().__init__()
        n_residuals = sum(layer.residuals for layer in layers)
        self.layers = nn.ModuleList(Block(layer, config, n_residuals, form) for layer in layers)
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def run(
        self, x: Float[Tensor, "B L D"], sequence: WholeSequence, memory: Memory | None = None
    ) -> Float[Tensor, "B L D"]:
        """Map features to normalised hidden states."""
        for layer in self.layers:
            # Without gradients nothing is kept, so there is nothing to recompute.
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, sequence, memory, use_reentrant=False)
            else:
                x = layer(x, sequence, memory)
        return self.norm(x)


class Backbone(Stack):
    """Tokens to hidden states; `head` maps hidden states to logits."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config.layers(), config, config.form)
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, config.embedding_std)
        self.encoder = None
        if config.encoder is not None:
            self.encoder = Stack(config.encoder_layers(), config, "encoder")
        if config.learned_positions is not None:
            self.places = Embedding(config.learned_positions, config.d_model, config.embedding_std)
        if not config.tied:
            std = config.embedding_std
            self.unembedding = Linear(config.d_model, config.vocab_size, std=std, fan_in=None)

    def forward(
        self, tokens: Int[Tensor, "B L"], sequence: WholeSequence, source: Source | None = None
    ) -> Float[Tensor, "B L D"]:
        """The hidden state of each token, normalised."""
        memory = None if source is None else self.encode(source)
        return self.run(self.embed(tokens, sequence), sequence, memory)

    def encode(self, source: Source) -> Memory:
        """Encode a source."""
        assert self.encoder is not None, "a backbone without an encoder has no memory"
        x = self.embed(source.tokens, source.sequence)
        return Memory(self.encoder.run(x, source.sequence), source.sequence)

    def embed(self, tokens: Int[Tensor, "B L"], sequence: WholeSequence) -> Float[Tensor, "B L D"]:
        """The embedding of each token, plus that of its position if positions are learned."""
        x = self.embedding(tokens)
        if self.config.learned_positions is None:
            return x
        positions = sequence.positions()
        if not positions.is_meta and int(positions.max()) >= self.config.learned_positions:
            raise ValueError(
                f"a document has {int(positions.max()) + 1} tokens, but the model has "
                f"learned_positions {self.config.learned_positions}; give shorter documents"
            )
        return x + self.places(positions)

    def extend(
        self,
        tokens: Int[Tensor, "B L"],
        documents: Int[Tensor, "B L"],
        state: DecodingState | None,
        memory: Memory | None = None,
    ) -> tuple[Float[Tensor, "B L D"], DecodingState]:
        """Hidden states of the tokens after `state`, and the state after them.

        Args:
            tokens: the next chunk, of any length from 1.
            documents: ids of its documents; 0 continues the last one seen. Only the last chunk may
                have padding.
            state: the state after earlier chunks; None at the beginning.
            memory: the encoded source, if there is an encoder.

        Raises:
            ValueError: rows of the state end in padding, or their number is another.
        """
        sequence = ContinuedSequence(documents, state)
        x = self.embed(tokens, sequence)
        for layer in self.layers:
            sequence.enter_layer()
            x = layer(x, sequence, memory)
            sequence.leave_layer()
        return self.norm(x), sequence.state()

    def head(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        """Logits of the next token."""
        if self.config.mup is not None:
            hidden = hidden * self.config.mup.width_share(self.config.d_model)
        if self.config.tied:
            return F.linear(hidden, self.embedding.weight)
        return self.unembedding(hidden)


def build_backbone(config: BackboneConfig, seed: int) -> Backbone:
    """Make a backbone whose initial weights depend only on the seed and the parameters' names."""
    with torch.device("meta"):
        backbone = Backbone(config)
    backbone.to_empty(device="cpu")
    initialise(backbone, seed)
    return backbone


def initialise(module: nn.Module, seed: int) -> None:
    """Draw each parameter from its own generator, seeded by `seed` and the parameter's name."""
    with torch.no_grad():
        for path, part in module.named_modules():
            for name, parameter in part.named_parameters(recurse=False):
                assert isinstance(part, Drawn), f"{path} does not define initial values of {name}"
                parameter.copy_(part.draw(name, _generator(seed, f"{path}.{name}")))


def undecayed(backbone: Backbone) -> set[str]:
    """Names of parameters without weight decay: vectors and scalars, and a mixer's `no_decay`."""
    marked = {
        f"{path}.{name}"
        for path, module in backbone.named_modules()
        for name in getattr(module, "no_decay", ())
    }
    return {name for name, p in backbone.named_parameters() if p.ndim < 2 or name in marked}


def multipliers(backbone: Backbone) -> dict[str, float]:
    """The factor on the learning rate of every parameter, by name."""
    return rate_multipliers(backbone, backbone.config.mup, backbone.config.d_model)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    # Shifted to 63 bits: manual_seed takes a signed integer.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

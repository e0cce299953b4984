"""The peers of the benchmark: transformers' models at our shapes, on the same tokens and loss.

Only a process that trains a peer imports transformers.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import BackboneConfig
from models.channel import SwiGLUConfig
from models.mixers.recurrent.mamba import MambaConfig
from models.mixers.recurrent.mamba2 import Mamba2Config
from models.mixers.softmax.attention import AttentionConfig
from tests.benchmarks.training.bench_models import (
    VOCAB,
    Built,
    Task,
    count_parameters,
    plain_step,
    random_batch,
)


def plain(task: Task) -> Built:
    """A Transformer of our shape with nothing in it that torch does not bring."""
    model = PlainTransformer(task.model)
    return _peer(model, task, model, "SDPA")


def plain_compiled(task: Task) -> Built:
    """The same, compiled as a whole."""
    model = PlainTransformer(task.model)
    return _peer(model, task, torch.compile(model), "SDPA, compiled whole")


class PlainTransformer(nn.Module):
    """Norm, fused projection, rotation, SDPA, SwiGLU; the embedding is the head."""

    def __init__(self, shape: BackboneConfig) -> None:
        super().__init__()
        mixer, channel = _transformer_parts(shape)
        self.embedding = nn.Embedding(VOCAB, shape.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(
            PlainBlock(shape.d_model, mixer.n_heads, channel.d_hidden)
            for _ in range(shape.n_layers)
        )
        self.norm = nn.RMSNorm(shape.d_model)
        self.head_dim = shape.d_model // mixer.n_heads

    def forward(self, tokens: Tensor) -> Tensor:
        x, P = self.embedding(tokens), self.head_dim
        rates = 1e4 ** (-torch.arange(0, P, 2) / P)
        angles = torch.arange(tokens.shape[1])[:, None] * rates
        turn = torch.polar(torch.ones_like(angles), angles)
        cos, sin = turn.real, turn.imag
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embedding.weight)


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(self.before_attention(x)).unflatten(2, (3 * self.heads, -1))
        queries, keys, values = heads.transpose(1, 2).chunk(3, dim=1)
        queries, keys = (_turned(part, cos, sin) for part in (queries, keys))
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.before_mlp(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def llama(task: Task) -> Built:
    """LlamaForCausalLM with our Transformer's shape and torch's fused attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _silence_transformers()
    shape = task.model
    mixer, channel = _transformer_parts(shape)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=mixer.n_heads,
        num_key_value_heads=mixer.kv_heads,
        intermediate_size=channel.d_hidden,
        max_position_embeddings=task.size.seq_len,
        rope_theta=mixer.rope_theta,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    # Without a mask of ones it looks for packed documents, and makes a dense mask of what it finds.
    seen = torch.ones(task.size.batch, task.size.seq_len, dtype=torch.int64)
    return _peer(model, task, lambda tokens: model(tokens, attention_mask=seen).logits, "SDPA")


def their_mamba(task: Task) -> Built:
    """MambaForCausalLM with our Mamba's shape, on the faster of its CPU paths that is installed.

    Its CUDA kernels have no CPU form; what is left is a Python loop over the tokens, or the
    parallel scan of the package mambapy. Compiling either takes minutes before the first step.
    """
    from transformers import MambaConfig as TheirConfig
    from transformers import MambaForCausalLM
    from transformers.utils.import_utils import is_mambapy_available

    _silence_transformers()
    shape = task.model
    (block,) = shape.blocks.values()
    mixer = block.mixer
    assert isinstance(mixer, MambaConfig)
    rank = mixer.dt_rank or math.ceil(shape.d_model / 16)
    parallel = bool(is_mambapy_available())
    config = TheirConfig(
        vocab_size=VOCAB,
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        state_size=mixer.d_state,
        conv_kernel=mixer.d_conv,
        expand=mixer.expand,
        # Declared as text for its "auto"; a number is taken too.
        time_step_rank=rank,  # pyright: ignore[reportArgumentType]
        layer_norm_epsilon=shape.norm_eps,
        tie_word_embeddings=True,
        use_cache=False,
        use_mambapy=parallel,
    )
    model = MambaForCausalLM(config)
    setting = "mambapy scan" if parallel else "token loop"
    return _peer(model, task, lambda tokens: model(tokens).logits, setting)


def their_mamba2(task: Task) -> Built:
    """Mamba2ForCausalLM with our Mamba-2's shape, on its path without CUDA kernels."""
    from transformers import Mamba2Config as TheirConfig
    from transformers import Mamba2ForCausalLM

    _silence_transformers()
    shape = task.model
    (block,) = shape.blocks.values()
    mixer = block.mixer
    assert isinstance(mixer, Mamba2Config)
    config = TheirConfig(
        vocab_size=VOCAB,
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_heads=mixer.n_heads(shape.d_model),
        head_dim=mixer.head_dim,
        state_size=mixer.d_state,
        n_groups=mixer.n_groups,
        conv_kernel=mixer.d_conv,
        expand=mixer.expand,
        layer_norm_epsilon=shape.norm_eps,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = Mamba2ForCausalLM(config)
    return _peer(model, task, lambda tokens: model(tokens).logits, "torch path")


def _transformer_parts(shape: BackboneConfig) -> tuple[AttentionConfig, SwiGLUConfig]:
    (block,) = shape.blocks.values()
    mixer, channel = block.mixer, block.channel
    assert isinstance(mixer, AttentionConfig)
    assert isinstance(channel, SwiGLUConfig)
    return mixer, channel


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def _peer(model: nn.Module, task: Task, predict: Callable[[Tensor], Tensor], setting: str) -> Built:
    model.train()
    batch = random_batch(task.size)

    def loss() -> Tensor:
        logits = predict(batch.tokens).float()
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    return Built(plain_step(model, loss), count_parameters(model), setting=setting)


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()

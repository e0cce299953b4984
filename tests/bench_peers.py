"""The peers of the benchmark: transformers' models at our shapes, on the same tokens and loss.

Only a process that trains a peer imports transformers.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.channel import SwiGLUConfig
from models.mixers.recurrent.mamba import MambaConfig
from models.mixers.softmax.attention import AttentionConfig
from tests.bench_models import VOCAB, Built, Task, count_parameters, plain_step, random_batch


def llama(task: Task) -> Built:
    """LlamaForCausalLM with our Transformer's shape and torch's fused attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    _silence_transformers()
    shape = task.model
    (block,) = shape.blocks.values()
    mixer, channel = block.mixer, block.channel
    assert isinstance(mixer, AttentionConfig)
    assert isinstance(channel, SwiGLUConfig)
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

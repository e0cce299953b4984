"""Compiled blocks: what `torch.compile` is given of a backbone, and what it is kept out of.

Each block is compiled by itself, so that blocks of one kind share their code and the time to the
first step does not grow with the depth. A mixer's `mix` is where kernels are called: they loop in
Python over tiles and look at documents, which the compiler would unroll and guard, so it stays as
it is unless the mixer says that it is plain torch.
"""

import torch

from kernels.dispatch import warm
from models.backbone import Backbone
from models.mixer import Mixer


def compile_blocks(backbone: Backbone, backend: str = "inductor") -> None:
    """Let the blocks of a backbone be compiled at their first use, in place.

    Results differ from those of the blocks as written by the rounding of float32 alone. Each new
    length, packing or batch size compiles again; after torch's limit of variants further ones run
    as written, with a warning.

    Args:
        backbone: keeps its parameters and their names.
        backend: one of torch's.
    """
    # What serves on this machine must be settled before the compiler looks at it.
    warm()
    for module in backbone.modules():
        if isinstance(module, Mixer) and not module.traced:
            setattr(module, "mix", torch.compiler.disable(module.mix))  # noqa: B010
    for stack in (backbone, backbone.encoder):
        for layer in () if stack is None else stack.layers:
            layer.compile(backend=backend)

"""`torch.compile` for a backbone, block by block.

Compiling blocks separately lets blocks of one kind share code, so the time to the first step does
not grow with depth. A mixer's `mix` is not compiled unless the mixer is `traced`: it calls kernels
that loop in Python over tiles and branch on documents, which the compiler would unroll and guard.
"""

import torch

from kernels.dispatch import warm
from models.backbone import Backbone
from models.mixer import Mixer


def compile_blocks(backbone: Backbone, backend: str = "inductor") -> None:
    """Compile the blocks of a backbone in place, at their first use.

    Results differ from eager mode by float32 rounding only. Each new length, packing or batch size
    compiles again; beyond torch's recompilation limit, further ones run in eager mode with a
    warning.

    Args:
        backbone: parameters and their names do not change.
        backend: a torch.compile backend.
    """
    # Choose the kernels first: the choice looks at the disk, which cannot be traced.
    warm()
    for module in backbone.modules():
        if isinstance(module, Mixer) and not module.traced:
            setattr(module, "mix", torch.compiler.disable(module.mix))  # noqa: B010
    for stack in (backbone, backbone.encoder):
        for layer in () if stack is None else stack.layers:
            layer.compile(backend=backend)

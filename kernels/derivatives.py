"""How often an operator can be differentiated: by its kernel once, in plain torch without limit.

A kernel's backward pass is no function that autograd can follow. Torch's `once_differentiable`
raises an error under `.backward()`, but `torch.autograd.grad` passes by the error's node, which no
input depends on, and leaves the terms out. So a gradient that shall be differentiated is refused
where it is made.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Given = ParamSpec("Given")
Gradients = TypeVar("Gradients")

IN_PLAIN_TORCH = "run the forward pass inside `kernels.derivatives.plain_torch()`"
ON_ONE_RANK = f"without sequence parallelism, {IN_PLAIN_TORCH}"

_plain = False


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Compute every operator by torch's own operations, for second and higher derivatives.

    Slower, and with memory for whole matrices of scores; equal to the kernels up to rounding.
    """
    global _plain
    before, _plain = _plain, True
    try:
        # The other backends of torch's attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _plain = before


def in_plain_torch() -> bool:
    """Whether operators are computed by torch's own operations."""
    return _plain


def differentiated_once(
    operator: str, instead: str = IN_PLAIN_TORCH
) -> Callable[[Callable[Given, Gradients]], Callable[Given, Gradients]]:
    """Decorator of a `backward` that refuses to compute gradients with a graph of their own.

    Args:
        operator: its name in the error.
        instead: what gives second derivatives.

    Raises:
        RuntimeError: in the backward pass, under `create_graph=True`.
    """

    def mark(backward: Callable[Given, Gradients]) -> Callable[Given, Gradients]:
        @functools.wraps(backward)
        def checked(*given: Given.args, **named: Given.kwargs) -> Gradients:
            # Autograd records the backward pass only under create_graph=True. A compiler traces it
            # while gradients are on, and refuses second derivatives of what it compiles itself.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f"create_graph=True asks for a gradient of {operator} that can be "
                    f"differentiated again, but its backward pass can not; {instead}"
                )
            return backward(*given, **named)

        return checked

    return mark

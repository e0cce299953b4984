"""Which group each operator of a training step belongs to, and the CPU time of each group.

Self times of all events below one enclosing record add up to the time of that record, so that the
groups sum to the step: Python and dispatch are what no operator accounts for.
"""

from collections.abc import Callable

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

GROUPS: tuple[str, ...] = (
    "products",
    "attention kernel",
    "scans, convolutions",
    "FFT",
    "norms, elementwise",
    "copies, layout",
    "passes of kernels",
    "embedding, loss",
    "optimizer",
    "dispatch, Python",
)
LIGHT = ("norms, elementwise", "copies, layout", "passes of kernels", "embedding, loss")
"""What moves bytes and multiplies no matrices."""

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm"}
_COPIES = {
    "copy_", "clone", "cat", "stack", "fill_", "zero_", "flip", "roll", "constant_pad_nd",
    "index", "gather", "_to_copy", "repeat",
}  # fmt: skip
_EMBEDDING_LOSS = {
    "embedding", "embedding_dense_backward", "index_select", "_log_softmax",
    "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward",
}  # fmt: skip
_FREE = {
    "as_strided", "view", "_unsafe_view", "_reshape_alias", "reshape", "alias", "detach", "t",
    "transpose", "permute", "slice", "select", "narrow", "split", "split_with_sizes", "chunk",
    "unsqueeze", "squeeze", "expand", "expand_as", "unbind", "unfold", "diagonal", "flatten",
    "unflatten", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
    "resize_", "contiguous", "to", "matmul", "linear", "einsum", "ones", "zeros", "zeros_like",
    "new_zeros", "item", "_local_scalar_dense", "is_nonzero", "result_type", "lift_fresh",
    "set_", "broadcast_tensors", "view_as_real", "view_as_complex", "_conj", "real", "imag",
    "conj", "mT", "swapaxes", "movedim", "pad", "rms_norm", "cross_entropy_loss", "fft_rfft",
    "fft_irfft", "scaled_dot_product_attention", "softmax", "log_softmax", "nll_loss",
    "nll_loss_nd",
}  # fmt: skip
"""Views, allocations, and operators that only call others: their self time is dispatch."""
_KERNELS = ("_LongConv", "_Checkpoints", "_BlockSparse")
"""Kernels that are products and passes of torch; their passes are told apart."""


def group_of(name: str) -> str:
    """The group of an operator by its name, as in aten::mm; others are dispatch and Python.

    SSD by chunks is one operator, with the passes between its products; it counts as products.
    """
    space, _, operator = name.rpartition("::")
    if space == "crossladder":
        return _group_of_kernel(operator)
    if space != "aten" or operator in _FREE:
        return "dispatch, Python"
    if operator.removesuffix("_") in _PRODUCTS:
        return "products"
    if "attention" in operator:
        return "attention kernel"
    if operator.startswith("_fft_"):
        return "FFT"
    if operator.startswith("_fused_adam"):
        return "optimizer"
    if operator in _EMBEDDING_LOSS:
        return "embedding, loss"
    return "copies, layout" if operator in _COPIES else "norms, elementwise"


def _group_of_kernel(operator: str) -> str:
    if operator.startswith("ssd_"):
        return "products"
    if operator.startswith(("rms_norm_", "rglru_", "rotary_", "swiglu_")):
        return "norms, elementwise"
    return "attention kernel" if "attention" in operator else "scans, convolutions"


def profile_step(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds of a step by group; they sum to "total", which was clocked by the record."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            with record_function(_ROOT):
                step()
    found = dict.fromkeys(GROUPS, 0.0)
    total = 0.0
    for event in recorded.events() or []:
        chain = _ancestors(event)
        if _ROOT not in (event.name, *chain):
            continue
        if event.name == _ROOT:
            total += event.cpu_time_total
        found[_group(event.name, chain)] += event.self_cpu_time_total
    return {name: 1e-3 * value / steps for name, value in {**found, "total": total}.items()}


_ROOT = "step of the benchmark"


def _group(name: str, chain: list[str]) -> str:
    group = group_of(name)
    if group in LIGHT and any(each.startswith(_KERNELS) for each in chain):
        return "passes of kernels"
    return group


def _ancestors(event: FunctionEvent) -> list[str]:
    names, above = [], event.cpu_parent
    while above is not None:
        names.append(above.name)
        above = above.cpu_parent
    return names


def flops_of(operator: str, tensors: list[torch.Tensor]) -> float:
    """FLOPs of a product of matrices (..., m, k) and (..., k, n): 2 m k n each.

    Args:
        operator: its name without namespace; those with "add" read a summand first.
        tensors: its operands in order.
    """
    left, right = tensors[1:3] if operator.startswith(("add", "badd")) else tensors[:2]
    return 2.0 * left.numel() * right.shape[-1]

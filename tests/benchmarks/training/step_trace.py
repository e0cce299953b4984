"""What one training step hands to torch: its products, kernels and transforms, and its bytes.

A dispatch mode sees every operator with its tensors, forward and backward. Heavy operators are kept
with their arguments, so that each can be timed alone later. The rest are passes over memory, which
are counted twice:

- as written: every pass reads its inputs and writes its outputs;
- least: of what lies between heavy operators, only what a heavy one reads and a pass must write,
  and what a heavy one wrote and a pass must read, each once. The residual stream, weights, and what
  passes keep for each other are not in it, so it is less than any program of passes can do.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.benchmarks.kernels import bench_ssd
from tests.benchmarks.training.step_profile import LIGHT, flops_of, group_of

RUN = ("products", "attention kernel", "FFT")
"""Groups of heavy operators whose calls are timed; others are counted."""
ADAM_WORDS = 7
"""Words that AdamW moves a parameter: reads it, its gradient and two moments, writes three."""


@dataclass
class Call:
    """Equal calls of a heavy operator.

    Attributes:
        flops: of one call, where it is a product.
        sizes: bytes of the tensors that one call reads and writes.
        exponentials: that one call cannot do without.
    """

    group: str
    name: str
    run: Callable[[], object]
    flops: float
    sizes: list[int]
    exponentials: float
    count: int = 1


@dataclass
class Region:
    """What of one storage was touched; views that overlap count once."""

    storage: torch.UntypedStorage
    views: dict[tuple[object, ...], int] = field(default_factory=dict)

    def touch(self, x: Tensor) -> None:
        key = (x.storage_offset(), tuple(x.shape), x.stride())
        self.views[key] = bytes_of(x)

    def bytes(self) -> int:
        return min(sum(self.views.values()), self.storage.nbytes())


class StepTrace(TorchDispatchMode):
    """Records the step that runs inside it.

    Attributes:
        calls: heavy operators, equal ones together.
        order: those of the groups in RUN as they came, each with the operands that the step gave
            it, by the key of its equals in `calls`. SSD's are made up, the same for its equals.
        written: sizes in bytes of what passes read and write, as the program has them, with counts.
        optimizer_parameters: numbers that AdamW updates.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[object, ...], Call] = {}
        self.order: list[tuple[tuple[object, ...], Callable[[], object]]] = []
        self.written: Counter[int] = Counter()
        self.optimizer_parameters = 0
        self._made, self._read = {}, {}
        self._taken: dict[int, Region] = {}
        self._held: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        group = group_of(func._schema.name)
        if group == "optimizer":
            self._note_optimizer(args)
        elif group in LIGHT:
            self._note_pass(func, args, kwargs, out)
        elif group != "dispatch, Python":
            self._note_heavy(group, func, args, kwargs, out)
        return out

    def least(self) -> Counter[int]:
        """Sizes in bytes of what passes must read and write, with counts."""
        regions = [r for k, r in self._read.items() if k not in self._made and k not in self._held]
        regions += [r for k, r in self._taken.items() if k not in self._held]
        return Counter(region.bytes() for region in regions)

    def flops(self) -> float:
        """FLOPs of all products that were run."""
        return sum(call.flops * call.count for call in self.calls.values())

    def _note_optimizer(self, args: tuple[list[Tensor], ...]) -> None:
        self.optimizer_parameters += sum(x.numel() for x in args[0])
        self._held.update(_key(x) for x in _tensors(args))

    def _note_pass(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        outputs = {id(x): x for x in _tensors(out)}
        overwrites = group_of(func._schema.name) == "copies, layout"
        inputs = [x for x in _tensors((args, kwargs)) if not (overwrites and id(x) in outputs)]
        for x in (*inputs, *outputs.values()):
            self.written[bytes_of(x)] += 1
        for x in inputs:
            if _key(x) in self._made:
                self._taken.setdefault(_key(x), Region(x.untyped_storage())).touch(x)

    def _note_heavy(
        self,
        group: str,
        func: Any,
        args: Any,
        kwargs: Any,
        out: Any,
    ) -> None:
        for x in _tensors((args, kwargs)):
            self._read.setdefault(_key(x), Region(x.untyped_storage())).touch(x)
        # Storages are held so that no later tensor lies at their address. Tensors are not: the
        # engine steals a gradient that nobody else has, and would copy it.
        for x in _tensors(out):
            self._made[_key(x)] = x.untyped_storage()
        kept = tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs))
        key = (func, *(_described(x) for x in tree_leaves(kept)))
        if key in self.calls:
            self.calls[key].count += 1
        else:
            self.calls[key] = _call(group, func, kept[0], kept[1], out)
        if group in RUN:
            made_up = func._schema.name.startswith("crossladder::ssd_")
            run = self.calls[key].run if made_up else partial(func, *kept[0], **kept[1])
            self.order.append((key, run))


def bytes_of(x: Tensor) -> int:
    """Bytes that lie behind a tensor; a dimension that repeats the same ones counts once."""
    numbers = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        numbers *= 1 if stride == 0 and length else length
    return numbers * x.element_size()


def _call(group: str, func: Any, args: Any, kwargs: Any, out: Any) -> Call:
    name = func._schema.name.rpartition("::")[2]
    operands = list(_tensors(args))
    if name.startswith("ssd_"):
        return _ssd_call(name, args)
    flops = flops_of(name, operands) if group == "products" else 0.0
    exponentials = 0.0
    if name.startswith("selective_scan"):
        values, rates = operands[0], next(x for x in operands if x.ndim == 2)
        exponentials = float(values.numel() * rates.shape[1])
    sizes = [bytes_of(x) for x in (*operands, *_tensors(out))]

    def run() -> object:
        return func(*args, **kwargs)

    if group == "products" and not kwargs and not name.endswith("_"):
        space = torch.empty_like(out, requires_grad=False)
        return Call(group, name, _into(name, args, space), flops, sizes, exponentials)
    return Call(group, name, run, flops, sizes, exponentials)


def _ssd_call(name: str, args: Any) -> Call:
    """The products that SSD by chunks consists of, in memory that is there already."""
    values, enter = (args[2], args[5]) if name == "ssd_backward" else (args[0], args[3])
    (rows, length, heads, width), (groups, states) = values.shape, enter.shape[2:]
    size = rows * groups, length, heads // groups, width, states
    products = bench_ssd.make_products(size)[name == "ssd_backward"]

    def run() -> None:
        for left, right, out in products:
            torch.bmm(left, right, out=out)

    flops = sum(flops_of("bmm", [left, right]) for left, right, _ in products)
    return Call("products", name, run, flops, [], 0.0)


def _into(name: str, args: Any, space: Tensor) -> Callable[[], object]:
    """A product into memory that is there already, as the peak's is."""
    function = getattr(torch, name)
    return lambda: function(*args, out=space)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))


def _key(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _described(x: object) -> object:
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else repr(x)

"""Compiled blocks compute what the blocks as written do, and are compiled a few times only.

Beside tests/models, because annotations that are checked at run time cannot be compiled.
"""

import warnings

import pytest
import torch
from torch._dynamo.utils import counters

from models.backbone import build_backbone
from models.compiled import compile_blocks
from models.parts.layers import RMSNorm
from models.sequences.whole import WholeSequence
from sweeps.architecture import read_architectures
from sweeps.rungs import RUNGS
from sweeps.sizing import Shape, size_architecture
from trainer.config import ExecutionConfig
from trainer.objective import total_nats

LENGTHS = (48, 40, 36)
TOLERANCE = 1e-5
MOST_GRAPHS = 24
"""Of two kinds of block: before, inside and after `mix`, for one length, then for any."""
BREAKS = (
    "Skip calling `torch.compiler.disable()`d function",
    # How many checkpoints SCOUT finds in packed documents.
    "Unsupported Tensor.item() call",
)
CAUSAL = sorted(n for n, a in read_architectures().items() if a.model.get("form") != "encoder")


@pytest.fixture
def compiler():
    """A compiler that has seen nothing, and whose own warnings are no errors."""
    torch._dynamo.reset()
    counters.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


def both(name, backend):
    model = size_architecture(name, read_architectures()[name], Shape(RUNGS["10k"], 257, 64)).model
    written, compiled = build_backbone(model, 0), build_backbone(model, 0)
    compile_blocks(compiled, backend)
    return written, compiled


def results(backbone, length):
    """Hidden states, loss and gradients of two rows, each of three documents."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(257, (2, length + 1), generator=generator)
    documents = (torch.arange(length) * 3 // length).int().expand(2, -1).contiguous()
    hidden = backbone(tokens[:, :-1], WholeSequence(documents))
    loss = total_nats(backbone, hidden, tokens[:, 1:])
    backbone.zero_grad()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in backbone.named_parameters()}
    return {"hidden": hidden.detach(), "loss": loss.detach(), **gradients}


def worst(backbones, length):
    """The name of what differs most, and its distance relative to its norm."""
    expected, found = (results(backbone, length) for backbone in backbones)
    assert expected.keys() == found.keys()
    apart = {n: float((found[n] - e).norm() / e.norm()) for n, e in expected.items() if e.norm()}
    return max(apart.items(), key=lambda item: item[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_traced_blocks_give_the_same_hidden_states_losses_and_gradients(name, compiler):
    pair = both(name, "aot_eager")
    for length in LENGTHS[:2]:
        what, apart = worst(pair, length)
        assert apart < TOLERANCE, (what, length)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= MOST_GRAPHS
    assert worst(pair, LENGTHS[2])[1] < TOLERANCE
    assert counters["stats"]["unique_graphs"] == graphs, "a third length was compiled for anew"
    assert all(reason.startswith(BREAKS) for reason in counters["graph_break"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", "mamba2"])
def test_generated_code_gives_the_same_hidden_states_losses_and_gradients(name, compiler):
    what, apart = worst(both(name, "inductor"), LENGTHS[0])
    assert apart < TOLERANCE, what


def test_a_compiled_norm_is_traced_whole(compiler):
    norm = RMSNorm(24)
    torch.nn.init.normal_(norm.weight)
    leaves = (torch.randn(2, 9, 24, requires_grad=True), norm.weight)
    pair = []
    for each in (norm, torch.compile(norm, backend="aot_eager", fullgraph=True)):
        outputs = each(leaves[0])
        pair.append((outputs, *torch.autograd.grad(outputs.square().sum(), leaves)))
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("field", [{"zero_stage": 3}, {"ranks": 2, "sequence_parallel": 2}])
def test_compiling_is_refused_where_blocks_exchange_tensors(field):
    with pytest.raises(ValueError, match="set compile to false"):
        ExecutionConfig(compile=True, **field)

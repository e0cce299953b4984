"""The optimizers against float64 oracles, and which parameters each of them updates."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from models.backbone import Backbone, build_backbone, undecayed
from sweeps.checks import check_run
from sweeps.grammar import read_sweep_file
from tests.oracles import optimizers as oracle
from tests.sweeps.test_grammar import SMOKE
from tests.trainer.study import MAMBA
from trainer.config import ExecutionConfig, RunConfig
from trainer.engine import Engine
from trainer.ids import run_id
from trainer.optimizer import build_optimizer, hidden_matrices
from trainer.schedule import learning_rate
from trainer.schema import ConfigError, load, merge

RATE, DECAY, STEPS = 0.01, 0.1, 3
BETAS, EPS = (0.9, 0.95), 1e-8
ORACLES: dict[str, Callable[..., np.ndarray]] = {
    "adamw": lambda w, g, decay: oracle.adamw(w, g, RATE, decay, BETAS, EPS),
    "lion": lambda w, g, decay: oracle.lion(w, g, RATE, decay, BETAS),
}
KINDS = ("adamw", "muon", "lion")


def config_of(plain: dict, optimizer: dict) -> RunConfig:
    return load(RunConfig, merge(plain, {"optimizer": optimizer}))


def stepped(
    config: RunConfig, backbone: Backbone, gradients: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Weights after steps along given gradients."""
    optimizer = build_optimizer(backbone, config)
    for each in gradients:
        for name, weight in backbone.named_parameters():
            weight.grad = each[name].clone()
        optimizer.step()
    return {name: weight.detach().clone() for name, weight in backbone.named_parameters()}


def random_gradients(backbone: Backbone, steps: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    names = dict(backbone.named_parameters())
    return [
        {name: torch.randn(w.shape, generator=draw) for name, w in names.items()}
        for _ in range(steps)
    ]


def float64(gradients: list[dict[str, torch.Tensor]], name: str) -> list[np.ndarray]:
    return [each[name].double().numpy() for each in gradients]


@pytest.mark.parametrize("kind", ORACLES)
def test_every_parameter_moves_as_the_paper_says(plain: dict, kind: str) -> None:
    plain = {**plain, "architecture": "mamba", "model": MAMBA["model"]}
    config = config_of(plain, {"kind": kind})
    backbone = build_backbone(config.model, 0)
    before = {n: w.detach().double().numpy() for n, w in copy.deepcopy(backbone).named_parameters()}
    gradients = random_gradients(backbone, STEPS)
    after = stepped(config, backbone, gradients)
    exempt = undecayed(backbone)
    for name, weight in after.items():
        decay = 0.0 if name in exempt else DECAY
        wanted = ORACLES[kind](before[name], float64(gradients, name), decay)
        np.testing.assert_allclose(weight.numpy(), wanted, rtol=2e-5, atol=1e-7, err_msg=name)


def test_muon_moves_dense_maps_and_adamw_the_rest(plain: dict) -> None:
    config = config_of(plain, {"kind": "muon"})
    backbone = build_backbone(config.model, 0)
    before = {n: w.detach().double().numpy() for n, w in copy.deepcopy(backbone).named_parameters()}
    gradients = random_gradients(backbone, STEPS)
    after = stepped(config, copy.deepcopy(backbone), gradients)
    as_adamw = stepped(config_of(plain, {}), copy.deepcopy(backbone), gradients)
    hidden = hidden_matrices(backbone)
    assert {name.split(".")[-2] for name in hidden} == {"qkv", "out", "gate_up", "down"}
    assert len(hidden) == 4 * 2
    for name, weight in after.items():
        if name not in hidden:
            assert torch.equal(weight, as_adamw[name]), name
            continue
        wanted = oracle.muon(before[name], float64(gradients, name), RATE, DECAY, 0.95)
        moved = np.linalg.norm(wanted - before[name])
        # torch's iterations are in bfloat16, which has 8 bits.
        assert np.linalg.norm(weight.numpy() - wanted) < 0.02 * moved, name


def test_a_step_of_muon_has_the_size_of_one_of_adamw(plain: dict) -> None:
    sizes = {}
    for kind in ("adamw", "muon"):
        config = config_of(plain, {"kind": kind, "weight_decay": 0.0})
        backbone = build_backbone(config.model, 0)
        before = {n: w.detach().clone() for n, w in backbone.named_parameters()}
        after = stepped(config, backbone, random_gradients(backbone, 20))
        sizes[kind] = {n: float((after[n] - before[n]).square().mean().sqrt()) for n in after}
    for name in hidden_matrices(backbone):
        assert 0.25 < sizes["muon"][name] / sizes["adamw"][name] < 4.0, name


def test_muon_takes_no_table_filter_or_rate_that_a_mixer_holds(plain: dict) -> None:
    plain = {**plain, "architecture": "mamba", "model": MAMBA["model"]}
    backbone = build_backbone(load(RunConfig, plain).model, 0)
    rest = {n.split(".")[-1] for n, w in backbone.named_parameters() if w.ndim == 2} - {"weight"}
    hidden = hidden_matrices(backbone)
    assert rest == {"A_log"}
    assert {name.split(".")[-2] for name in hidden} == {"in_proj", "x_proj", "dt_proj", "out_proj"}


def test_an_untied_head_is_not_a_hidden_matrix(plain: dict) -> None:
    backbone = build_backbone(load(RunConfig, merge(plain, {"model": {"tied": False}})).model, 0)
    assert "unembedding.weight" in dict(backbone.named_parameters())
    assert not {"unembedding.weight", "embedding.weight"} & hidden_matrices(backbone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_state_goes_on_bit_identically(plain: dict, kind: str) -> None:
    config = config_of(plain, {"kind": kind})
    backbone = build_backbone(config.model, 0)
    gradients = random_gradients(backbone, 2 * STEPS)
    whole = stepped(config, copy.deepcopy(backbone), gradients)
    optimizer = build_optimizer(backbone, config)
    for step, each in enumerate(gradients):
        if step == STEPS:
            stored = copy.deepcopy(optimizer.state_dict())
            optimizer = build_optimizer(backbone, config)
            optimizer.load_state_dict(stored)
        for name, weight in backbone.named_parameters():
            weight.grad = each[name].clone()
        optimizer.step()
    for name, weight in backbone.named_parameters():
        assert torch.equal(weight, whole[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_weights_without_gradients_stay(plain: dict, kind: str) -> None:
    config = config_of(plain, {"kind": kind})
    backbone = build_backbone(config.model, 0)
    before = [weight.detach().clone() for weight in backbone.parameters()]
    optimizer = build_optimizer(backbone, config)
    optimizer.step()
    assert all(map(torch.equal, backbone.parameters(), before))
    assert not optimizer.state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peak", [0.01, 0.0001])
def test_independent_decay_follows_the_schedule_and_not_the_peak(
    plain: dict, kind: str, peak: float
) -> None:
    changes = {"kind": kind, "weight_decay": 0.02, "independent_weight_decay": True}
    config = config_of(plain, {**changes, "learning_rate": peak, "learning_rate_scale": 2.0})
    backbone = build_backbone(config.model, 0)
    before = {n: w.detach().double().numpy() for n, w in copy.deepcopy(backbone).named_parameters()}
    optimizer, left = build_optimizer(backbone, config), 1.0
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        for weight in backbone.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        # Warm-up over 4 of 20 steps, then constant, and from step 15 on to nothing.
        left *= 1 - 0.02 * min((step + 1) / 4, 1.0, (20 - step) / 6)
    exempt = undecayed(backbone)
    for name, weight in backbone.named_parameters():
        wanted = before[name] * (1.0 if name in exempt else left)
        np.testing.assert_allclose(weight.detach().numpy(), wanted, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"muon_momentum": 0.9}, r"muon_momentum is 0\.9, but kind adamw has no Muon"),
        ({"kind": "lion", "muon_momentum": 0.9}, "but kind lion has no Muon"),
        ({"kind": "lion", "eps": 1e-6}, r"optimizer\.eps is 1e-06, but kind lion divides"),
        ({"kind": "muon", "muon_momentum": 1.0}, r"muon_momentum 1\.0 is outside 0 to 1"),
        ({"independent_weight_decay": True, "weight_decay": 2.0}, r"weight_decay 2\.0 is outside"),
        ({"kind": "adam"}, "choose from adamw, muon, lion"),
    ],
    ids=str,
)
def test_a_key_of_another_optimizer_is_refused(plain: dict, optimizer: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(plain, optimizer)


def test_the_optimizer_is_part_of_the_run_id(plain: dict) -> None:
    kinds = [{"kind": kind} for kind in KINDS] + [{"kind": "muon", "muon_momentum": 0.9}]
    assert len({run_id(config_of(plain, each)) for each in kinds}) == len(kinds)
    assert run_id(config_of(plain, {"kind": "adamw"})) == run_id(load(RunConfig, plain))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_muon_is_refused_where_zero_cuts_its_matrices(plain: dict, stage: int) -> None:
    config, execution = config_of(plain, {"kind": "muon"}), ExecutionConfig(zero_stage=stage)  # type: ignore[arg-type]
    message = rf"zero_stage is {stage}, but optimizer\.kind muon needs whole matrices"
    with pytest.raises(ValueError, match=message):
        check_run(config, execution)
    with pytest.raises(ValueError, match=message):
        Engine(build_backbone(config.model, 0), config, execution)


def test_a_sweep_refuses_muon_under_zero_before_it_starts() -> None:
    # One of its runs is repeated under ZeRO 2.
    with pytest.raises(ConfigError, match=r"execution\.zero_stage is 2, but optimizer\.kind muon"):
        read_sweep_file(SMOKE, ["optimizer.kind=muon"])

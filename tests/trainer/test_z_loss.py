"""The z-loss and its gradient against float64, whole and in chunks."""

import numpy as np
import pytest
import torch

from models.backbone import build_backbone
from tests.oracles.z_loss import objective
from trainer.config import RunConfig
from trainer.objective import IGNORED, total_losses
from trainer.schema import ConfigError, load

TOKENS = 24


@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("chunk", [TOKENS, 7])
def test_the_objective_and_its_gradient_are_those_of_the_formula(
    plain: dict, weight: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(RunConfig, plain).model
    monkeypatch.setattr("trainer.objective.CHUNK_LOGITS", config.vocab_size * chunk)
    backbone = build_backbone(config, 0)
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, TOKENS // 2, config.d_model, generator=draw) * 10
    hidden.requires_grad_()
    targets = torch.randint(0, 256, (2, TOKENS // 2), generator=draw)
    targets[0, 3:6] = IGNORED
    losses = total_losses(backbone, hidden, targets, weight)
    losses.minimised.backward()
    head = backbone.embedding.weight.detach().double().numpy()
    flat = hidden.detach().flatten(0, 1).double().numpy()
    wanted, gradient = objective(flat, head, targets.flatten().numpy(), weight, IGNORED)
    nats, _ = objective(flat, head, targets.flatten().numpy(), 0.0, IGNORED)
    assert losses.minimised.item() == pytest.approx(wanted, rel=1e-6)
    assert losses.nats.item() == pytest.approx(nats, rel=1e-6)
    assert hidden.grad is not None
    found = hidden.grad.flatten(0, 1).numpy()
    np.testing.assert_allclose(found, gradient, rtol=1e-4, atol=1e-6)


def test_a_negative_weight_is_refused(plain: dict) -> None:
    with pytest.raises(ConfigError, match=r"z_loss -0\.1 is outside 0"):
        load(RunConfig, {**plain, "z_loss": -0.1})

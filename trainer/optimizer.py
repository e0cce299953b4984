"""The optimizer of a run, and which parameters it treats alike."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Muon

from models.backbone import Backbone, multipliers, undecayed
from trainer.config import RunConfig
from trainer.recipe import OptimizerConfig

Groups = list[dict[str, Any]]


def build_optimizer(backbone: Backbone, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer that `optimizer.kind` names.

    At every step the rate of each group is set: the schedule's, times its `rate_multiplier`.
    """
    return _KINDS[config.optimizer.kind](backbone, config.optimizer)


def hidden_matrices(backbone: Backbone) -> set[str]:
    """Names of the weights of dense maps between embedding and head: what Muon is made for.

    A projection that several parts of a mixer share is one matrix. What else a mixer holds, such as
    filters, rates of decay or block-diagonal maps, is not among them.
    """
    dense = {
        f"{path}.weight" for path, part in backbone.named_modules() if isinstance(part, nn.Linear)
    }
    return dense - undecayed(backbone) - {"unembedding.weight"}


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, algorithm 2): each weight moves by the rate, in a sign's direction.

    The sign is that of a mean of gradient and momentum; weight decay is decoupled.

    Args:
        groups: of parameters, each with its weight decay.
        lr: the learning rate.
        betas: the momentum's share in the direction, and its decay.
    """

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the weights that have gradients."""
        assert closure is None, "gradients are computed before the step"
        for group in self.param_groups:
            rate, (direction_beta, momentum_beta) = group["lr"], group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                momentum = state.setdefault("momentum", torch.zeros_like(weight))
                direction = momentum.lerp(weight.grad, 1 - direction_beta).sign_()
                weight.mul_(1 - rate * group["weight_decay"]).sub_(direction, alpha=rate)
                momentum.lerp_(weight.grad, 1 - momentum_beta)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the first group and AdamW for the others, as one optimizer with one state."""

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._muon, self._adamw = muon, adamw

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the weights that have gradients."""
        assert closure is None, "gradients are computed before the step"
        # Anew at each step: a loaded state replaces the groups.
        self._muon.param_groups, self._adamw.param_groups = (
            self.param_groups[:1],
            self.param_groups[1:],
        )
        for part in (self._muon, self._adamw):
            part.state = self.state
            part.step()


def _lion(backbone: Backbone, options: OptimizerConfig) -> Lion:
    groups = _groups(backbone, options, (name for name, _ in backbone.named_parameters()))
    return Lion(groups, options.learning_rate, (options.beta1, options.beta2))


def _adamw(backbone: Backbone, options: OptimizerConfig) -> torch.optim.AdamW:
    groups = _groups(backbone, options, (name for name, _ in backbone.named_parameters()))
    return _adamw_of(groups, options)


def _muon(backbone: Backbone, options: OptimizerConfig) -> MuonAndAdamW:
    hidden = hidden_matrices(backbone)
    matrices = [p for name, p in backbone.named_parameters() if name in hidden]
    muon = Muon(
        [{"params": matrices, "weight_decay": _decay(options), "rate_multiplier": 1.0}],
        lr=options.learning_rate,
        momentum=options.muon_momentum,
        # Updates of the size of AdamW's, so that one rate serves both (Liu et al. 2025, eq. 4).
        adjust_lr_fn="match_rms_adamw",
    )
    rest = (name for name, _ in backbone.named_parameters() if name not in hidden)
    return MuonAndAdamW(muon, _adamw_of(_groups(backbone, options, rest), options))


def _adamw_of(groups: Groups, options: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=True,
    )


def _groups(backbone: Backbone, options: OptimizerConfig, names: Iterable[str]) -> Groups:
    """A group for each multiplier, decayed and then undecayed (vectors, and what a mixer marks)."""
    exempt, parameters = undecayed(backbone), dict(backbone.named_parameters())
    factors, members = multipliers(backbone), {}
    for name in names:
        members.setdefault((name in exempt, factors[name]), []).append(parameters[name])
    return [
        {
            "params": members[spared, factor],
            # Rate times decay stays, as in the authors' package of muP.
            "weight_decay": 0.0 if spared else _decay(options) / factor,
            "rate_multiplier": factor,
        }
        for spared, factor in sorted(members)
    ]


def _decay(options: OptimizerConfig) -> float:
    """The weight decay that an optimizer is given, which multiplies it by the learning rate."""
    return options.weight_decay / (options.peak if options.independent_weight_decay else 1.0)


_KINDS: Mapping[str, Callable[[Backbone, OptimizerConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
    "lion": _lion,
}

"""The config classes of a training recipe: the optimizer, and the learning-rate schedule."""

import math
from dataclasses import dataclass
from typing import Literal

from trainer.field_checks import require_default, require_positive, require_within


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its batch."""

    learning_rate: float
    """Peak learning rate, above 0; the same for all architectures of a rung. In a sweep the
    ladder's rule gives it."""
    batch_tokens: int
    """Tokens per optimizer step, over all ranks and accumulated micro-batches; a multiple of
    corpus.seq_len. In a sweep the ladder gives it."""
    learning_rate_scale: float = 1.0
    """The architecture's own factor on the learning rate, above 0. In a sweep the architecture's
    file gives it, with the search that it was read off."""
    kind: Literal["adamw", "muon", "lion"] = "adamw"
    """adamw (Loshchilov and Hutter 2019); muon (Jordan et al. 2024) for the weights of dense maps
    between embedding and head, and AdamW at the same rate for all other parameters: Muon's updates
    are given the size of AdamW's (Liu et al. 2025); lion (Chen et al. 2023), which wants a rate 3
    to 10 times smaller."""
    weight_decay: float = 0.1
    """Decoupled weight decay, 0 or more; norms, biases and what a mixer exempts are not decayed.
    0.1 as in GPT-3 (Brown et al. 2020, appendix B)."""
    independent_weight_decay: bool = False
    """Whether weights shrink by weight_decay times the schedule's share of the peak, whatever the
    peak (Wortsman et al. 2023, section 3.2); weight_decay is then about 1e-4, and at most 1. If
    not, by weight_decay times the learning rate."""
    beta1: float = 0.9
    """Decay of the gradient's running mean, 0 to 1 (GPT-3); under lion the running mean's share in
    the direction."""
    beta2: float = 0.95
    """Decay of the squared gradient's running mean, 0 to 1 (GPT-3); under lion of the gradient's,
    0.98 or 0.99 in its paper."""
    eps: float = 1e-8
    """Added to the root of the squared gradient's mean, above 0 (Kingma and Ba 2015)."""
    muon_momentum: float = 0.95
    """Decay of Muon's running mean of the gradient, 0 to 1 (Jordan et al. 2024)."""
    gradient_clip: float = 1.0
    """Largest global gradient norm, above 0; a larger gradient is scaled down to it (GPT-3)."""
    ema_decay: float | None = None
    """Decay per step, between 0 and 1, of a moving average of the weights, such as 0.99.
    Evaluations and the stored model are of the average; null for the weights themselves."""
    max_skipped_steps: int = 0
    """Consecutive steps with a non-finite loss or gradient that are skipped; one more ends the run
    as diverged."""

    @property
    def peak(self) -> float:
        """The learning rate after the warm-up."""
        return self.learning_rate * self.learning_rate_scale

    def __post_init__(self) -> None:
        require_positive(self, "learning_rate", "batch_tokens", "learning_rate_scale", "eps")
        require_positive(self, "gradient_clip")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} {getattr(self, name)} is outside 0 to 1, 1 left out; choose within it"
                )
        require_within(self, 0, math.inf, "weight_decay", "max_skipped_steps")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay {self.ema_decay} is not between 0 and 1; choose within, or null for no "
                "average"
            )
        if self.independent_weight_decay:
            require_within(self, 0, 1, "weight_decay")
        if self.kind != "muon":
            require_default(self, "muon_momentum", because=f"kind {self.kind} has no Muon in it")
        if self.kind == "lion":
            require_default(self, "eps", because="kind lion divides by nothing")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over a run: a linear warm-up, then what `kind` says."""

    warmup_tokens: int
    """Tokens over which the learning rate rises linearly from 0; the same at all horizons, so that
    they share a trunk. In a sweep the ladder gives it."""
    kind: Literal["wsd", "cosine", "linear"] = "wsd"
    """wsd for warm-up, stable, decay (Hu et al. 2024, section 4), whose horizons share the stable
    part; cosine (Loshchilov and Hutter 2017) and linear fall from the end of the warm-up to the end
    of the run, so that each horizon is trained from scratch."""
    decay_fraction: float = 0.2
    """Last share of the budget, 0 to 1, over which wsd decays; 0 for none. 10 to 20 % of the steps
    do as well as a cosine schedule (Haegele et al. 2024)."""
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """How the learning rate falls in the decay of wsd: linear; cosine, half a period; sqrt, by 1
    minus the root of the share of the decay that is done (Haegele et al. 2024)."""
    final_share: float = 0.0
    """Learning rate at the end of the decay as a share of the peak, 0 to 1."""

    def __post_init__(self) -> None:
        require_within(self, 0, math.inf, "warmup_tokens")
        require_within(self, 0, 1, "decay_fraction", "final_share")
        if self.kind != "wsd":
            because = f"kind {self.kind} decays from the end of the warm-up to the end of the run"
            require_default(self, "decay_fraction", "decay_shape", because=because)

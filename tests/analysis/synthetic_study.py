"""A sweep folder made from a known law, with known effects and noise, in the real record format."""

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np
import yaml

from trainer.record import RunRecord

SIZES = {"r9k": 9e3, "r16k": 1.6e4, "r30k": 3e4, "r55k": 5.5e4, "r100k": 1e5}


@dataclass(frozen=True)
class Study:
    """The truth behind a synthetic sweep.

    `corpus_effect` and `architecture_effect` are added to ln L; `seed_sd` is drawn once a trunk,
    `point_sd` once a point. `optimum` is where an architecture's best rate and batch lie, in log2
    of those in use, and `curvature` what a factor of two costs on ln L. At `probed` rungs each
    architecture is trained with each of `probe_factors` on its rate, and on its batch;
    `probe_state` (by place in the list) ends probes in another state, as `state` ends runs.
    """

    architectures: tuple[str, ...] = ("transformer", "mamba")
    corpora: tuple[str, ...] = ("web", "code")
    sizes: dict[str, float] = field(default_factory=lambda: dict(SIZES))
    horizons: tuple[float, ...] = (4.5e5, 9e5, 1.8e6)
    seeds: dict[str, tuple[int, ...]] = field(default_factory=lambda: {"r30k": (0, 1)})
    evaluation_sets: tuple[str, ...] = ("prose", "code")
    law: tuple[float, float, float, float, float] = (0.9, 30.0, 0.35, 60.0, 0.33)
    corpus_effect: float = 0.08
    architecture_effect: float = -0.015
    interaction: float = 0.0
    seed_sd: float = 0.003
    point_sd: float = 0.001
    flops_factor: dict[str, float] = field(
        default_factory=lambda: {"transformer": 7.5, "mamba": 6.6}
    )
    state: dict[int, str] = field(default_factory=dict)
    certificate_of: str = "order"
    optimum: dict[str, tuple[float, float]] = field(default_factory=dict)
    curvature: float = 0.03
    probed: tuple[str, ...] = ()
    probe_factors: tuple[float, ...] = (0.5, 2.0)
    probe_state: dict[int, str] = field(default_factory=dict)

    def mistuning(self, architecture: str, rate: float = 1.0, batch: float = 1.0) -> float:
        """What factors on the rate and the batch in use add to the best ln L."""
        best = self.optimum.get(architecture, (0.0, 0.0))
        away = (np.log2(rate) - best[0], np.log2(batch) - best[1])
        return float(self.curvature * (away[0] ** 2 + away[1] ** 2))

    def loss(self, parameters, tokens):
        floor, size, alpha, data, beta = self.law
        return floor + size * parameters**-alpha + data * tokens**-beta

    def effect(self, architecture: str, corpus: str, evaluation_set: str) -> float:
        arm = self.architectures.index(architecture)
        mixture = self.corpora.index(corpus)
        sign = 1.0 if evaluation_set == "prose" else -1.5
        return (
            sign * self.corpus_effect * mixture
            + self.architecture_effect * arm
            + self.interaction * arm * mixture
        )

    def trunks(self) -> Iterator[tuple[str, str, str, int]]:
        for architecture, corpus, rung in product(self.architectures, self.corpora, self.sizes):
            for seed in self.seeds.get(rung, (0,)):
                yield architecture, corpus, rung, seed


def write(study: Study, root: Path, generator: np.random.Generator) -> Path:
    """Write the sweep; runs in `study.state` (by place in the list) end in that state instead."""
    runs, trunks = [], []
    for trunk in study.trunks():
        trunk_id = _identity("trunk", *trunk)
        shift = study.mistuning(trunk[0]) + generator.normal(0.0, study.seed_sd)
        _write_trunk(study, root, trunk, shift)
        trunks.append(trunk_id)
        for horizon in study.horizons:
            run_id = _identity("run", *trunk, horizon)
            noise = shift + generator.normal(0.0, study.point_sd)
            _write_run(study, root / run_id, trunk, (horizon, noise), study.state.get(len(runs)))
            runs.append(run_id)
    probes = _write_probes(study, root, generator)
    sweep = {
        "name": root.name,
        **({"probes": probes} if probes else {}),
        "runs": runs,
        "trunks": trunks,
        "neutral_set": "prose",
        "context": {"question": "synthetic"},
    }
    (root / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    return root


def _write_probes(study, root, generator):
    """The probes of the first corpus, the longest horizon and seed 0, as sweep.yaml lists them."""
    factors = [(each, 1.0) for each in study.probe_factors]
    factors += [(1.0, each) for each in study.probe_factors]
    probes = {}
    for rung, architecture, pair in product(study.probed, study.architectures, factors):
        trunk = (architecture, study.corpora[0], rung, 0)
        run_id = _identity("probe", *trunk, pair)
        sd = np.hypot(study.seed_sd, study.point_sd)
        noise = study.mistuning(architecture, *pair) + generator.normal(0.0, sd)
        point, state = (max(study.horizons), noise), study.probe_state.get(len(probes))
        _write_run(study, root / run_id, trunk, point, state, pair)
        probes[run_id] = {"learning_rate_factor": pair[0], "batch_factor": pair[1]}
    return probes


def _write_run(study, path, trunk, point, state, factors=(1.0, 1.0)):
    if state == "not started":
        return
    horizon, noise = point
    steps = int(horizon / 4096)
    with closing(RunRecord(path)) as record:
        record.write_config(_config(study, trunk, horizon, factors))
        record.write_provenance(_provenance(study, trunk, path.name))
        for step in range(1, steps + 1, max(1, steps // 4)):
            record.append_metrics(_metrics(step))
        if state in ("diverged", "running", "failed"):
            record.write_status(state, step=steps // 2, error="loss is not finite")
            if state == "diverged":
                record.write_summary(
                    {"state": "diverged", "step": steps // 2, "tokens": horizon / 2}
                )
            return
        _evaluate(study, record, trunk, (horizon, noise), True)
        record.write_status("done")
        record.write_summary({"state": "done", "step": steps, "tokens": horizon})


def _write_trunk(study, root, trunk, shift):
    trunk_id = _identity("trunk", *trunk)
    with closing(RunRecord(root / trunk_id)) as record:
        record.write_config(_config(study, trunk, max(study.horizons)))
        record.write_provenance(_provenance(study, trunk, trunk_id))
        for tokens in np.geomspace(min(study.horizons) / 4, 0.8 * max(study.horizons), 8):
            _evaluate(study, record, trunk, (float(tokens), shift + 0.03), False)
        record.write_status("stopped")


def _evaluate(study, record, trunk, point, decayed):
    architecture, corpus, rung, seed = trunk
    tokens, noise = point
    parameters = _parameters(study, architecture, rung)
    for name in study.evaluation_sets:
        effect = study.effect(architecture, corpus, name)
        loss = study.loss(parameters, tokens) * np.exp(effect + noise)
        targets = 200_000
        order = (corpus, seed, tokens) if study.certificate_of == "order" else (*trunk, tokens)
        record.append_evaluations(
            [
                {
                    "step": int(tokens / 4096),
                    "tokens": int(tokens),
                    "evaluation_set": name,
                    "evaluation_id": "e1",
                    "total_nats": float(loss * targets),
                    "targets": targets,
                    "utf8_bytes": targets,
                    "bits_per_byte": float(loss / np.log(2)),
                    "decayed": decayed,
                    "certificate": _identity(*order),
                }
            ]
        )


def _metrics(step):
    return {
        "step": step,
        "tokens": step * 4096,
        "loss_nats": 3.0 + 2.5 / step**0.5,
        "learning_rate": 1e-3,
        "step_seconds": 0.05,
        "gradient_norm": 1.0,
        "certificate": "00",
        "skipped": False,
        "tokens_per_second": 1e5,
    }


def _parameters(study, architecture, rung):
    # Arms of a rung match within 2 %, as real shapes do.
    return study.sizes[rung] * (1.0 + 0.02 * study.architectures.index(architecture))


def _config(study, trunk, horizon, factors=(1.0, 1.0)):
    architecture, corpus, rung, seed = trunk
    return {
        "architecture": architecture,
        "rung": rung,
        "nominal_parameters": int(study.sizes[rung]),
        "corpus": {"name": corpus, "dataset": "embedded", "seq_len": 256, "domains": {corpus: 1.0}},
        "optimizer": {
            "batch_tokens": int(4096 * factors[1]),
            "learning_rate": 0.004 * factors[0],
        },
        "schedule": {"decay_fraction": 0.2},
        "budget": {"tokens": int(horizon)},
        "seed": seed,
    }


def _provenance(study, trunk, run_id):
    architecture, _, rung, _ = trunk
    parameters = _parameters(study, architecture, rung)
    factor = study.flops_factor.get(architecture, 7.0)
    return {
        "accounting": {
            "total_parameters": int(parameters),
            "non_embedding_parameters": int(0.8 * parameters),
            "training_flops_per_token": factor * parameters,
            "training_flops_per_token_full_attention": 1.1 * factor * parameters,
            "training_flops_per_token_six_n": 6 * 0.8 * parameters,
            "scan_flops_per_token": 10.0,
            "state_bytes": 1024,
        },
        "run_id": run_id,
        "trunk_id": _identity("trunk", *trunk),
        "dataset_root_hash": "d0",
        "commit": "c0ffee",
        "hostname": "host",
    }


def _identity(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]

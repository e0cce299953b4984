"""What our fits of the published tables give, one value for each row of reference_values.csv.

The tables lie beside the checkout, or in the folder that CROSSLADDER_PUBLISHED names; they are not
ours to ship.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.fitting.estimator import Estimator, Fit
from analysis.fitting.solver import Problem, polish, solve
from analysis.inference.bootstrap import Bootstrap, replicate
from analysis.laws.bound import bind, log_loss
from analysis.laws.catalog import CHINCHILLA
from analysis.laws.law import Law, Term
from analysis.laws.transformed import REPEAT
from analysis.tables.frames import floats, keep
from tests.analysis.parameters import theta_of

FOLDER = Path(
    os.environ.get("CROSSLADDER_PUBLISHED", Path(__file__).parents[3] / "shared" / "data")
)
HOFFMANN = {"A": np.exp(6.0073404), "alpha": 0.33917084, "B": np.exp(6.0179186),
            "beta": 0.2849083, "E": np.exp(0.5267228)}  # fmt: skip
ROUNDED = {"A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28, "E": 1.69}
HEADLINE = {"A": 482.01, "alpha": 0.3478, "B": 2085.43, "beta": 0.3658, "E": 1.8172}
DATABLATIONS = {"A": np.exp(6.255414), "alpha": 0.3526596, "B": np.exp(7.3049974),
                "beta": 0.3526596, "E": np.exp(0.6254804)}  # fmt: skip
REPEATED = {"R_D": 15.387756, "R_N": 5.309743}
LARGEST_PILE_MODEL = 3e9
"""Both arms reach this size; one of them has a single larger model."""


@dataclass(frozen=True)
class Reference:
    """One published or recomputed value, and how near a correct fit comes to it."""

    id: str
    quantity: str
    target: float
    tolerance: float
    kind: str
    basis: str

    @property
    def allowance(self) -> float:
        """The tolerance in the unit of the target."""
        return self.tolerance * (abs(self.target) if self.kind == "rel" else 1.0)

    def holds(self, found: float) -> bool:
        """Whether a value is within the tolerance, or not above the bound."""
        miss = found - self.target
        return miss <= self.allowance if self.kind == "le" else abs(miss) <= self.allowance


def references() -> list[Reference]:
    """Every listed value; none if the tables are not here."""
    file = FOLDER / "reference_values.csv"
    if not file.exists():
        return []
    columns = ["id", "quantity", "target", "tolerance", "tolerance_kind", "basis"]
    rows = pd.read_csv(file)[columns].to_numpy().tolist()
    return [Reference(*row) for row in rows]


def measure() -> dict[str, float]:
    """Our value for each reference, by id; the targets are not looked at."""
    return dict([*_chinchilla(), *_bootstrap(), *_repetition(), *_pile()])


def chinchilla_points() -> pd.DataFrame:
    """All 245 points, in the columns of the analysis."""
    points = pd.read_csv(FOLDER / "chinchilla_epoch245.csv")
    named = points.rename(
        columns={"N": "parameters", "D": "tokens", "C": "flops", "loss": "loss_nats"}
    )
    run = points["run"].astype(str)
    return named.assign(
        run_id=run, trunk_id=run, corpus="web", architecture="transformer"
    ).reset_index(drop=True)


def kept(points: pd.DataFrame) -> pd.DataFrame:
    """The points that the replication keeps: all below the fifth largest loss."""
    loss = floats(points, "loss_nats")
    return keep(points, loss < np.sort(loss)[-5]).reset_index(drop=True)


def repeated_points() -> pd.DataFrame:
    """The runs with repeated data, in the columns of the analysis."""
    points = pd.read_csv(FOLDER / "datablations_c4_fit182.csv")
    return points.rename(
        columns={"N": "parameters", "D": "tokens", "U": "unique_tokens", "loss": "loss_nats"}
    )


def objective(rows: pd.DataFrame, law: Law, values: dict[str, float], delta: float) -> float:
    """The sum of Huber terms at given parameters."""
    form = bind(law, rows)
    y = np.log(floats(rows, "loss_nats"))
    problem = Problem(form.design(rows), y, np.ones(len(rows)), delta)
    return float(problem.objective(theta_of(form, values)[None])[0])


def fitted(rows: pd.DataFrame, law: Law, delta: float) -> Fit:
    """A fit that may not be refused."""
    result = Estimator(delta=delta).fit(rows, law)
    assert isinstance(result, Fit), str(result)
    return result


def _chinchilla() -> Iterator[tuple[str, float]]:
    rows = kept(chinchilla_points())
    yield "chin.n240", float(len(rows))
    robust = fitted(rows, CHINCHILLA, 1e-3)
    p = robust.parameters
    yield "chin.d1e3.obj", robust.objective
    for name in ("E", "A", "B", "alpha", "beta"):
        yield f"chin.d1e3.{name}", p[name]
    share = p["beta"] / (p["alpha"] + p["beta"])
    scale = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    yield "chin.d1e3.aN", share
    yield "chin.d1e3.DN", scale**-2 * (5.76e23 / 6) ** (1 - 2 * share)
    for name, values in (("unrounded", HOFFMANN), ("rounded", ROUNDED)):
        yield f"chin.obj_hoffmann_{name}", objective(rows, CHINCHILLA, values, 1e-3)
    squares = fitted(rows, CHINCHILLA, np.inf).parameters
    for name in ("E", "A", "B", "alpha", "beta"):
        yield f"chin.ls.{name}", squares[name]
    every = fitted(chinchilla_points(), CHINCHILLA, 1e-3).parameters
    for name in ("E", "beta", "alpha"):
        yield f"chin.all245.{name}", every[name]


def _bootstrap() -> Iterator[tuple[str, float]]:
    result = fitted(kept(chinchilla_points()), CHINCHILLA, 1e-3)
    replicates = replicate(result, 4000, np.random.default_rng(0))
    for name, values in _reported(result, replicates).items():
        low, high = np.quantile(values, [0.025, 0.975])
        yield f"chin.boot.SE_{name}", float(values.std())
        yield f"chin.boot.{name}_lo", float(low)
        yield f"chin.boot.{name}_hi", float(high)


def _reported(result: Fit, replicates: Bootstrap) -> dict[str, np.ndarray]:
    values = result.form.natural(replicates.theta, "")
    return {n: np.exp(v) if n in result.law.logs else v for n, v in values.items()}


def _repetition() -> Iterator[tuple[str, float]]:
    rows = repeated_points()
    law = replace(REPEAT, fixed=tuple(DATABLATIONS.items()))
    loss = floats(rows, "loss_nats")

    def explained(of: Law, values: dict[str, float]) -> float:
        form = bind(of, rows)
        fit = np.exp(log_loss(form.design(rows), theta_of(form, values)[None])[0])
        return float(1 - ((loss - fit) ** 2).sum() / ((loss - loss.mean()) ** 2).sum())

    yield "dc.r2_nodecay", explained(CHINCHILLA, DATABLATIONS)
    yield "dc.r2_pub", explained(law, REPEATED)
    yield "dc.obj_pub", objective(rows, law, REPEATED, 1e-3)
    form = bind(law, rows)
    problem = Problem(form.design(rows), np.log(loss), np.ones(len(rows)), 1e-3)
    near = solve(problem, theta_of(form, {"R_D": 10.0, "R_N": 10.0})[None], 1e-12)[0][0]
    yield "dc.local", float(np.exp(form.natural(polish(problem, near)[0], "")["R_D"]))
    yield "dc.best_obj", fitted(rows, law, 1e-3).objective


def _pile() -> Iterator[tuple[str, float]]:
    models = pd.read_csv(FOLDER / "llmline_hf_models.csv")
    mine = models["Architecture"].isin(["Mamba", "Mamba2"]) | models["Name"].str.contains("pythia")
    alike = (models["Pretraining Data"] == "The Pile") & (models["Size"] < LARGEST_PILE_MODEL)
    rows = keep(models, mine & alike).rename(
        columns={"Size": "parameters", "Architecture": "architecture"}
    )
    size = Term("A", CHINCHILLA.terms[0].factors)
    law = Law("size", (size,), by=("architecture",), varies=frozenset({"A"}))
    for suffix, column in (
        ("", "The Pile UC Validation Loss"), (".c4", "C4 Validation Loss"),
    ):  # fmt: skip
        p = fitted(rows, replace(law, target=column), np.inf).parameters
        for name, label in (("mamba", "Mamba"), ("mamba2", "Mamba2")):
            ratio = p["A [GPT]"] / p[f"A [{label}]"]
            yield f"pile.{name}{suffix}", ratio ** (1 / p["alpha"])

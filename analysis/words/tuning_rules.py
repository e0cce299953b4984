"""Rules of the learning rate in words, and as the data that an architecture's YAML holds."""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd

from analysis.effects.learning_rates import edge
from analysis.effects.tuning_regret import summary
from analysis.effects.tuning_rule import AXES, CELL, Rules
from analysis.tables.frames import floats, groups, where
from analysis.words.numbers import with_unit


def rule_entry(rules: Rules, architecture: str, search: str, unseen: pd.DataFrame) -> dict:
    """The `tuning` entry of an architecture's YAML."""
    place = rules.architectures.index(architecture)
    intercept, *exponents = rules.values[place].tolist()
    ranges = rules.ranges[architecture]
    entry: dict = {
        "search": search,
        "learning_rate": float(f"{2.0**intercept:.4g}"),
        "pivot": {axis: int(value) for axis, value in rules.pivot.items()},
        "exponents": {axis: round(each, 4) for axis, each in zip(AXES, exponents, strict=True)},
        "log2_error": round(_largest_error(rules, architecture), 3),
        **{axis: [int(end) for end in ranges[axis]] for axis in AXES},
    }
    mine = where(unseen, "architecture", architecture)
    if len(mine):
        row = summary(mine, ["rung"]).to_dict("records")[0]
        entry["regret"] = {
            "rung": str(row["rung"]),
            **{key: round(float(row[key]), 2) for key in ("percent", "low", "high")},
        }
    return entry


def rule_lines(rules: Rules) -> Iterator[str]:
    """One line per architecture, then what is shared."""
    at = f"N {with_unit(rules.pivot['parameters'])}, D {with_unit(rules.pivot['tokens'])}, batch "
    at += with_unit(rules.pivot["batch_tokens"])
    errors = np.hypot(rules.draws.std(axis=0), np.sqrt(np.mean(rules.strays**2, axis=0)))
    for place, name in enumerate(rules.architectures):
        words = ", ".join(
            f"{axis} {rules.values[place, k]:+.2f} (se {errors[place, k]:.2f})"
            for k, axis in enumerate(AXES, 1)
        )
        yield (
            f"  {name}: {2.0 ** rules.values[place, 0]:.3g} at {at}; exponents {words}; log2 error "
            f"inside the range {_largest_error(rules, name):.2f}"
        )
    tests = ", ".join(f"{axis} p = {p:.2g}" for axis, p in rules.tests.items())
    yield (
        f"  shared exponents: {', '.join(rules.shared) or 'none'} (tests that they are equal: "
        f"{tests or 'one architecture'}); sd of residuals {100 * rules.scatter:.2g} %; cells lie "
        f"{rules.off.max():.2f} octaves off the rule beyond noise"
    )


def regret_lines(costs: pd.DataFrame, unseen: str) -> Iterator[str]:
    """Regrets by rung, architecture and horizon, the unseen rung first."""
    yield "Regret of the rule of the other rungs, mean over batches [% of loss]:"
    found = summary(costs, ["rung", "architecture", "horizon_tokens"])
    order = np.argsort(found["rung"].to_numpy(dtype=str) != unseen, kind="stable")
    for row in found.iloc[order].to_dict("records"):
        yield (
            f"  {row['rung']}, {row['architecture']}, {with_unit(row['horizon_tokens'])} tokens: "
            f"{row['percent']:.2f} [{row['low']:.2f}, {row['high']:.2f}], worst batch "
            f"{row['largest']:.2f}"
        )
    yield (
        "  The lowest of a cell's trials is expected to lie "
        f"{floats(costs, 'optimism_percent').mean():.2f} % below the true loss of its rate"
    )


def sharing_lines(sharing: pd.DataFrame) -> Iterator[str]:
    """What one rate for all horizons of a trunk costs."""
    if not len(sharing):
        return
    yield "Cost of one rate for all horizons of a trunk, mean over rungs and batches [% of loss]:"
    for row in summary(sharing, ["architecture", "horizon_tokens"]).to_dict("records"):
        yield (
            f"  {row['architecture']}, {with_unit(row['horizon_tokens'])} tokens: "
            f"{row['percent']:.2f} [{row['low']:.2f}, {row['high']:.2f}], "
            f"worst {row['largest']:.2f}"
        )


def left_out_lines(left_out: Mapping[str, str]) -> Iterator[str]:
    """Why some architectures have no rule, and what would give them one."""
    for name, side in left_out.items():
        end, wanted = ("lowest", "lower") if side == "below" else ("highest", "higher")
        yield (
            f"no rule for {name}: in every cell its best trial is at the {end} rate tried, so that "
            f"nothing says where the best rate lies; search {wanted} rates"
        )


def open_lines(trials: pd.DataFrame) -> Iterator[str]:
    """Cells whose best rate, or best batch, is the last one tried."""
    for key, cell in groups(trials, CELL):
        side = edge(cell, "learning_rate")
        if side:
            yield f"not bracketed {side}: {_place(*key[:4])}, batch {with_unit(key[4])}"
    for key, cell in groups(trials, CELL[:4]):
        side = edge(cell, "batch_tokens")
        if side:
            yield f"best batch not bracketed {side}: {_place(*key)}"


def _place(architecture: str, rung: str, corpus: str, horizon: float) -> str:
    return f"{architecture}, {rung} on {corpus}, {with_unit(horizon)} tokens"


def _largest_error(rules: Rules, architecture: str) -> float:
    """The standard error of log2 of the rate at the worst corner of the range."""
    ends = [rules.ranges[architecture][axis] for axis in AXES]
    corners = np.array(np.meshgrid(*ends)).reshape(len(ends), -1)
    rows = pd.DataFrame(dict(zip(AXES.values(), corners, strict=True)))
    return float(rules.log2_error(rows.assign(architecture=architecture)).max())

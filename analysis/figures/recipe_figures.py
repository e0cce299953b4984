"""The figure of training recipes: what each changes of the loss."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import panels
from analysis.figures.report_figure import ReportFigure
from analysis.tables.frames import floats, groups, keep, strings, where
from analysis.words.numbers import with_unit


def draw_recipes(effects: pd.DataFrame, neutral_set: str) -> list[ReportFigure]:
    """The change of each recipe at the last place of each corpus; none without recipes."""
    if not len(effects):
        return []
    places = [part for _, part in groups(effects, ["corpus"])]
    shown = [_last_place(part) for part in places]
    heights = [1.0 + 0.32 * len(part) for part in shown]
    with panels.styled():
        figure = Figure(figsize=(8.8, sum(heights)), layout="constrained")
        axes = np.atleast_1d(figure.subplots(len(shown), 1, height_ratios=heights))
        for ax, part in zip(axes, shown, strict=True):
            names = [f"{a} {r}" for a, r in zip(*_names(part), strict=True)]
            for (name, colour, marker), (_, mine) in zip(
                panels.looks(list(dict.fromkeys(strings(part, "architecture")))),
                groups(part, ["architecture"]),
                strict=True,
            ):
                at = [names.index(f"{name} {recipe}") for recipe in strings(mine, "recipe")]
                ax.hlines(at, floats(mine, "low"), floats(mine, "high"), color=colour, lw=2.4)
                ax.plot(floats(mine, "percent"), at, marker, color=colour, ms=6.5)
            ax.axvline(0.0, color=panels.FAINT, lw=0.9)
            ax.set_yticks(range(len(names)), names)
            ax.set_ylim(len(names) - 0.4, -0.6)
            ax.grid(axis="y", visible=False)
            ax.set_title(_place_words(part))
            ax.set_xlabel(f"change of the loss on {neutral_set} [%]")
    return [ReportFigure("recipes", _title(shown[0]), _caption(shown), figure, effects)]


def _last_place(part: pd.DataFrame) -> pd.DataFrame:
    """The longest horizon of the last rung, sorted by the change within each architecture."""
    last = where(part, "rung", part["rung"].iloc[-1])
    longest = keep(last, floats(last, "horizon_tokens") == floats(last, "horizon_tokens").max())
    return longest.sort_values(["architecture", "percent"], kind="stable", ascending=[False, True])


def _names(part: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return strings(part, "architecture"), strings(part, "recipe")


def _place_words(part: pd.DataFrame) -> str:
    first = part.iloc[0]
    return f"{first['rung']} on {first['corpus']}, {with_unit(first['horizon_tokens'])} tokens"


def _title(part: pd.DataFrame) -> str:
    clear = keep(part, (floats(part, "low") > 0) | (floats(part, "high") < 0))
    if not np.isfinite(floats(part, "low")).all():
        return "What each recipe changes, one seed an arm"
    return f"{len(clear)} of {len(part)} recipes change the loss by more than the seed noise"


def _caption(shown: list[pd.DataFrame]) -> str:
    freedom = int(shown[0]["degrees_of_freedom"].iloc[0])
    intervals = (
        f"intervals: 95 %, from the differences of single seeds, pooled over the recipes "
        f"({freedom} degrees of freedom), without correction for multiple comparisons"
        if freedom
        else "one seed an arm, so no intervals: differences may be noise"
    )
    return (
        "Each recipe against the sweep's own recipe of the same architecture, seed by seed, at the "
        "learning rate that the sweep gives both, by a recipe's own factor where it has one; "
        f"{intervals}. A recipe whose own best rate is another is at a disadvantage here."
    )

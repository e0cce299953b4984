"""The first figure of a report: each effect against model size, with its mean and interval."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.effects.contrasts import Contrast
from analysis.effects.seed_noise import Detectable
from analysis.effects.trend import trend
from analysis.figures import panels
from analysis.figures.report_figure import ReportFigure
from analysis.inference.intervals import Interval
from analysis.study.study import Study
from analysis.tables.frames import floats, where
from analysis.validity.refusal import Refusal
from analysis.words.sentences import short_effect
from analysis.words.trend import trend_sentence


def draw_effects_by_size(study: Study) -> Iterator[ReportFigure]:
    """Corpus and architecture effects on the neutral set by size; nothing without a contrast."""
    by_factor = {
        factor: [each for each in contrasts if isinstance(each, Contrast)]
        for factor, contrasts in (
            ("corpus", study.answer.corpus),
            ("architecture", study.answer.architecture),
        )
    }
    by_factor = {factor: contrasts for factor, contrasts in by_factor.items() if contrasts}
    if not by_factor:
        return
    with panels.styled():
        rows = max(len(contrasts) for contrasts in by_factor.values())
        figure = Figure(
            figsize=(1.2 + 3.8 * len(by_factor), 3.7 + 0.17 * rows), layout="constrained"
        )
        axes = np.atleast_1d(figure.subplots(1, len(by_factor), sharex=True, sharey=True))
        for ax, (factor, contrasts) in zip(axes, by_factor.items(), strict=True):
            plot_effect_by_size(ax, contrasts, study.answer.detectable[factor])
        axes[0].set_ylabel("difference of loss [%]")
    yield ReportFigure(
        "effects_by_size",
        _title(by_factor),
        _caption(study, by_factor),
        figure,
        _data(by_factor),
    )


def plot_effect_by_size(
    ax: Axes, contrasts: Sequence[Contrast], floor: Detectable | Refusal
) -> None:
    """One factor: a mark per size, its matched pairs as ticks, and the mean with its interval.

    With several levels against one baseline, the marks of a level are moved a little to the right
    of those of the level before it.
    """
    if isinstance(floor, Detectable):
        ends = [100 * float(np.expm1(sign * floor.value)) for sign in (-1, 1)]
        ax.axhspan(ends[0], ends[1], color=panels.FAINT, alpha=0.14, lw=0)
        for end in ends:
            ax.axhline(end, color=panels.FAINT, lw=0.7, ls=":")
    ax.axhline(0.0, color=panels.FAINT, lw=0.9)
    # As in the other figures, where the baseline has the first look.
    looks = panels.looks([contrasts[0].baseline, *(each.other for each in contrasts)])[1:]
    for place, (contrast, (_, colour, marker)) in enumerate(zip(contrasts, looks, strict=True)):
        sizes, mean = contrast.percent_by_size, contrast.percent
        across = floats(sizes, "parameters") * 1.06**place
        ax.axhspan(mean.low, mean.high, color=colour, alpha=0.16, lw=0)
        ax.axhline(mean.estimate, color=colour, lw=1.0)
        if len(contrasts) == 1:
            # A thin line per token budget: whether the effect also grows with tokens.
            for _, budget in trend(contrast).places.groupby("tokens"):
                ax.plot(budget["parameters"], budget["percent"], color=colour, lw=0.8, alpha=0.5)
        for size, x in zip(sizes["rung"], across, strict=True):
            pairs = 100 * np.expm1(floats(where(contrast.pairs, "rung", size), "difference"))
            ax.plot(np.full(len(pairs), x), pairs, "_", color=colour, ms=7, mew=0.8, alpha=0.6)
        ax.plot(across, floats(sizes, "percent"), marker, color=colour, ms=6.5, mec=panels.PAPER,
                mew=0.8, label=f"{contrast.other}: {short_effect(contrast)}")  # fmt: skip
    ax.set_title(f"{contrasts[0].factor}, against {contrasts[0].baseline}", pad=5 + 12 * len(looks))
    ax.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(-0.02, 0.985),
              borderaxespad=0, handletextpad=0.2, labelspacing=0.3)  # fmt: skip
    ax.set_xscale("log")
    ax.margins(x=0.08)
    panels.plain_ticks(ax, "x", "parameters")
    ax.set_xlabel("parameters N")


def _title(by_factor: dict[str, list[Contrast]]) -> str:
    largest = [
        max(contrasts, key=lambda each: abs(each.effect.estimate))
        for contrasts in by_factor.values()
    ]
    return " ".join(trend_sentence(each) for each in largest)


def _caption(study: Study, by_factor: dict[str, list[Contrast]]) -> str:
    contrasts = [each for several in by_factor.values() for each in several]
    pairs = sum(len(each.pairs) for each in contrasts)
    sizes = max(len(each.by_size) for each in contrasts)
    text = (
        f"n = {pairs} matched pairs of runs at {sizes} sizes. Marks: mean of a size; thin bars: "
        "its pairs of runs, one per token budget and seed; thin lines: one per token budget, where "
        "there is one contrast. Line and band: mean over sizes with its "
        "95 % t interval. A size has no interval of its own, as its pairs share training."
    )
    floors = study.answer.detectable
    if any(isinstance(floors[factor], Detectable) for factor in by_factor):
        text += " Grey, between dotted lines: effects too small for this study to detect."
    return text


def _data(by_factor: dict[str, list[Contrast]]) -> pd.DataFrame:
    parts = []
    for factor, contrasts in by_factor.items():
        for each in contrasts:
            mean: Interval = each.percent
            parts.append(
                each.percent_by_size.assign(
                    factor=factor, baseline=each.baseline, other=each.other,
                    mean_percent=mean.estimate, low=mean.low, high=mean.high, interval=mean.method,
                )
            )  # fmt: skip
    return pd.concat(parts, ignore_index=True)

"""The figures about effects and what they are sensitive to: title, caption and data of each."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.effects.loss_to_loss import Transfer
from analysis.effects.variance_shares import COMPONENTS, Decomposition
from analysis.figures import effect_panels, panels
from analysis.figures.law_figures import fitted_points, panel_row
from analysis.figures.report_figure import ReportFigure
from analysis.fitting.estimator import Fit
from analysis.study.findings import Findings
from analysis.study.study import Study
from analysis.tables.frames import floats, keep, strings, where
from analysis.words.numbers import bracketed, with_unit
from analysis.words.sentences import law_words


def draw_effects(study: Study, findings: Findings) -> Iterator[ReportFigure]:
    """The figures about effects that a study supports."""
    shares = {n: each for n, each in findings.shares.items() if isinstance(each, Decomposition)}
    if shares:
        yield _shares(shares)
    lines = {n: each for n, each in findings.transfers.items() if isinstance(each, Transfer)}
    if lines:
        yield _transfer(study, lines)
    if len(findings.by_scale):
        yield _multipliers(study, findings)
    if len(findings.counting):
        yield _counting(study, findings)
    if len(findings.cooldown):
        yield _cooldown(study, findings)
    if (
        findings.advice is not None
        and findings.shown is not None
        and isinstance(findings.shown.fit, Fit)
    ):
        yield _design(findings, findings.shown.fit)


def _shares(shares: dict[str, Decomposition]) -> ReportFigure:
    figure = Figure(figsize=(8.8, 1.6 + 0.75 * len(shares)), layout="constrained")
    effect_panels.plot_shares(figure.add_subplot(), shares)
    name, first = next(iter(shares.items()))
    percent = {n: first.shares[n].mapped(lambda value: 100 * value) for n in COMPONENTS}
    title = (
        f"On {name}, corpus explains {bracketed(percent['corpus'])} % and architecture "
        f"{bracketed(percent['architecture'])} % of the variance at equal N and D"
    )
    caption = (
        f"n = {first.cells} matched cells of {first.sizes} sizes; sums of squares of ln L with a "
        "level for each cell, main effects averaged over both orders. Thin bars: 95 % bootstrap "
        "interval over sizes, of the corpus and the architecture share. No law is fitted."
    )
    records = [
        {"evaluation_set": n, "component": c, "share": each.shares[c].estimate,
         "low": each.shares[c].low, "high": each.shares[c].high,
         "sd_of_ln_loss": each.deviations[c].estimate, "interval": each.shares[c].method}
        for n, each in shares.items()
        for c in COMPONENTS
    ]  # fmt: skip
    return ReportFigure("variance_shares", title, caption, figure, pd.DataFrame(records))


def _transfer(study: Study, transfers: dict[str, Transfer]) -> ReportFigure:
    architectures, corpora = study.table.levels("architecture"), study.table.levels("corpus")
    figure, axes = panel_row(list(transfers), "", "evaluated on ", shared=False)
    ends = {
        ax: effect_panels.plot_transfer(ax, each, corpora, architectures)
        for ax, each in zip(axes, transfers.values(), strict=True)
    }
    for ax, labels in ends.items():
        panels.label_ends(ax, labels)
    for name, _, marker in panels.looks(architectures):
        axes[0].plot([], [], marker, color=panels.FAINT, label=name)
    axes[0].legend(frameon=False, fontsize=8.5)
    name, first = next(iter(transfers.items()))
    largest = max(first.shifts, key=lambda key: abs(first.shifts[key].estimate))
    shift = first.shifts[largest].mapped(lambda value: 100 * float(np.expm1(value)))
    title = (
        f"At equal loss on {study.table.neutral_set}, {largest[1]} shifts the loss on {name} most: "
        f"{bracketed(shift)} %"
    )
    caption = (
        f"n = {len(first.points)} runs at matched cells; colour and fill: training corpus; marker: "
        "architecture. Shift: of a line in ln L with one slope for all arms; 95 % interval by "
        "bootstrap over sizes."
    )
    data = pd.concat([each.points.assign(evaluation_set=n) for n, each in transfers.items()])
    return ReportFigure("loss_to_loss", title, caption, figure, data)


def _multipliers(study: Study, findings: Findings) -> ReportFigure:
    figure = Figure(figsize=(6.4, 3.7), layout="constrained")
    ax = figure.add_subplot()
    panels.label_ends(ax, effect_panels.plot_multipliers(ax, findings.by_scale))
    known = keep(findings.by_scale, findings.by_scale["factor"].notna())
    refused = 1 - len(known) / len(findings.by_scale)
    parts = [
        f"{name} {floats(rows, 'factor').min():.2g} to {floats(rows, 'factor').max():.2g}"
        for name in dict.fromkeys(strings(known, "other").tolist())
        for rows in [where(known, "other", name)]
    ]
    baseline = str(findings.by_scale["baseline"].iloc[0])
    title = f"Tokens that {baseline} needs for equal loss, as a multiple: "
    title += "; ".join(parts) or "refused at every size"
    caption = (
        f"n = {fitted_points(study)} decayed points, {law_words(study.joint.law)}. Bands: "
        f"95 % bootstrap interval. No estimate at {refused:.0%} of the sizes: within its runs the "
        "baseline does not reach that loss, or misses it in over 5 % of the replicates."
    )
    return ReportFigure("multipliers_by_size", title, caption, figure, findings.by_scale)


def _counting(study: Study, findings: Findings) -> ReportFigure:
    rows = findings.counting
    figure = Figure(figsize=(8.8, 1.1 + 0.5 * len(rows)), layout="constrained")
    effect_panels.plot_counting(figure.add_subplot(), rows)
    values = floats(rows, "exponent")
    title = (
        f"Exponent of the compute-optimal size: {values.min():.2f} to {values.max():.2f}, by how "
        "N and C are counted"
    )
    caption = (
        f"n = {fitted_points(study)} decayed points, {law_words(study.joint.law)}, first arm; "
        "bars: 95 % bootstrap interval. The same runs in every row."
    )
    return ReportFigure("counting", title, caption, figure, rows)


def _cooldown(study: Study, findings: Findings) -> ReportFigure:
    rows = findings.cooldown
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    ax = figure.add_subplot()
    effect_panels.plot_cooldown(ax, rows, study.table.levels("architecture"))
    sizes, change = np.log(floats(rows, "parameters")), floats(rows, "percent")
    slope = float(np.polyfit(sizes, change, 1)[0]) * np.log(10) if np.ptp(sizes) > 0 else 0.0
    title = (
        f"Learning-rate decay changes loss by {np.median(change):+.1f} % (median), "
        f"{round(slope, 1) + 0.0:+.1f} % more per decade of N"
    )
    caption = (
        f"n = {len(rows)} decayed points, each against its trunk at the same tokens, interpolated "
        "in ln D; no law, no interval. A loss read before the decay is biased by this much."
    )
    return ReportFigure("cooldown", title, caption, figure, rows)


def _design(findings: Findings, fit: Fit) -> ReportFigure:
    assert findings.advice is not None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    identity = {name: findings.options[name].iloc[0] for name in ("architecture", "corpus")}
    done = where(where(fit.rows, "architecture", identity["architecture"]), "corpus",
                 identity["corpus"])  # fmt: skip
    advised = findings.advice.runs
    effect_panels.plot_design(figure.add_subplot(), findings.options, done, advised)
    fits = where(advised, "role", "fit")
    title = "No further run is proposed: " + findings.advice.stop
    if len(fits):
        after, cost = 100 * float(floats(fits, "half_width")[-1]), floats(fits, "flops").sum()
        title = (
            f"{len(fits)} more runs, {with_unit(float(cost))}FLOP in all, would narrow the "
            f"forecast at ten times the compute from +-{100 * findings.advice.half_width:.2g} % to "
            f"+-{after:.2g} %"
        )
    caption = (
        f"n = {len(done)} runs of {identity['architecture']} on {identity['corpus']} (circles). "
        f"Local information under {law_words(fit.law)} and a law with an outer exponent, averaged "
        "over bootstrap draws; half-widths of 95 % intervals are expected, not measured. 'test': a "
        "large run to hold out from every fit."
    )
    return ReportFigure(
        "design_map", title, caption, figure, pd.concat([advised, findings.options])
    )

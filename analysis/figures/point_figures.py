"""The report's figures as files: panels, title and caption, and PNG, SVG and CSV of each."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.effects.contrasts import Contrast
from analysis.effects.seed_noise import Detectable
from analysis.figures import panels
from analysis.figures.report_figure import ReportFigure
from analysis.fitting.estimator import Fit
from analysis.inference.intervals import Interval
from analysis.study.study import Study
from analysis.tables.frames import columns_of, floats, keep, where
from analysis.tables.run_table import along_training
from analysis.words.numbers import bracketed, with_unit
from analysis.words.sentences import largest_effect, law_words


def draw_points(study: Study) -> list[ReportFigure]:
    """The figures of points and effects; none where points differ in their tuning."""
    if study.rate_search is not None:
        return []
    neutral = _neutral(study, study.points.rows)
    with panels.styled():
        plates = []
        if any(isinstance(each, Contrast) for each in _contrasts(study)):
            plates.append(_effects(study))
        if len(neutral):
            plates += [_compute(study), _tokens(study), _parameters(study)]
        if isinstance(study.joint.fit, Fit):
            plates.append(_residuals(study, study.joint.fit))
    return plates


def _effects(study: Study) -> ReportFigure:
    shown = [each for each in _contrasts(study) if isinstance(each, Contrast)]
    floor = _floor(study)
    figure = Figure(figsize=(8.8, 1.1 + 0.46 * len(shown)), layout="constrained")
    panels.plot_effects(figure.add_subplot(), study.effects, floor)
    title = (
        f"Effects on each evaluation set; on {study.table.neutral_set}: corpus "
        f"{largest_effect(study.answer.corpus)}, architecture "
        f"{largest_effect(study.answer.architecture)}"
    )
    sizes = len(shown[0].by_size)
    caption = (
        f"Marks: mean difference of loss with its 95 % t interval over {sizes} sizes; thin bars: "
        f"one per model size. n = {len(shown[0].pairs)} matched pairs in the first row."
    )
    if floor is not None:
        caption += " Grey: effects too small for this study to detect."
    columns = ("evaluation_set", "factor", "baseline", "other")
    records = [
        {name: getattr(each, name) for name in columns}
        | {"percent": each.percent.estimate, "low": each.percent.low, "high": each.percent.high}
        | {"pairs": len(each.pairs), "interval": each.percent.method}
        for each in shown
    ]
    return ReportFigure("data_against_architecture", title, caption, figure, pd.DataFrame(records))


def _compute(study: Study) -> ReportFigure:
    rows = _neutral(study, study.points.rows)
    figure, axes = _panels(study, rows)
    ends = {}
    for ax, corpus in zip(axes, _corpora(study, rows), strict=True):
        mine = where(rows, "corpus", corpus)
        curves = where(study.curves, "corpus", corpus)
        ends[ax] = panels.plot_loss_against_compute(
            ax, mine, curves, study.table.levels("architecture")
        )
    _label(ends)
    best = rows.iloc[int(floats(rows, "loss_nats").argmin())].to_dict()
    arm = f"{best['architecture']} on {best['corpus']}"
    title = f"Lowest loss: {arm}, {best['loss_nats']:.3f} nats at {with_unit(best['flops'])}FLOP"
    caption = f"{_points_text(study, rows)} {_law_text(study, 'fitted frontier in the range run')}"
    return ReportFigure(
        "loss_against_compute", title, caption, figure, _with_curves(study, "frontier")
    )


def _tokens(study: Study) -> ReportFigure:
    rows = _neutral(study, study.points.rows)
    trunks = _neutral(study, along_training(study.table))
    trunks = keep(trunks, ~trunks["decayed"].astype(bool))
    figure, axes = _panels(study, rows)
    ends = {}
    for ax, corpus in zip(axes, _corpora(study, rows), strict=True):
        ends[ax] = panels.plot_loss_against_tokens(
            ax, where(rows, "corpus", corpus), where(trunks, "corpus", corpus),
            study.table.levels("architecture"),
        )  # fmt: skip
    _label(ends)
    _key(figure, study)
    tokens, logs = floats(rows, "tokens"), np.log(floats(rows, "loss_nats"))
    first, last = tokens.min(), tokens.max()
    change = 100 * np.expm1(logs[tokens == last].mean() - logs[tokens == first].mean())
    span = f"{with_unit(first)} to {with_unit(last)}"
    title = f"From {span} tokens, loss changes by {change:+.0f} % on average"
    if first == last:
        title = f"One horizon so far: {with_unit(last)} tokens"
    caption = (
        f"{_points_text(study, rows)} Lines join runs that branch from one trunk; faint: the "
        "trunk itself, before the learning rate decays, on the part of the set that milestones "
        "read. Labels: nominal model size, next to the "
        "first architecture's lines. Measured points, without a fit or an interval."
    )
    data = pd.concat([rows.assign(kind="decayed"), trunks.assign(kind="trunk")])
    columns = [
        "kind",
        "run_id",
        "trunk_id",
        "architecture",
        "corpus",
        "rung",
        "tokens",
        "loss_nats",
    ]
    return ReportFigure("loss_against_tokens", title, caption, figure, columns_of(data, columns))


def _parameters(study: Study) -> ReportFigure:
    rows = _neutral(study, study.points.rows)
    figure, axes = _panels(study, rows)
    ends = {}
    for ax, corpus in zip(axes, _corpora(study, rows), strict=True):
        curves = where(study.curves, "corpus", corpus)
        ends[ax] = panels.plot_loss_against_parameters(
            ax, where(rows, "corpus", corpus), curves, study.table.levels("architecture")
        )
    _label(ends)
    _key(figure, study)
    alpha = study.joint.intervals.get("alpha")
    exponent, method = "", ""
    if isinstance(alpha, Interval):
        exponent = f": exponent {bracketed(alpha)}"
        method = f" Exponent: 95 % interval, {alpha.method}."
    sizes = floats(rows, "parameters")
    span = f"{with_unit(sizes.min())} to {with_unit(sizes.max())}"
    title = f"Loss from {span} parameters{exponent}"
    caption = (
        f"{_points_text(study, rows)} {_law_text(study, 'fitted law at each horizon')}{method}"
    )
    return ReportFigure(
        "loss_against_parameters", title, caption, figure, _with_curves(study, "horizon")
    )


def _residuals(study: Study, fit: Fit) -> ReportFigure:
    rows = fit.rows.assign(
        residual=fit.residuals,
        tokens_per_parameter=fit.rows["tokens"] / fit.rows["parameters"],
        order=np.arange(1.0, len(fit.rows) + 1),
    )
    figure = Figure(figsize=(8.8, 3.1), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    labels = {
        "flops": "training compute C [FLOP]",
        "parameters": "parameters N",
        "tokens_per_parameter": "tokens per parameter D/N",
        "order": "place in the sweep",
    }
    for ax, (variable, label) in zip(axes, labels.items(), strict=True):
        panels.plot_residuals(ax, rows, variable, study.table.levels("architecture"))
        ax.set_xlabel(label)
    axes[-1].set_xscale("linear")
    axes[-1].set_xlim(-0.04 * len(rows), 1.08 * len(rows))
    axes[-1].xaxis.set_major_locator(MaxNLocator(3))
    axes[0].set_ylabel("residual of ln L [%]")
    _key(figure, study)
    title = f"Residuals have a standard deviation of {100 * fit.sigma:.2g} % of loss"
    caption = (
        f"n = {len(rows)} decayed points on {study.table.neutral_set}, {law_words(fit.law)}; grey: "
        "1 % of loss. The standard deviation is a robust estimate without an interval."
    )
    columns = ["run_id", "architecture", "corpus", "parameters", "tokens", "loss_nats", "residual"]
    return ReportFigure("residuals", title, caption, figure, columns_of(rows, columns))


def _panels(study: Study, rows: pd.DataFrame) -> tuple[Figure, Sequence]:
    corpora = _corpora(study, rows)
    figure = Figure(figsize=(1.2 + 3.8 * len(corpora), 3.7), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(corpora), sharex=True, sharey=True))
    for ax, corpus in zip(axes, corpora, strict=True):
        ax.set_title(f"trained on {corpus}")
    axes[0].set_ylabel(f"loss on {study.table.neutral_set} [nats per token]")
    return figure, axes


def _label(ends: dict[Axes, panels.Labels]) -> None:
    for ax, labels in ends.items():
        panels.label_ends(ax, labels)


def _key(figure: Figure, study: Study) -> None:
    """One small key above the panels, where lines carry another label than the architecture."""
    for name, colour, marker in panels.looks(study.table.levels("architecture")):
        figure.axes[0].plot([], [], marker, color=colour, label=name)
    figure.legend(loc="outside upper right", ncols=6, frameon=False, handletextpad=0.2)


def _floor(study: Study) -> float | None:
    floors = [
        each.value for each in study.answer.detectable.values() if isinstance(each, Detectable)
    ]
    return max(floors) if floors else None


def _contrasts(study: Study) -> list[object]:
    return [
        each
        for factors in study.effects.values()
        for contrasts in factors.values()
        for each in contrasts
    ]


def _neutral(study: Study, rows: pd.DataFrame) -> pd.DataFrame:
    return where(rows, "evaluation_set", study.table.neutral_set)


def _corpora(study: Study, rows: pd.DataFrame) -> list[str]:
    present = set(rows["corpus"])
    return [name for name in study.table.levels("corpus") if name in present]


def _points_text(study: Study, rows: pd.DataFrame) -> str:
    trunks = rows["trunk_id"].nunique()
    return f"n = {len(rows)} decayed points of {trunks} trunks on {study.table.neutral_set}."


def _law_text(study: Study, line: str) -> str:
    if isinstance(study.joint.fit, Fit):
        return f"Lines: {line}, {law_words(study.joint.law)}; intervals: see Fitted laws."
    if len(study.curves):
        return f"Lines: {line}, a law per cell; intervals: see Fitted laws."
    return "No fitted line or interval: too few points yet."


def _with_curves(study: Study, kind: str) -> pd.DataFrame:
    rows = _neutral(study, study.points.rows)
    columns = ["kind", "architecture", "corpus", "parameters", "tokens", "flops", "loss_nats"]
    curves = where(study.curves, "kind", kind)
    parts = (rows.assign(kind="point"), curves)
    return pd.concat([columns_of(part, columns) for part in parts if len(part)])

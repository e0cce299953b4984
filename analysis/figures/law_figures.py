"""The figures about fitted laws: title from the numbers, caption with n, law and interval."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.compute_optimal.isoflop import IsoFlopCurve
from analysis.figures import law_panels, panels
from analysis.figures.report_figure import ReportFigure
from analysis.fitting.estimator import Fit
from analysis.inference.intervals import Interval
from analysis.study.findings import Findings
from analysis.study.study import FittedLaw, Study
from analysis.tables.frames import columns_of, floats, keep, where
from analysis.validity.refusal import Refusal
from analysis.words.numbers import with_unit
from analysis.words.sentences import law_words


def draw_laws(study: Study, findings: Findings) -> Iterator[ReportFigure]:
    """The figures about laws that a study supports."""
    if len(findings.frontiers):
        yield _frontier(study, findings)
    if findings.isoflop:
        yield _isoflop(study, findings.isoflop)
    if len(findings.optima) or any(_minima(findings.isoflop)["parameters"].notna()):
        yield _optima(findings)
    if findings.shown is not None and isinstance(findings.shown.fit, Fit):
        yield _contours(findings, findings.shown.fit)
        yield _backtest(findings, findings.shown)
        yield _profiles(findings, findings.shown)
        if findings.shown.replicates is not None:
            yield _cloud(findings.shown, findings.shown.fit)
    if study.choice.description is not None:
        yield _family(study)


def _frontier(study: Study, findings: Findings) -> ReportFigure:
    rows = where(study.points.rows, "evaluation_set", study.table.neutral_set)
    corpora = [c for c in study.table.levels("corpus") if c in set(findings.frontiers["corpus"])]
    figure, axes = panel_row(corpora, f"loss on {study.table.neutral_set} [nats per token]")
    ends = {}
    for ax, corpus in zip(axes, corpora, strict=True):
        ends[ax] = law_panels.plot_frontier(
            ax, where(rows, "corpus", corpus), where(findings.frontiers, "corpus", corpus),
            study.table.levels("architecture"),
        )  # fmt: skip
    for ax, labels in ends.items():
        panels.label_ends(ax, labels)
    speed, device = device_speed(study.table.runs)
    if device:
        for ax in axes:
            law_panels.device_hours(ax, speed)
    edge = floats(rows, "flops").max()
    inside = keep(findings.frontiers, findings.frontiers["inside"])
    wins = inside.sort_values("loss_nats").iloc[0]
    title = (
        f"Lowest fitted loss in the range of the runs: {wins['architecture']} on "
        f"{wins['corpus']}; forecasts end at {with_unit(10 * edge)}FLOP"
    )
    tested = next(iter(findings.tested.values()))
    caption = (
        f"n = {len(rows)} decayed points. Lines: fitted frontier, {law_words(study.joint.law)}; "
        "dashed: extrapolated. Bands: 95 % bootstrap interval, widened beyond the runs by "
        f"{tested.words} and by the spread of alternative laws. Grey: beyond ten times the largest "
        "compute no forecast is given."
    )
    if device:
        caption += (
            f" Top axis: hours of one device ({device}) at {with_unit(speed)}FLOP/s, the median "
            "over the runs, measured while they shared the machine."
        )
    return ReportFigure("frontier", title, caption, figure, findings.frontiers)


def device_speed(runs: pd.DataFrame) -> tuple[float, str]:
    """Median training FLOP/s of one device and its name; no name where it is unknown or mixed."""
    known = keep(runs, runs["flops_per_device_second"].notna() & runs["device"].notna())
    names = known["device"].unique()
    if len(names) != 1:
        return float("nan"), ""
    return float(np.median(floats(known, "flops_per_device_second"))), str(names[0])


def _isoflop(study: Study, curves: dict[str, list[IsoFlopCurve]]) -> ReportFigure:
    figure, axes = panel_row(
        list(curves), f"loss on {study.table.neutral_set} [nats per token]", ""
    )
    ends = {ax: law_panels.plot_isoflop(ax, mine)
            for ax, mine in zip(axes, curves.values(), strict=True)}  # fmt: skip
    for ax, labels in ends.items():
        panels.label_ends(ax, labels)
    every = [curve for mine in curves.values() for curve in mine]
    edges = sum(curve.warning is not None for curve in every)
    title = f"{len(every) - edges} of {len(every)} isoFLOP curves have a bracketed minimum"
    points = sum(len(curve.points) for curve in every)
    caption = (
        f"n = {points} points in {len(every)} budgets. Parabolas in ln N; bars: 95 % delta-method "
        "interval of the minimum; hollow stars: not bracketed, fewer than two sizes on one side."
    )
    return ReportFigure("isoflop", title, caption, figure, _minima(curves))


def _minima(curves: dict[str, list[IsoFlopCurve]]) -> pd.DataFrame:
    records = []
    for name, mine in curves.items():
        for curve in mine:
            size = curve.size
            known = isinstance(size, Interval) and curve.warning is None
            ends = (
                (size.estimate, size.low, size.high)
                if isinstance(size, Interval)
                else (np.nan,) * 3
            )
            note = str(curve.warning or (size if isinstance(size, Refusal) else ""))
            tokens = curve.tokens if known else np.nan
            records.append((name, curve.flops, *(ends if known else (np.nan,) * 3), tokens, note))
    names = ["architecture", "flops", "parameters", "low", "high", "tokens", "note"]
    return pd.DataFrame(records, columns=pd.Index(names))


def _optima(findings: Findings) -> ReportFigure:
    figure, axes = panel_row(["best size N*", "best tokens D*"], "", "", shared=False)
    minima = _minima(findings.isoflop)
    first = findings.optima
    if len(first):
        first = where(first, "corpus", first["corpus"].iloc[0])
    for ax, quantity in zip(axes, ("parameters", "tokens"), strict=True):
        law_panels.plot_optima(ax, first, minima, quantity)
    title = f"Compute-optimal size and tokens: the fitted law and {len(minima)} isoFLOP budgets"
    if not len(minima):
        title = (
            "Compute-optimal size and tokens from the fitted law alone: no isoFLOP budget was run"
        )
    caption = (
        f"n = {len(minima)} budgets. Lines and bands: fitted law, 95 % bootstrap interval, first "
        "corpus, only where the law has an optimum near the runs. Marks: minima of parabolas."
    )
    return ReportFigure("optima", title, caption, figure, pd.concat([first, minima]))


def _contours(findings: Findings, fit: Fit) -> ReportFigure:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    ax = figure.add_subplot()
    rows = where(fit.rows, "architecture", findings.contours["architecture"].iloc[0])
    rows = where(rows, "corpus", findings.contours["corpus"].iloc[0])
    law_panels.plot_contours(ax, findings.contours, rows)
    low, high = (f(findings.contours["loss_nats"].dropna()) for f in (min, max))
    arm = f"{rows['architecture'].iloc[0]} on {rows['corpus'].iloc[0]}"
    title = f"Fitted loss of {arm}: {high:.2f} to {low:.2f} nats over the range of the runs"
    caption = (
        f"n = {len(rows)} decayed points (circles), {law_words(fit.law)}; for intervals see "
        "the frontier. Blank: outside the range of the runs."
    )
    return ReportFigure("contours", title, caption, figure, findings.contours)


def _backtest(findings: Findings, shown: FittedLaw) -> ReportFigure:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    errors = [each.errors for each in findings.tested.values() if len(each.errors)]
    frame = pd.concat(errors) if errors else next(iter(findings.tested.values())).errors
    frame = frame.astype({"decades": float, "error": float})
    tested = {name: each.rate for name, each in findings.tested.items()}
    law_panels.plot_backtest(figure.add_subplot(), frame, tested)
    assumed = all(each.assumed for each in findings.tested.values())
    best = min(tested, key=lambda name: tested[name])
    title = f"Smallest forecast error: {best} law, {100 * tested[best]:.1f} % per decade of compute"
    if assumed:
        title = "Too little range to test forecasts: an error of 5 % per decade is assumed"
    caption = (
        f"n = {len(frame)} forecasts of the largest runs from smaller ones, {shown.part}; grey: "
        f"interval of two root mean square errors of the {best} law, growing with the decades."
    )
    data = frame if len(frame) else pd.DataFrame({"law": list(tested), "rate": tested.values()})
    return ReportFigure("backtest", title, caption, figure, data)


def _profiles(findings: Findings, shown: FittedLaw) -> ReportFigure:
    count = max(len(findings.profiles), 1)
    figure = Figure(figsize=(1.0 + 2.6 * count, 2.9), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, count))
    cloud = _draws(shown)
    for ax, each in zip(axes, findings.profiles, strict=False):
        law_panels.plot_profile(ax, each, cloud[each.label].to_numpy(dtype=float))
    axes[0].set_ylabel("rise of the objective [squared t]")
    open_ends = sum(end is None for each in findings.profiles for end in (each.low, each.high))
    title = f"Profile likelihood: {'; '.join(each.words for each in findings.profiles)}"
    if open_ends:
        title += f" ({open_ends} without an end)"
    caption = (
        f"n = {len(shown.fit.rows) if isinstance(shown.fit, Fit) else 0} points, "
        f"{law_words(shown.law)}. Dashed: level that bounds the 95 % profile interval; histogram: "
        f"bootstrap; diamond: best fit, reached from {_agreeing(shown)} starting points."
    )
    frames = [pd.DataFrame({"parameter": p.label, "value": p.values, "rise": p.rise})
              for p in findings.profiles]  # fmt: skip
    return ReportFigure("profiles", title, caption, figure, pd.concat(frames))


def _agreeing(shown: FittedLaw) -> str:
    fit = shown.fit
    return f"{fit.starts_agreeing} of {fit.starts}" if isinstance(fit, Fit) else "no"


def _draws(shown: FittedLaw) -> pd.DataFrame:
    """The optimum, then the bootstrap's replicates: exponents, and E of the first group."""
    fit = shown.fit
    assert isinstance(fit, Fit)
    assert shown.replicates is not None
    theta = np.vstack([fit.theta[None], shown.replicates.theta])
    natural = fit.form.natural(theta, fit.form.groups[0])
    logs = {"A", "B", "E"}
    values = {name: np.exp(v) if name in logs else v for name, v in natural.items()}
    labels = {name: fit.form.labels[fit.form.slots[name, fit.form.groups[0]]] for name in values}
    return pd.DataFrame({labels[name]: value for name, value in values.items()})


def _cloud(shown: FittedLaw, fit: Fit) -> ReportFigure:
    cloud = _draws(shown)
    names = [fit.form.labels[fit.form.slots[n, fit.form.groups[0]]] for n in ("alpha", "beta", "E")]
    figure = Figure(figsize=(8.8, 3.0), layout="constrained")
    axes = figure.subplots(1, 3)
    pairs = ((0, 1), (0, 2), (1, 2))
    for ax, (x, y) in zip(axes, pairs, strict=True):
        law_panels.plot_cloud(ax, cloud, names[x], names[y])
    close = {pair: float(np.corrcoef(cloud[names[pair[0]]], cloud[names[pair[1]]])[0, 1])
             for pair in pairs}  # fmt: skip
    worst = max(close, key=lambda pair: abs(close[pair]))
    title = f"{names[worst[0]]} and {names[worst[1]]} trade off: correlation {close[worst]:+.2f}"
    method = shown.replicates.method if shown.replicates else ""
    caption = (
        f"n = {len(cloud) - 1} replicates, {method}; {law_words(shown.law)}. Their spread is "
        "what the bootstrap interval is made of. Diamond: best fit."
    )
    return ReportFigure("trade_offs", title, caption, figure, columns_of(cloud, names))


def _family(study: Study) -> ReportFigure:
    figure = Figure(figsize=(8.8, 2.9), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    differs = dict(zip(study.family["law"], study.family["differs between cells"], strict=True))
    named = {law: f"{law}: {what}" for law, what in differs.items()}
    scores = study.choice.table
    shown = scores.assign(named=[named[law] for law in scores["law"]])
    law_panels.plot_family(axes, shown)
    best, forecast = (str(each) for each in (study.choice.description, study.choice.forecast))
    title = (
        f"Parameters that differ between cells: {differs[best]} by BIC, {differs[forecast]} by "
        "held-out trunks"
    )
    caption = (
        f"n = {fitted_points(study)} decayed points; nested Chinchilla laws by least squares, from "
        "all parameters shared by the cells (M0) to none (Mfull). Bars: interval of one standard "
        "error of the held-out error; diamonds: lowest. Points of a trunk are not independent."
    )
    return ReportFigure("nested_laws", title, caption, figure, study.choice.table)


def fitted_points(study: Study) -> int:
    """Points that a joint law sees: the decayed ones of the neutral set."""
    return len(where(study.points.rows, "evaluation_set", study.table.neutral_set))


def panel_row(
    names: Sequence[str], label: str, prefix: str = "trained on ", *, shared: bool = True
) -> tuple[Figure, Sequence[Axes]]:
    """A row of panels, one a name."""
    figure = Figure(figsize=(1.2 + 3.8 * len(names), 3.7), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(names), sharex=shared, sharey=shared))
    for ax, name in zip(axes, names, strict=True):
        ax.set_title(f"{prefix}{name}")
    axes[0].set_ylabel(label)
    return figure, list(axes)

"""Loss of a model whose attention is swapped for HiP and reads fewer keys: figure and table."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from scipy import stats

from analysis.figures import panels
from analysis.figures.report_figure import ReportFigure
from analysis.inference.intervals import LEVEL
from analysis.tables.frames import floats, keep
from analysis.words.numbers import with_unit

WORDS = {
    "row": "row: each query chooses",
    "block": "block: 32 queries choose together",
    "recent": "recent: the last keys, 2 searched",
}
LOOKS = {name: (panels.COLOURS[i], panels.MARKERS[i]) for i, name in enumerate(WORDS)}


def draw(report: Mapping[str, Any]) -> ReportFigure:
    """Loss minus dense against keys kept, what searches found of the best keys, and their cost."""
    data = _frame(report)
    with panels.styled():
        figure = Figure(figsize=(11.4, 4.3), layout="constrained")
        loss, recall, cost = figure.subplots(1, 3)
        _draw_loss(loss, data)
        _draw_recall(recall, data)
        _draw_cost(cost, data, float(report["dense_keys_scored"]))
        for ax in (loss, recall, cost):
            _k_axis(ax, data)
    return ReportFigure("hip", _title(data, report), _caption(data, report), figure, data)


def table_rows(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The columns and the rows of a table for the terminal."""
    columns = ["selection", "k", "loss", "minus dense (95 %)", "worst token"]
    columns += ["recall@k", "by chance", "keys scored", "keys read"]
    rows = [
        [
            str(row["selection"]),
            str(row["k"]),
            f"{row['loss_nats']:.4f}",
            f"{row['minus_dense_nats']:+.5f} +- {row['half_width_nats']:.5f}",
            f"{row['largest_token_difference_nats']:.1e}",
            _share(row["recall"]),
            _share(row["chance_recall"]),
            f"{row['keys_scored']:.0f}",
            f"{row['most_keys_read']:.0f}",
        ]
        for row in _frame(report).to_dict("records")
    ]
    return columns, rows


def _frame(report: Mapping[str, Any]) -> pd.DataFrame:
    """One row a point, with the mean difference over sequences and its 95 % t interval."""
    rows = []
    for row in report["rows"]:
        differences = np.array(row["differences_nats"])
        rest = {name: value for name, value in row.items() if name != "differences_nats"}
        n = len(differences)
        half = np.nan
        if n > 1:
            quantile = stats.t.ppf((1 + LEVEL) / 2, n - 1)
            half = float(quantile * differences.std(ddof=1) / np.sqrt(n))
        rows.append(
            {
                **rest,
                "minus_dense_nats": differences.mean(),
                "half_width_nats": half,
                "sequences": n,
            }
        )
    frame = pd.DataFrame(rows)
    return frame.astype({"recall": float, "chance_recall": float})


def _draw_loss(ax: Axes, data: pd.DataFrame) -> None:
    ax.axhline(0.0, color=panels.FAINT, lw=0.9)
    for name, mine in data.groupby("selection", sort=False):
        colour, marker = LOOKS[str(name)]
        ax.errorbar(
            mine["k"], mine["minus_dense_nats"], mine["half_width_nats"], color=colour,
            fmt=f"{marker}-", ms=4.5, mec=panels.PAPER, mew=0.5, lw=1.4, elinewidth=0.9,
        )  # fmt: skip
    _name_lines(ax, data)
    ax.set_ylabel("loss minus dense [nats/token]")
    ax.set_title("What is lost")


def _draw_recall(ax: Axes, data: pd.DataFrame) -> None:
    searched = data.dropna(subset=["recall"])
    for name, mine in searched.groupby("selection", sort=False):
        _line(ax, mine, "recall", str(name))
        last = mine.iloc[-1]
        ax.annotate(
            str(name), (last["k"], last["recall"]), xytext=(7, 0), textcoords="offset points",
            color=LOOKS[str(name)][0], va="center", fontsize=9,
        )  # fmt: skip
    if len(searched):
        chance = searched.drop_duplicates("k")
        ax.plot(chance["k"], chance["chance_recall"], "--", color=panels.FAINT, lw=1.2)
        last = chance.iloc[-1]
        ax.annotate(
            "by chance", (last["k"], last["chance_recall"]), xytext=(7, 0),
            textcoords="offset points", color=panels.FAINT, va="center", fontsize=9,
        )  # fmt: skip
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_ylabel("best k keys that the search finds")
    ax.set_title("Recall, queries with more than k keys")


def _draw_cost(ax: Axes, data: pd.DataFrame, dense: float) -> None:
    ax.axhline(dense, color=panels.FAINT, lw=1.2, ls="--")
    # A list that holds every key is not searched for; recent hardly searches.
    searched = data.dropna(subset=["recall"])
    for place, (name, mine) in enumerate(searched.groupby("selection", sort=False)):
        _line(ax, mine, "keys_scored", str(name))
        last = mine.iloc[-1]
        ax.annotate(
            str(name), (last["k"], last["keys_scored"]), xytext=(7, -12 * place),
            textcoords="offset points", color=LOOKS[str(name)][0], va="center", fontsize=9,
        )  # fmt: skip
    ax.annotate(
        f"dense scores {dense:.1f}", (0.03, dense), xycoords=ax.get_yaxis_transform(),
        xytext=(0, 4), textcoords="offset points", color=panels.FAINT, fontsize=9,
    )  # fmt: skip
    ax.set_ylim(bottom=0)
    ax.set_ylabel("keys scored by a query's search")
    ax.set_title("What the search costs")


def _line(ax: Axes, rows: pd.DataFrame, column: str, name: str) -> None:
    colour, marker = LOOKS[name]
    ax.plot(
        rows["k"], rows[column], f"{marker}-", color=colour, ms=4.5, mec=panels.PAPER, mew=0.5,
        lw=1.4,
    )  # fmt: skip


def _name_lines(ax: Axes, data: pd.DataFrame) -> None:
    """Names in the upper right, where differences have fallen, in the order of the lines."""
    first = data.sort_values("k").drop_duplicates("selection")
    names = first.sort_values("minus_dense_nats", ascending=False)["selection"]
    for place, name in enumerate(names):
        ax.text(
            0.98, 0.96 - 0.075 * place, WORDS[str(name)], color=LOOKS[str(name)][0], ha="right",
            va="top", fontsize=9, transform=ax.transAxes,
        )  # fmt: skip


def _k_axis(ax: Axes, data: pd.DataFrame) -> None:
    ks = sorted(data["k"].unique())
    ax.set_xscale("log")
    ax.set_xlim(ks[0] / 1.25, ks[-1] * 1.6)
    ax.xaxis.set_major_locator(FixedLocator([float(k) for k in ks]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([str(k) for k in ks])
    ax.set_xlabel("keys kept, k")


def _title(data: pd.DataFrame, report: Mapping[str, Any]) -> str:
    short = keep(data, (data["k"] < report["seq_len"]) & (data["selection"] != "recent"))
    if not len(short):
        return f"{report['swap']} at {report['seq_len']} tokens, every key kept"
    losses = floats(short, "minus_dense_nats")
    worst, best = short.iloc[int(losses.argmax())], short.iloc[int(np.abs(losses).argmin())]
    return (
        f"{report['swap']} at {report['seq_len']} tokens: {worst['minus_dense_nats']:+.4f} nats at "
        f"k {worst['k']} ({worst['selection']}), {best['minus_dense_nats']:+.4f} at k {best['k']} "
        f"({best['selection']})"
    )


def _caption(data: pd.DataFrame, report: Mapping[str, Any]) -> str:
    tokens = with_unit(float(report["trained_tokens"]))
    return (
        f"One run ({report['architecture']} {report['rung']}, trained densely on {tokens} tokens), "
        f"swapped in all layers without training; {report['sequences']} held-out sequences of "
        f"{report['evaluation_set']}, each {report['seq_len']} tokens of one document. Bars: 95 % "
        "t interval of the paired difference over sequences, of which some share a document; it "
        "says nothing of other runs. Beside the k keys, "
        f"{report['n_sink']} first and {report['window']} last ones are read; recall leaves them "
        "out. Recent reads as many keys at most, the last ones and 2 that it searches. Under block "
        "a choice knows later tokens of its 32. Dense loss "
        f"{report['dense_loss_nats']:.4f} nats/token.{_costly(data, report)}"
    )


def _costly(data: pd.DataFrame, report: Mapping[str, Any]) -> str:
    """Where a search scores more keys than the attention that it is to spare."""
    dense = float(report["dense_keys_scored"])
    more = data.loc[(data["keys_scored"] > dense) & (data["selection"] != "recent"), "k"]
    if not len(more):
        return ""
    return (
        f" At k {', '.join(str(k) for k in sorted(set(more)))} the search scores more keys than "
        f"the {dense:.1f} of dense attention at this length: nothing is saved."
    )


def _share(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"

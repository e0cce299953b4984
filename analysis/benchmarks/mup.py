"""muP against the standard parametrisation: regrets, and figures of rates and of activations."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.figures import panels
from analysis.figures.report_figure import ReportFigure
from analysis.tables.frames import floats, groups, keep

KINDS = ("standard", "muP")


def regrets(table: pd.DataFrame) -> pd.DataFrame:
    """Best rate of each width, and the loss left at the narrowest width's best rate, in percent.

    Args:
        table: architecture, parametrisation, d_model, learning_rate and loss_nats of each run;
            rows of `both` belong to both parametrisations.
    """
    rows = []
    for (architecture,), runs in groups(table, ["architecture"]):
        for kind in KINDS:
            own = keep(runs, runs["parametrisation"].isin([kind, "both"]))
            curves = {width: _curve(line) for (width,), line in groups(own, ["d_model"])}
            narrowest = curves[min(curves)]
            transferred = min(narrowest, key=narrowest.__getitem__)
            for width, curve in curves.items():
                best = min(curve, key=curve.__getitem__)
                left = 100 * (curve[transferred] / curve[best] - 1)
                rows.append([architecture, kind, width, best, curve[best], left])
    columns = ["architecture", "parametrisation", "d_model", "best_rate", "best_loss"]
    return pd.DataFrame(rows, columns=pd.Index([*columns, "regret_percent"]))


def draw_transfer(table: pd.DataFrame, name: str) -> ReportFigure:
    """Loss against peak rate, a line for each width; a panel for each parametrisation."""
    names = list(dict.fromkeys(table["architecture"]))
    with panels.styled():
        figure = Figure(figsize=(9.0, 3.6 * len(names)), layout="constrained")
        axes = figure.subplots(len(names), 2, squeeze=False, sharey="row")
        for row, architecture in zip(axes, names, strict=True):
            for ax, kind in zip(row, KINDS, strict=True):
                own = table["parametrisation"].isin([kind, "both"])
                runs = keep(table, own & (table["architecture"] == architecture))
                for i, ((width,), line) in enumerate(groups(runs, ["d_model"])):
                    curve = _curve(line)
                    x, y = np.array(list(curve)), np.array(list(curve.values()))
                    ax.plot(x, y, marker="o", ms=3.5, lw=1.3, color=panels.COLOURS[i],
                            label=f"d_model {width}")  # fmt: skip
                    best = int(np.argmin(y))
                    ax.plot(x[best], y[best], marker="o", ms=9, mfc="none", color=panels.COLOURS[i])
                ax.set_xscale("log", base=2)
                ax.set_title(f"{architecture}, {kind}", loc="left")
                ax.set_xlabel("peak learning rate")
            row[0].set_ylabel("held-out loss [nats]")
            row[1].legend(frameon=False)
    title = "Loss against peak learning rate at several widths"
    caption = "Ring: the best rate of a width. One run a point and seed."
    return ReportFigure(name, title, caption, figure, table)


def draw_coordinates(table: pd.DataFrame, name: str) -> ReportFigure:
    """Change of every activation against the width, a panel for each architecture.

    Args:
        table: architecture, parametrisation, place, d_model and change of each.
        name: of the figure.
    """
    names = list(dict.fromkeys(table["architecture"]))
    rows = -(-len(names) // 3)
    with panels.styled():
        figure = Figure(figsize=(12.0, 2.9 * rows), layout="constrained")
        axes = figure.subplots(rows, 3, squeeze=False).flatten()
        for ax, architecture in zip(axes, names, strict=False):
            for kind, colour in zip(KINDS, panels.COLOURS, strict=False):
                own = table["parametrisation"] == kind
                runs = keep(table, own & (table["architecture"] == architecture))
                for i, ((place,), line) in enumerate(groups(runs, ["place"])):
                    style = "--" if place == "logits" else "-"
                    y = floats(line, "change") / floats(line, "change")[0]
                    ax.plot(floats(line, "d_model"), y, style, marker="o", ms=3, lw=1.2,
                            color=colour, label=kind if i == 0 else None)  # fmt: skip
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_title(architecture, loc="left")
        for ax in axes[len(names) :]:
            ax.set_visible(False)
        axes[0].legend(frameon=False)
        figure.supxlabel("d_model")
        figure.supylabel("change of an activation since the start, narrowest model = 1")
    title = "Coordinate check: a level line is what muP promises"
    caption = "One line for what each mixer and channel mixer adds; dashed: logits."
    return ReportFigure(name, title, caption, figure, table)


def _curve(runs: pd.DataFrame) -> dict[float, float]:
    """The mean loss over seeds at each rate, from the lowest."""
    return {
        floats(each, "learning_rate")[0]: float(floats(each, "loss_nats").mean())
        for _, each in groups(runs.sort_values("learning_rate"), ["learning_rate"])
    }

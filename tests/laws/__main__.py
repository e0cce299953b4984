"""Published fits against ours: a table, and a figure with every value inside its tolerance.

python -m tests.laws                 five seconds; writes reports/laws/scoreboard.{png,svg,csv}
python -m tests.laws --out folder
"""

import argparse
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from tests.laws.published import FOLDER, Reference, measure, references

BLUE, ORANGE = "#0072B2", "#D55E00"
BASES = {"published": "o", "internal": "s"}


def scoreboard(listed: list[Reference], result: dict[str, float]) -> pd.DataFrame:
    """One row per listed value: theirs, ours, and the miss in units of the tolerance."""
    records = []
    for each in listed:
        miss = result[each.id] - each.target
        if each.kind == "le":
            miss = max(miss, 0.0)
        share = miss / each.allowance if each.allowance else float(miss != 0)
        records.append(
            {
                "id": each.id,
                "quantity": each.quantity,
                "basis": each.basis,
                "listed": each.target,
                "ours": result[each.id],
                "tolerance": each.allowance,
                "share_of_tolerance": share,
                "holds": each.holds(result[each.id]),
            }
        )
    return pd.DataFrame(records)


def draw(scores: pd.DataFrame, out: Path) -> list[Path]:
    """The scoreboard as PNG, SVG and the CSV behind them."""
    figure, axis = plt.subplots(figsize=(7.5, 0.21 * len(scores) + 1.4), layout="constrained")
    places = np.arange(len(scores))[::-1]
    axis.barh(places, 2.0, left=-1.0, height=0.72, color="0.9", label="listed value, tolerance")
    axis.axvline(0.0, color="0.55", linewidth=0.8)
    for basis, marker in BASES.items():
        for holds, colour in ((True, BLUE), (False, ORANGE)):
            mine = ((scores["basis"] == basis) & (scores["holds"] == holds)).to_numpy()
            if mine.any():
                label = (
                    f"ours against a {'published' if basis == 'published' else 'recomputed'} value"
                )
                axis.plot(
                    scores["share_of_tolerance"][mine].clip(-1.6, 1.6), places[mine], marker,
                    color=colour, markersize=5, label=label + ("" if holds else ", outside"),
                )  # fmt: skip
    axis.set_yticks(places, scores["id"].to_list(), fontsize=7)
    axis.set(xlim=(-1.7, 1.7), ylim=(-0.8, len(scores) - 0.2))
    axis.set_xlabel("ours minus listed, in units of the listed tolerance")
    held = sum(scores["holds"].to_list())
    axis.set_title(f"{held} of {len(scores)} reference values reached", fontsize=10, loc="left")
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=3, frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"scoreboard.{kind}" for kind in ("png", "svg", "csv")]
    for file in files[:2]:
        figure.savefig(file, dpi=160)
    plt.close(figure)
    scores.to_csv(files[2], index=False)
    return files


def main() -> int:
    """Print the table, write the figure; 1 if a value is missed, 2 if the tables are not here."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports") / "laws")
    out = parser.parse_args().out
    console = Console(width=int(os.environ.get("COLUMNS", "110")))
    listed = references()
    if not listed:
        console.print(
            f"no reference_values.csv in {FOLDER}; put the published tables there or set "
            "CROSSLADDER_PUBLISHED to their folder"
        )
        return 2
    scores = scoreboard(listed, measure())
    table = Table("id", "basis", "listed", "ours", "miss / tolerance", "")
    for row in scores.to_dict("records"):
        verdict = "ok" if row["holds"] else "MISSED"
        numbers = (
            f"{row['listed']:.8g}",
            f"{row['ours']:.8g}",
            f"{row['share_of_tolerance']:+.2f}",
        )
        table.add_row(str(row["id"]), str(row["basis"]), *numbers, verdict)
    console.print(table)
    console.print(", ".join(str(file) for file in draw(scores, out)))
    return 0 if bool(scores["holds"].all()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""A coordinate check of every architecture: how activations change in the first steps, by width.

python -m tests.benchmarks.training.coordinate_check
    all architectures, a few minutes; writes reports/mup_coordinates.csv and .png
python -m tests.benchmarks.training.coordinate_check --architectures mamba2,m2
    some of them

`tests.models.coordinates` says what is measured; the tests of muP hold the slopes to a band.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

from analysis.benchmarks.mup import draw_coordinates
from sweeps.architecture import read_architectures
from tests.models.coordinates import MUP, WIDTHS, changes_by_width, slopes

REPORTS = Path(__file__).parents[3] / "reports"


def rows_of(name: str, seeds: range) -> Iterator[dict[str, object]]:
    """The last step's change at each place and width, under both parametrisations."""
    for kind, mup in (("standard", None), ("muP", MUP)):
        found = changes_by_width(name, mup, seeds)
        steepness = slopes(found)
        Console().print(name, kind, {place: round(slope, 2) for place, slope in steepness.items()})
        for place, changes in found.items():
            for width, change in zip(WIDTHS, changes[:, -1], strict=True):
                row = {"architecture": name, "parametrisation": kind, "place": place}
                yield {**row, "d_model": width, "change": float(change), "slope": steepness[place]}


def main() -> None:
    """Measure, and draw."""
    parser = argparse.ArgumentParser(description="Change of activations by width.")
    parser.add_argument("--architectures", default=",".join(read_architectures()))
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--out", type=Path, default=REPORTS)
    choices = parser.parse_args()
    torch.set_num_threads(1)
    names = choices.architectures.split(",")
    table = pd.DataFrame([r for name in names for r in rows_of(name, range(choices.seeds))])
    choices.out.mkdir(parents=True, exist_ok=True)
    table.round(5).to_csv(choices.out / "mup_coordinates.csv", index=False)
    drawn = draw_coordinates(table, "mup_coordinates")
    drawn.figure.savefig(choices.out / "mup_coordinates.png", dpi=100)


if __name__ == "__main__":
    main()

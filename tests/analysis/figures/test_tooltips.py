"""Markers that tell which run they are, without a script."""

import re
from xml.etree import ElementTree

import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis.figures import panels
from analysis.figures.tooltips import with_titles

ROWS = pd.DataFrame(
    {
        "architecture": ["mamba", "a<b> & \"c\""], "seed": [0, None], "parameters": [9e3, 1.8e6],
        "tokens": [4.5e5, 9e5], "loss_nats": [2.5, 2.25],
    }
)  # fmt: skip


@pytest.fixture
def drawn(tmp_path):
    def draw(rows, limits=None):
        figure = Figure()
        ax = figure.subplots()
        with panels.styled():
            panels.plot_runs(ax, rows, ("tokens", "loss_nats"), "o-", "#000000")
            ax.set_xlim(limits)
            figure.savefig(tmp_path / "a.svg")
        return with_titles((tmp_path / "a.svg").read_text())

    return draw


def titles(svg):
    return [
        each.text for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}title")
    ]


def test_each_marker_bears_its_run(drawn):
    assert titles(drawn(ROWS)) == [
        "mamba, seed 0, N = 9 k, D = 450 k, loss 2.5 nats",
        'a<b> & "c", N = 1.8 M, D = 900 k, loss 2.25 nats',
    ]


def test_no_id_of_the_making_is_left_and_the_drawing_is_whole(drawn):
    svg = drawn(ROWS)
    assert "runs-" not in svg
    assert len(re.findall("<use ", svg)) >= 2


def test_markers_that_cannot_be_told_apart_bear_nothing(drawn):
    unknown = ROWS.assign(loss_nats=[2.5, None])
    assert titles(drawn(unknown)) == []

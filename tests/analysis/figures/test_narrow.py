"""The narrow layout of every figure: one column, nothing cut off, nothing lost."""

import pytest

from analysis.figures.all_figures import draw
from analysis.figures.narrow import WIDTH
from analysis.study.findings import find
from analysis.study.study import Settings, analyse
from analysis.tables.sweep_folder import load
from tests.analysis.figures.inside import assert_text_inside


@pytest.fixture(scope="module")
def narrowed(sweep, tmp_path_factory):
    """Each figure after its narrow layout, with its SVG and what it had in the wide layout."""
    settings = Settings(replicates=20)
    study = analyse(load(sweep), settings)
    result = []
    for plate in draw(study, find(study, settings)):
        wide = plate.save(tmp_path_factory.mktemp("wide"))
        texts = [text.get_text() for ax in plate.figure.axes for text in ax.texts]
        result.append((plate, wide, texts, plate.narrow()))
    return result


def test_narrow_figures_have_one_width_and_cut_no_text(narrowed):
    for plate, *_ in narrowed:
        assert plate.figure.get_figwidth() == WIDTH
        assert_text_inside(plate.figure)


def test_narrow_figures_have_one_panel_a_row(narrowed):
    for plate, *_ in narrowed:
        lefts = [ax.get_position().x0 for ax in plate.figure.axes if ax.get_label() != "<colorbar>"]
        assert max(lefts) - min(lefts) < 0.2


def test_each_stacked_panel_names_its_vertical_axis(narrowed):
    compute = next(plate for plate, *_ in narrowed if plate.name == "loss_against_compute")
    for ax in compute.figure.axes:
        assert ax.get_ylabel() == "loss on prose [nats per token]"
        assert any(label.get_visible() for label in ax.get_yticklabels())


def test_narrow_figures_have_all_that_the_wide_ones_have(narrowed):
    for plate, wide, texts, drawn in narrowed:
        assert [text.get_text() for ax in plate.figure.axes for text in ax.texts] == texts
        marks, narrow_marks = (svg.count("<use ") for svg in (wide, drawn))
        assert narrow_marks > 0.8 * marks
        assert "runs-" not in drawn

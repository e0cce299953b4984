"""Figures: drawn without warnings, from what is handed in, in files with their data."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from analysis.compute_optimal.frontier import frontier_with_band
from analysis.compute_optimal.isoflop import budgets
from analysis.figures import law_panels, panels
from analysis.figures.all_figures import draw
from analysis.figures.law_figures import device_speed
from analysis.inference.backtest import BackTest
from analysis.study.findings import find
from analysis.study.study import Settings, analyse
from analysis.tables.sweep_folder import load
from tests.analysis.figures.inside import assert_text_inside
from tests.analysis.synthetic_study import Study, write
from tests.analysis.validity.test_checks import curve


@pytest.fixture(scope="module")
def learnt(sweep):
    return analyse(load(sweep), Settings(replicates=40))


@pytest.fixture(scope="module")
def plates(learnt):
    return draw(learnt, find(learnt, Settings(replicates=40)))


def test_a_full_sweep_has_its_figures_in_order(plates):
    assert [plate.name for plate in plates] == [
        "effects_by_size",
        "data_against_architecture",
        "loss_against_compute",
        "loss_against_tokens",
        "loss_against_parameters",
        "residuals",
        "variance_shares",
        "loss_to_loss",
        "multipliers_by_size",
        "counting",
        "cooldown",
        "design_map",
        "frontier",
        "optima",
        "contours",
        "backtest",
        "profiles",
        "trade_offs",
        "nested_laws",
    ]


def test_frontiers_are_dashed_beyond_the_data_and_end_at_the_wall(plates, learnt):
    plate = next(each for each in plates if each.name == "frontier")
    largest = learnt.points.rows["flops"].max()
    assert plate.data["flops"].max() == pytest.approx(10 * largest)
    for ax in plate.figure.axes:
        solid = [line for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata())]
        curves = [line for line in solid if line.get_transform() == ax.transData]
        assert max(np.max(line.get_xdata()) for line in curves) <= 1.001 * largest
        assert any("no forecast beyond" in text.get_text() for text in ax.texts)


def test_bands_widen_beyond_the_data(plates):
    data = next(each for each in plates if each.name == "frontier").data
    arm = data[(data["architecture"] == "mamba") & (data["corpus"] == "web")].sort_values("flops")
    width = np.log(arm["high"] / arm["low"]).to_numpy()
    assert width[-1] > 1.5 * width[arm["inside"].to_numpy()].max()


def test_isoflop_curves_show_minima_and_hollow_edges():
    rows = pd.concat(curve(3.0, centre, 6)[0].assign(flops=flops) for centre, flops in
                     ((1.0, 1e20), (2.6, 1e21)))  # fmt: skip
    ax = Figure().add_subplot()
    law_panels.plot_isoflop(ax, budgets(rows))
    stars = [line for line in ax.lines if line.get_marker() == "*"]
    faces = [line.get_markerfacecolor() for line in stars]
    assert len(stars) == 2
    assert (faces[0] != panels.PAPER, faces[1] == panels.PAPER) == (True, True)


def test_each_figure_is_saved_with_its_data(plates, tmp_path):
    for plate in plates:
        plate.save(tmp_path)
        assert (tmp_path / f"{plate.name}.png").stat().st_size > 10_000
        assert (tmp_path / f"{plate.name}.svg").read_text().rstrip().endswith("</svg>")
        assert len(pd.read_csv(tmp_path / f"{plate.name}.csv")) == len(plate.data) > 0


def test_each_caption_has_its_number_of_points_and_its_interval(plates):
    for plate in plates:
        assert re.search(r"n = \d+", plate.caption)
        assert "interval" in plate.caption


def test_no_two_labels_of_line_ends_overlap():
    ax = Figure(figsize=(4, 3)).add_subplot()
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set(xlim=(1, 100), ylim=(1, 2))
    panels.label_ends(ax, {name: (90.0, 1.5 + 1e-4 * place, "#000000") for place, name in
                            enumerate("abcd")})  # fmt: skip
    heights = sorted(text.get_position()[1] for text in ax.texts)
    assert min(np.diff(heights)) > 0.05


def test_the_effects_by_size_are_those_of_the_contrasts(plates, learnt):
    plate = plates[0]
    for contrast in (*learnt.answer.corpus, *learnt.answer.architecture):
        rows = plate.data[plate.data["other"] == contrast.other]
        expected = 100 * np.expm1(contrast.by_size.to_numpy())
        np.testing.assert_allclose(rows["percent"], expected)
        assert list(rows["rung"]) == list(contrast.by_size.index)
        assert rows["pairs"].sum() == len(contrast.pairs)
        assert set(rows["mean_percent"]) == {contrast.percent.estimate}
        assert (np.diff(rows["parameters"]) > 0).all()


def test_effects_by_size_draw_a_mark_for_each_size_and_the_band_of_the_mean(plates, learnt):
    for ax, contrast in zip(
        plates[0].figure.axes, (*learnt.answer.corpus, *learnt.answer.architecture), strict=True
    ):
        (marks,) = (line for line in ax.lines if line.get_marker() == "s")
        np.testing.assert_allclose(marks.get_ydata(), contrast.percent_by_size["percent"])
        bands = [patch.get_extents().transformed(ax.transData.inverted()) for patch in ax.patches]
        ends = {(round(band.y0, 6), round(band.y1, 6)) for band in bands}
        assert (round(contrast.percent.low, 6), round(contrast.percent.high, 6)) in ends


def test_neighbouring_arms_differ_in_grey_and_are_visible_on_their_page():
    for colours, page in ((panels.COLOURS, panels.PAPER), (panels.DARK_COLOURS, "#15181c")):
        light = [lightness(each) for each in colours]
        assert min(abs(np.diff(light))) > 9
        assert min(abs(each - lightness(page)) for each in light) > 35


def lightness(colour):
    """CIE L* of a colour, from 0 (black) to 100."""
    parts = np.array(to_rgb(colour))
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16


def test_arms_beyond_six_differ_in_marker_from_those_of_the_same_colour():
    looks = panels.looks([str(place) for place in range(18)])
    assert len({(colour, marker) for _, colour, marker in looks}) == 18


def test_no_text_leaves_the_figure(plates):
    for plate in plates:
        assert_text_inside(plate.figure)


def test_ticks_are_few_and_plain(plates):
    for plate in plates:
        for ax in (each for each in plate.figure.axes if each.get_label() != "<colorbar>"):
            low, high = sorted(ax.get_xlim())
            shown = [tick for tick in ax.get_xticks() if low <= tick <= high]
            assert 2 <= len(shown) <= 8


def test_frontiers_are_drawn_inside_the_data_only(learnt):
    ax = Figure().add_subplot()
    rows = learnt.points.rows
    rows = rows[(rows["evaluation_set"] == "prose") & (rows["corpus"] == "web")]
    curves = learnt.curves[learnt.curves["corpus"] == "web"]
    panels.plot_loss_against_compute(ax, rows, curves, ["transformer", "mamba"])
    for line in (each for each in ax.lines if each.get_linestyle() == "-"):
        compute = np.asarray(line.get_xdata(), dtype=float)
        assert compute.min() >= 0.99 * rows["flops"].min()
        assert compute.max() <= 1.01 * rows["flops"].max()


def test_a_sweep_of_one_point_is_drawn(tmp_path):
    study = Study(("mamba",), ("web",), {"r9k": 9e3}, (4.5e5,), {})
    root = write(study, tmp_path / "point", np.random.default_rng(0))
    study = analyse(load(root), Settings(replicates=10))
    plates = draw(study, find(study, Settings(replicates=10)))
    for plate in plates:
        plate.save(tmp_path / "figures")
    written = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert written == {plate.name for plate in plates} != set()


def test_the_frontier_has_device_hours_on_top_where_the_speed_of_one_device_is_known(learnt):
    names = ["device", "flops_per_device_second"]
    assert device_speed(pd.DataFrame([("cpu", 1e9), ("cpu", 3e9)], columns=names)) == (2e9, "cpu")
    assert device_speed(pd.DataFrame([("cpu", 1e9), ("gpu", 3e9)], columns=names))[1] == ""
    assert device_speed(learnt.table.runs)[1] == ""
    ax = Figure().add_subplot()
    ax.set(xscale="log", xlim=(3.6e12, 3.6e15))
    law_panels.device_hours(ax, 1e9)
    (top,) = ax.child_axes
    np.testing.assert_allclose(top.get_xticks(), [1.0, 10.0, 100.0, 1000.0])
    np.testing.assert_allclose(top._functions[0](3.6e12), 1.0)


def test_bands_beyond_the_data_hold_the_choice_of_law(learnt):
    fit, drawn = learnt.joint.fit, learnt.joint.replicates
    group, tested = fit.form.groups[0], BackTest(pd.DataFrame(), 0.01, assumed=False)
    other = replace(fit, theta=fit.theta + 0.02)
    alone, joined = (frontier_with_band(fit, drawn, group, tested, each) for each in ([], [other]))
    inside = alone["flops"] <= learnt.points.rows["flops"].max()
    np.testing.assert_array_equal(alone["high"][inside], joined["high"][inside])
    assert (joined["high"][~inside] > alone["high"][~inside]).all()

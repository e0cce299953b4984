"""The table of runs: every run, the folder to paste, keys that sort, and curves from the record."""

import re
from contextlib import closing
from html.parser import HTMLParser

import numpy as np
import pytest

from analysis.report.run_rows import HEADS, run_rows
from analysis.report.sparkline import HEIGHT, MARGIN, WIDTH, coordinates, loss_scale, sparkline
from analysis.report.write import redraw
from analysis.tables.sweep_folder import load
from analysis.tables.training_curves import MOST_POINTS
from tests.analysis.synthetic_study import Study, write
from trainer.record import RunRecord, read_run


class RunsTable(HTMLParser):
    """Text and sort key of each cell of the table of runs."""

    def __init__(self):
        super().__init__()
        self.heads, self.rows, self.inside = [], [], None

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "table":
            self.inside = "other" if found.get("class") != "runs" else "runs"
        if self.inside == "runs":
            if tag == "tr":
                self.rows.append([])
            if tag == "th":
                self.heads.append(found.get("data-sort"))
            if tag == "td":
                self.rows[-1].append([found.get("data-key"), ""])

    def handle_endtag(self, tag):
        if tag == "table":
            self.inside = None

    def handle_data(self, data):
        if self.inside == "runs" and self.rows and self.rows[-1]:
            self.rows[-1][-1][1] += data


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    states = {0: "diverged", 1: "not started", 2: "running", 3: "failed"}
    study = Study(sizes={"r9k": 9e3, "r16k": 1.6e4}, seeds={}, state=states)
    return write(study, tmp_path_factory.mktemp("runs") / "few", np.random.default_rng(0))


@pytest.fixture(scope="module")
def page(root):
    return redraw(root).page.read_text()


@pytest.fixture(scope="module")
def shown(page):
    parser = RunsTable()
    parser.feed(page)
    return parser


def test_every_run_is_in_the_table_under_the_folder_that_generation_takes(root, shown):
    rows = [row for row in shown.rows if row]
    folders = [row[0][1] for row in rows]
    assert folders == [f"{root}/{run_id}" for run_id in load(root).runs["run_id"]]


def test_the_page_says_what_to_do_with_a_folder(root, page):
    (example,) = re.findall(r"python launch/generate\.py (\S+) ", page)
    assert read_run(root / example.rsplit("/", 1)[1]).summary["state"] == "done"
    assert example.startswith(str(root))


def test_a_folder_below_the_working_directory_is_relative(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    assert load(root).folder == "few"


def test_numeric_columns_have_numbers_to_sort_by_or_nothing(shown):
    for row in (row for row in shown.rows if row):
        for kind, (key, text) in zip(shown.heads, row, strict=True):
            if kind == "number" and key:
                assert np.isfinite(float(key))
            assert bool(key) == bool(text) or kind is None


def test_the_keys_are_the_numbers_of_the_run(root):
    table = load(root)
    last = run_rows(table)[-1]
    cells = dict(zip(HEADS, last.cells, strict=True))
    run = read_run(root / last.run_id)
    final = next(
        row for row in run.evaluations if row["evaluation_set"] == "prose" and row["decayed"]
    )
    assert float(cells["final loss"].key) == pytest.approx(
        final["total_nats"] / final["targets"], rel=1e-9
    )
    assert float(cells["tokens"].key) == run.summary["tokens"]
    assert float(cells["parameters"].key) == run.provenance["accounting"]["total_parameters"]
    assert float(cells["time"].key) == pytest.approx(
        sum(row["step_seconds"] for row in run.metrics)
    )


def test_runs_without_a_decayed_point_have_no_final_loss(root):
    rows = run_rows(load(root))
    for row in rows[:4]:
        assert dict(zip(HEADS, row.cells, strict=True))["final loss"].text == ""
    states = [dict(zip(HEADS, row.cells, strict=True))["state"].text for row in rows[:4]]
    assert states == ["diverged", "not started", "running", "failed"]


def test_curves_are_rows_of_the_record_with_the_first_and_last(root):
    training = load(root).training
    for run_id, curve in training.groupby("run_id"):
        recorded = [(row["tokens"], row["loss_nats"]) for row in read_run(root / run_id).metrics]
        points = list(zip(curve["tokens"], curve["loss_nats"], strict=True))
        assert set(points) <= set(recorded)
        assert (points[0], points[-1]) == (recorded[0], recorded[-1])


def test_a_branch_begins_with_its_trunk_and_long_curves_are_thinned(tmp_path):
    root = write(
        Study(("mamba",), ("web",), {"r9k": 9e3}, (4.5e5,), {}),
        tmp_path / "branch",
        np.random.default_rng(0),
    )
    table = load(root)
    (run_id,), (trunk_id,) = (table.runs[name].unique() for name in ("run_id", "trunk_id"))
    (root / run_id / "metrics.jsonl").unlink()
    steps = {trunk_id: range(1, 301), run_id: range(201, 401)}
    for name, numbers in steps.items():
        with closing(RunRecord(root / name)) as record:
            for step in numbers:
                loss = None if step == 250 else 5.0 / step
                record.append_metrics({"step": step, "tokens": step * 10, "loss_nats": loss})
    curve = load(root).training
    assert len(curve) == MOST_POINTS
    tokens = curve["tokens"].to_numpy()
    assert (tokens[0], tokens[-1]) == (10, 4000)
    assert (np.diff(tokens) > 0).all()
    np.testing.assert_array_equal(curve["of_trunk"], tokens < 2010)
    np.testing.assert_allclose(curve["loss_nats"], 50.0 / tokens)
    drawn = sparkline(curve, loss_scale(curve))
    assert drawn.count("<polyline") == 2


def test_a_sparkline_has_a_point_for_each_recorded_one(root):
    training = load(root).training
    scale = loss_scale(training)
    for _, curve in training.groupby("run_id"):
        x, y = coordinates(curve, scale)
        pairs = re.findall(r"([\d.]+),([\d.]+)", sparkline(curve, scale))
        np.testing.assert_allclose(np.array(pairs, dtype=float), np.array([x, y]).T, atol=0.051)
        assert x.min() >= MARGIN
        assert x.max() <= WIDTH - MARGIN
        assert (np.diff(y) >= 0).all()
        assert y.max() <= HEIGHT - MARGIN


def test_a_loss_above_every_start_stays_in_the_drawing(root):
    training = load(root).training
    first = training[training["run_id"] == training["run_id"].iloc[0]]
    blown = first.assign(loss_nats=[*first["loss_nats"][:-1], 1e9])
    _, y = coordinates(blown, loss_scale(training))
    assert y[-1] == MARGIN
    assert (y[:-1] > MARGIN - 1e-9).all()


def test_names_are_escaped_in_the_table(tmp_path):
    names = ('a"b<i>', "c&d"), ('web"><script>',)
    root = write(
        Study(*names, {"r<9>k": 9e3}, (4.5e5,), {}), tmp_path / "odd", np.random.default_rng(0)
    )
    page = redraw(root).page.read_text()
    assert page.count("<script") == 1
    parser = RunsTable()
    parser.feed(page)
    rows = [row for row in parser.rows if row]
    assert {row[1][1] for row in rows} == set(names[0])
    assert {row[2][0] for row in rows} == set(names[1])

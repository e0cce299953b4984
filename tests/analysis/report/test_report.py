"""The report: whole, partial, one-armed and empty sweeps; one page that stands alone."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from analysis.figures import panels
from analysis.report.write import redraw, write_report
from tests.analysis.synthetic_study import Study, write


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    study = Study(state={0: "diverged", 5: "running"})
    root = write(study, tmp_path_factory.mktemp("runs") / "full", np.random.default_rng(3))
    return write_report(root, plan={"interval of the architecture effect": "0.9 %"})


def partial(root, finished):
    """A sweep with the first `finished` of its 60 runs done, the others not started."""
    study = Study(seeds={}, state=dict.fromkeys(range(finished, 60), "not started"))
    return write(study, root, np.random.default_rng(1))


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, _, attrs):
        wanted = ("src", "href", "xlink:href", "data", "srcset", "action")
        self.found += [value for name, value in attrs if name in wanted and value]


def test_the_page_fetches_nothing(written):
    page = written.page.read_text()
    links = Links()
    links.feed(page)
    assert links.found
    assert all(link.startswith("#") for link in links.found)
    assert not re.findall(r"url\((?!#)", page)
    assert "@import" not in page
    assert re.findall(r"<script[^>]*>", page) == ["<script>"]
    script = page[page.index("<script>") : page.index("</script>")]
    for word in ("fetch", "XMLHttpRequest", "import", "innerHTML", "http", "eval"):
        assert word not in script


def test_the_effect_against_size_comes_before_every_other_figure_and_the_answers(written):
    page = written.page.read_text()
    names = re.findall(r"figures/(\w+)\.png", page)
    assert names[0] == "effects_by_size"
    assert len(names) == len(set(names))
    assert page.index("effects_by_size.png") < page.index("Corpus effect")


def test_each_figure_is_there_for_a_wide_and_for_a_narrow_page(written):
    page = written.page.read_text()
    figures = re.findall(r"<figure>(.*?)</figure>", page, flags=re.DOTALL)
    for figure in figures:
        assert re.findall(r'class="drawing (\w+)"', figure) == ["wide", "narrow"]
        assert figure.count("<svg") == 2


def test_drawings_follow_a_dark_page(written):
    page = written.page.read_text()
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    for colour in (*panels.COLOURS, panels.INK, panels.PAPER, panels.FAINT, panels.RULE):
        assert colour not in drawings
    for place, (light, dark) in enumerate(zip(panels.COLOURS, panels.DARK_COLOURS, strict=True)):
        assert f"--arm-{place}: {light};" in page
        assert f"--arm-{place}: {dark};" in page


def test_ids_on_the_page_are_unique_and_references_resolve(written):
    page = written.page.read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_the_answers_come_first_and_in_order(written):
    page = written.page.read_text()
    marks = [
        "Corpus effect",
        "Architecture effect",
        "Smallest difference",
        "refused, and why",
        "<h2>Caveats",
        "<h2>Figures",
        "<h2>Fitted laws",
        ">Runs</h2>",
        "<h2>Conventions",
        "<h2>How to read",
    ]
    places = [page.index(mark) for mark in marks]
    assert places == sorted(places)


def test_diverged_and_unfinished_runs_are_on_the_page(written):
    page = written.page.read_text()
    assert "70 of 72 runs finished (1 diverged, 1 running)" in page
    assert "diverged at step" in page


def test_the_plan_is_shown(written):
    assert "interval of the architecture effect" in written.page.read_text()


def test_the_numbers_are_strict_json_with_intervals(written):
    def refuse(constant):
        raise AssertionError(constant)

    text = (written.page.parent / "report.json").read_text()
    numbers = json.loads(text, parse_constant=refuse)
    effect = numbers["answer"]["arms"][0]["contrast"]["effect"]
    assert effect["low"] < effect["estimate"] < effect["high"]
    assert numbers["answer"]["evaluation_set"] == "prose"
    ratio = numbers["headline"]["ratio"]
    assert ratio["low"] < ratio["estimate"] < ratio["high"]
    assert {"W-CLUSTER", "W-LR"} <= {each["code"] for each in numbers["reservations"]}


def test_figures_and_tables_lie_beside_the_page(written):
    folder = written.page.parent
    names = {file.name for file in (folder / "figures").iterdir()}
    for stem in ("loss_against_compute", "data_against_architecture", "residuals"):
        assert {f"{stem}.png", f"{stem}.svg", f"{stem}.csv"} <= names
    assert {"laws.csv", "effects.csv", "runs.csv", "points.csv"} <= {
        file.name for file in (folder / "tables").iterdir()
    }


def test_the_terminal_version_is_short_and_says_where_the_page_lies(written):
    lines = written.text().splitlines()
    assert len(lines) <= 30
    assert str(written.page) in lines[-1]
    assert any("alpha" in line and "[" in line for line in lines)


def test_no_number_on_the_page_has_a_dozen_digits(written):
    page = re.sub(r"<svg.*?</svg>|<style.*?</style>", "", written.page.read_text(), flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", " ", page)
    assert not re.findall(r"\d+\.\d{6,}", text)


@pytest.mark.parametrize("finished", [0, 2, 31])
def test_a_partial_sweep_gives_a_page(tmp_path, finished):
    report = redraw(partial(tmp_path / "partial", finished))
    page = report.page.read_text()
    assert f"{finished} of 60 runs finished" in page
    assert "R-" in page
    assert "Traceback" not in page


def test_a_sweep_of_one_architecture_gives_a_page(tmp_path):
    root = write(Study(architectures=("mamba",)), tmp_path / "one", np.random.default_rng(0))
    text = redraw(root).text()
    assert "Training on code instead of web raises loss by" in text
    assert "one architecture only" in text


def test_an_empty_sweep_gives_a_page(tmp_path):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"name": "empty", "runs": []}))
    report = write_report(tmp_path)
    assert "0 of 0 runs finished" in report.page.read_text()
    assert report.text()


def test_redraw_does_nothing_until_something_changes(tmp_path):
    root = partial(tmp_path / "growing", 2)
    first = redraw(root)
    before = first.page.stat().st_mtime_ns
    assert redraw(root).text() == first.text()
    assert first.page.stat().st_mtime_ns == before
    sweep = yaml.safe_load((root / "sweep.yaml").read_text())
    (root / "sweep.yaml").write_text(yaml.safe_dump({**sweep, "runs": sweep["runs"][:30]}))
    redraw(root)
    assert first.page.stat().st_mtime_ns > before


def test_names_are_escaped(tmp_path):
    study = Study(("a<b>", "c&d"), ("web",), {"r9k": 9e3}, seeds={})
    root = write(study, tmp_path / "odd", np.random.default_rng(0))
    assert "a<b>" not in redraw(root).page.read_text()


def test_the_report_needs_no_torch():
    check = "import sys, analysis.report.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_the_command_draws_the_report_and_refuses_a_folder_without_a_sweep(tmp_path):
    root = tmp_path / "empty"
    root.mkdir()
    (root / "sweep.yaml").write_text(yaml.safe_dump({"name": "empty", "runs": []}))
    command = [sys.executable, "-m", "analysis.report"]
    drawn = subprocess.run([*command, root], capture_output=True, text=True, check=False)
    assert drawn.returncode == 0, drawn.stderr
    assert (root / "report" / "index.html").exists()
    assert "Report:" in drawn.stdout
    refused = subprocess.run([*command, tmp_path], capture_output=True, text=True, check=False)
    assert refused.returncode == 64
    assert "holds no sweep.yaml" in refused.stderr

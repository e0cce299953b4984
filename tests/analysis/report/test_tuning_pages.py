"""What a page says of tuning: nothing where it is right, the arm and the runs where it is not."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from analysis.report.write import redraw
from tests.analysis.synthetic_study import Study, write

STUDY = Study(
    sizes={"r9k": 9e3, "r30k": 3e4, "r100k": 1e5}, horizons=(9e5, 1.8e6), seeds={"r30k": (0, 1)},
    evaluation_sets=("prose",), probed=("r9k", "r100k"), architecture_effect=-0.1,
    corpus_effect=0.04,
)  # fmt: skip
RULE = {
    "search": "tuning 1a2b3c", "parameters": [9e3, 6e4], "tokens": [9e5, 1.8e6],
    "batch_tokens": [4096, 4096],
    "regret": {"rung": "r100k", "percent": 0.4, "low": 0.1, "high": 0.9},
}  # fmt: skip


def page(root: Path, **changes: object) -> str:
    write(replace(STUDY, **changes), root, np.random.default_rng(2))
    sweep = yaml.safe_load((root / "sweep.yaml").read_text())
    sweep["tuning"] = {name: {"evidence": "a search", "rule": RULE} for name in STUDY.architectures}
    (root / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    drawn = redraw(root).page.read_text()
    return re.sub(r"<svg.*?</svg>|<style.*?</style>|<script.*?</script>", "", drawn, flags=re.S)


@pytest.fixture(scope="module")
def right(tmp_path_factory) -> str:
    return page(tmp_path_factory.mktemp("runs") / "right")


def title(text: str) -> str:
    return re.findall(r"<h1>(.*?)</h1>", text)[0]


def test_the_title_of_a_sound_study_is_a_sentence_with_its_numbers_below(right: str) -> None:
    assert re.fullmatch(
        r"On prose, changing the architecture moved the loss 2\.\d times as much as changing the "
        r"corpus", title(right),
    )  # fmt: skip
    numbers = re.findall(r'<p class="numbers">(.*?)</p>', right)[0]
    assert re.match(r"Corpus, code instead of web: \+4\.\d+ % \[", numbers)
    assert "architecture, mamba instead of transformer: -9." in numbers


def test_a_right_rate_is_not_spoken_of(right: str) -> None:
    assert "R-TUNING" not in right
    assert "W-TUNING" not in right
    assert "both arms tuned" not in right
    assert "each arm&#39;s rate and batch are bracketed" in right


def test_the_certificate_names_search_range_regret_and_verdicts(right: str) -> None:
    assert "every arm&#39;s rule comes from the one search tuning 1a2b3c" in right
    assert "outside the search: parameters 9 k to 100 k (searched 9 k to 60 k)" in right
    assert "0.4 [0.1, 0.9] % at r100k" in right
    assert "<td>bracketed</td>" in right


@pytest.mark.parametrize(
    ("best", "choice"), [((-3.0, 0.0), "learning rate"), ((0.0, -3.0), "batch")]
)
def test_a_page_refuses_its_headline_where_an_arm_is_eight_times_off(
    tmp_path: Path, best: tuple, choice: str
) -> None:
    text = page(tmp_path / "off", optimum={"transformer": best})
    assert "not answered: an arm&#39;s learning rate or batch is not bracketed" in title(text)
    assert "R-TUNING" in text
    assert f"transformer r100k at 0.25 x its {choice}" in text
    named = (f"the {choice} of transformer at {rung}" for rung in ("r100k", "r9k"))
    assert f"not bracketed: {', '.join(named)}." in text


def test_a_study_without_probes_says_that_tuning_was_not_checked(tmp_path: Path) -> None:
    text = page(tmp_path / "bare", probed=())
    assert "W-TUNING" in text
    assert "ask for tuning_probes" in text
    assert "R-TUNING" not in text

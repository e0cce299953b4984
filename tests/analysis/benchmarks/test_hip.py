"""The figure of swaps: what it is drawn from is beside it, and its words follow from the data."""

import numpy as np
import pytest

from analysis.benchmarks.hip import draw, table_rows

KS = (8, 64, 256)


@pytest.fixture
def report():
    rows = [
        {
            "selection": selection,
            "k": k,
            "loss_nats": 3.0,
            "differences_nats": [loss / k, 2 * loss / k, 3 * loss / k],
            "largest_token_difference_nats": 1.0,
            "recall": None if selection == "recent" or k == 256 else 0.5,
            "chance_recall": None if selection == "recent" or k == 256 else 0.1,
            "keys_scored": 300.0 if k == 64 else 20.0,
            "most_keys_read": 30.0,
        }
        for selection, loss in (("row", 0.1), ("block", 0.4), ("recent", 0.8))
        for k in KS
    ]
    return {
        "run": "abc", "architecture": "transformer", "rung": "31k", "trained_tokens": 450560,
        "swap": "attention=hip", "n_sink": 4, "window": 32, "evaluation_set": "prose",
        "sequences": 3, "seq_len": 256, "dense_loss_nats": 2.9, "dense_keys_scored": 128.5,
        "rows": rows,
    }  # fmt: skip


def test_the_interval_is_students_over_sequences(report):
    first = draw(report).data.to_dict("records")[0]
    assert np.isclose(float(first["minus_dense_nats"]), 0.2 / 8)
    # 4.3027 is the 97.5 % point of Student's t with two degrees of freedom.
    assert np.isclose(float(first["half_width_nats"]), 4.3027 * (0.1 / 8) / np.sqrt(3), rtol=1e-4)


def test_one_sequence_has_no_interval_and_is_drawn(report, tmp_path):
    for row in report["rows"]:
        row["differences_nats"] = row["differences_nats"][:1]
    plate = draw(report)
    plate.save(tmp_path)
    assert np.isnan(plate.data["half_width_nats"].to_numpy()).all()


def test_the_title_names_the_worst_and_the_best_search_that_leaves_keys_out(report):
    title = draw(report).title
    assert "+0.1000 nats at k 8 (block)" in title
    assert "+0.0031 at k 64 (row)" in title


def test_the_caption_says_where_a_search_costs_more_than_it_spares(report):
    assert "At k 64 the search scores more keys than the 128.5" in draw(report).caption
    for row in report["rows"]:
        row["keys_scored"] = 20.0
    assert "more keys" not in draw(report).caption


def test_the_figure_is_saved_with_its_data(report, tmp_path):
    draw(report).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"hip.png", "hip.svg", "hip.csv"}


def test_the_table_has_a_row_a_point_and_blanks_where_nothing_is_searched(report):
    columns, rows = table_rows(report)
    assert len(rows) == len(report["rows"])
    recall = columns.index("recall@k")
    assert [row[recall] for row in rows] == ["0.500", "0.500", ""] * 2 + [""] * 3

"""Tables of others: what is read, in which unit, and what is refused with a reason."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis.tables.column_matching import parse_columns
from analysis.tables.external import read_external
from analysis.tables.schema import SCHEMA, target_of
from tests.analysis.conftest import PUBLISHED

PLAIN = {
    "run": ["a", "b", "c"],
    "N": [1e6, 2e6, 4e6],
    "D": [1e8, 2e8, 4e8],
    "loss": [4.0, 3.5, 3.0],
}


def written(folder, table, name="runs.csv"):
    file = folder / name
    pd.DataFrame(table).to_csv(file, index=False)
    return file


def published(name):
    if not (PUBLISHED / name).exists():
        pytest.skip(f"{name} is not beside this checkout")
    return read_external(PUBLISHED / name)


@pytest.mark.parametrize(
    ("name", "column"),
    [("chinchilla_epoch245.csv", ("N", "D", "C", "loss")), ("datablations_c4_fit182.csv", ("U",))],
)
def test_published_tables_are_read_as_they_are(name, column):
    result = published(name)
    raw = pd.read_csv(PUBLISHED / name)
    assert len(result.rows) == len(raw)
    for each in column:
        mine = result.rows[target_of(each)[0]]
        np.testing.assert_array_equal(mine, raw[each].astype(float))


def test_a_wide_table_has_one_row_per_model_and_evaluation_set():
    result = published("llmline_hf_models.csv")
    raw = pd.read_csv(PUBLISHED / "llmline_hf_models.csv")
    counts = result.rows["evaluation_set"].value_counts()
    assert counts["C4"] == raw["C4 Validation Loss"].notna().sum()
    assert {"The Pile UC", "FineWeb-Edu", "Slimpajama", "ARC-Easy"} <= set(counts.index)
    mine = result.rows[result.rows["evaluation_set"] == "C4"].set_index("source_row")
    np.testing.assert_array_equal(
        mine["bits_per_byte"], raw["C4 Validation BPB"].to_numpy()[mine.index - 1]
    )


@pytest.mark.parametrize("form", ["csv", "tsv", "parquet", "jsonl"])
def test_every_format_gives_the_same_rows(tmp_path, form):
    frame, file = pd.DataFrame(PLAIN), tmp_path / f"runs.{form}"
    if form == "parquet":
        frame.to_parquet(file)
    elif form == "jsonl":
        frame.to_json(file, orient="records", lines=True)
    else:
        frame.to_csv(file, index=False, sep="," if form == "csv" else "\t")
    pd.testing.assert_frame_equal(
        read_external(file).rows, read_external(written(tmp_path, PLAIN)).rows
    )


@pytest.mark.parametrize(
    ("column", "cells", "target", "expected"),
    [
        ("n_params", ["1.4B", "300M", "1,000,000"], "parameters", [1.4e9, 3e8, 1e6]),
        ("Size (M)", ["70", "160", "410"], "parameters", [7e7, 1.6e8, 4.1e8]),
        ("Tokens_B", ["300", "", "n/a"], "tokens", [3e11, np.nan, np.nan]),
        ("training FLOPs", ["9300000000000000000", "1e22", "2e25"], "flops", [9.3e18, 1e22, 2e25]),
        ("Training compute [EFLOPs]", ["1", "2.5", "10"], "flops", [1e18, 2.5e18, 1e19]),
        ("lr_tuned", ["yes", "False", ""], "learning_rate_tuned", [1.0, 0.0, np.nan]),
    ],
)
def test_counts_are_read_in_the_unit_their_name_or_cell_states(
    tmp_path, column, cells, target, expected
):
    table = {"run": ["a", "b", "c"], column: cells, "step": [1, 2, 3], "loss": [4.0, 3.5, 3.0]}
    np.testing.assert_allclose(read_external(written(tmp_path, table)).rows[target], expected)


@pytest.mark.parametrize(
    ("column", "value", "target", "expected"),
    [
        ("loss", 3.0, "loss_nats", 3.0),
        ("Loss (bits)", 3.0, "loss_nats", 3.0 * np.log(2)),
        ("val_loss_log2", 3.0, "loss_nats", 3.0 * np.log(2)),
        ("C4 Validation BPB", 0.9, "bits_per_byte", 0.9),
        ("c4 perplexity", 20.0, "loss_nats", np.log(20.0)),
    ],
)
def test_losses_end_in_nats_or_bits_per_byte(tmp_path, column, value, target, expected):
    table = {"run": ["a"], "N": [1e6], "D": [1e8], column: [value]}
    assert read_external(written(tmp_path, table)).rows[target].item() == pytest.approx(expected)


def test_a_mapping_overrules_names_and_units(tmp_path):
    table = {**PLAIN, "billions of weights": [0.001, 0.002, 0.004]}
    columns = parse_columns("N=billions of weights:B, loss=loss")
    result = read_external(written(tmp_path, table), columns)
    np.testing.assert_allclose(result.rows["parameters"], [1e6, 2e6, 4e6])
    assert "N" in result.ignored


@pytest.mark.parametrize(
    ("extra", "needle"),
    [
        ({"params": [1e6, 2e6, 5e6]}, "'N', 'params'"),
        ({"val_loss": [4.1, 3.6, 3.1]}, "'loss', 'val_loss'"),
        ({"eval_set": ["c4"] * 3, "pile loss": [4, 3, 2]}, "both the column 'eval_set'"),
    ],
)
def test_two_columns_that_could_be_meant_are_an_error_that_lists_both(tmp_path, extra, needle):
    with pytest.raises(ValueError, match=needle):
        read_external(written(tmp_path, {**PLAIN, **extra}))


def test_two_columns_that_hold_the_same_are_not_ambiguous(tmp_path):
    result = read_external(written(tmp_path, {**PLAIN, "params": PLAIN["N"]}))
    np.testing.assert_array_equal(result.rows["parameters"], PLAIN["N"])


@pytest.mark.parametrize(
    ("column", "cell", "reason"),
    [
        ("N", "-3", "negative"),
        ("N", "0", "zero"),
        ("D", "inf", "not finite"),
        ("D", "many", "not a number"),
        ("loss", "-0.5", "negative"),
        ("loss", "1,5", "not a number"),
    ],
)
def test_a_bad_cell_costs_its_row_and_is_listed(tmp_path, column, cell, reason):
    table = {name: [str(value) for value in values] for name, values in PLAIN.items()}
    table[column][1] = cell
    result = read_external(written(tmp_path, table))
    assert list(result.rows["source_row"]) == [1, 3]
    assert list(result.rejected["source_row"]) == [2]
    assert reason in result.rejected["reason"].item()


@pytest.mark.parametrize(
    ("table", "needle"),
    [
        ({**PLAIN, "N": [0.07, 1.4, 12.0]}, "say its unit"),
        ({**PLAIN, "N": ["small", "medium", "large"]}, "most of its cells are not"),
        ({"N": [1e6], "D": [1e8]}, "no loss that could be recognised"),
        ({**PLAIN, "loss": ["", "", ""]}, "no row of"),
        ({**PLAIN, "run": ["a", "a", "b"], "D": [1e8, 1e8, 4e8]}, "share the same"),
        ({name: [] for name in PLAIN}, "holds no rows"),
    ],
)
def test_a_table_that_cannot_be_meant_is_an_error_that_says_what_to_do(tmp_path, table, needle):
    table = {**table, "step": [7] * len(table["N"])} if needle == "share the same" else table
    with pytest.raises(ValueError, match=needle):
        read_external(written(tmp_path, table))


def test_a_repeated_row_counts_once_and_is_listed(tmp_path):
    table = {name: [*values, values[-1]] for name, values in PLAIN.items()}
    result = read_external(written(tmp_path, table))
    assert len(result.rows) == 3
    assert result.rejected["reason"].item() == "repeats an earlier row"


@pytest.mark.parametrize(
    ("content", "name", "needle"),
    [
        ("name,loss\ncaf\u00e9,3\n".encode("latin-1"), "runs.csv", "not UTF-8"),
        (b"a,b\n1,2,3\n", "runs.csv", "cannot be read"),
        (b"N,N,loss\n1,2,3\n", "runs.csv", "columns of one name"),
        (b"\x80\x04K\x01.", "runs.pkl", "suffix is not known"),
        (b"{not json\n", "runs.jsonl", "cannot be read"),
        (b"PAR1 no", "runs.parquet", "cannot be read"),
        (b"", "runs.csv", "cannot be read"),
    ],
)
def test_a_file_that_is_not_a_table_is_an_error_of_one_line(tmp_path, content, name, needle):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ValueError, match=needle) as error:
        read_external(file)
    assert "\n" not in str(error.value)


def test_whole_numbers_beyond_64_bits_keep_their_value(tmp_path):
    file = tmp_path / "runs.jsonl"
    lines = [
        {"run": n, "N": 10**6, "D": 10**9, "C": 10 ** (19 + n), "loss": 3 - n} for n in range(2)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.testing.assert_array_equal(read_external(file).rows["flops"], [1e19, 1e20])


def test_every_number_is_float64_and_every_column_is_of_the_schema(tmp_path):
    rows = read_external(written(tmp_path, {**PLAIN, "seed": [1, 2, 3], "layers": [2, 4, 8]})).rows
    assert set(rows) <= {*SCHEMA, "source_row"}
    for name in set(rows) - {"source_row"}:
        if SCHEMA[name].kind != "text":
            assert rows[name].dtype == np.float64


def test_a_hundred_thousand_rows_are_read_in_seconds(tmp_path):
    count = 100_000
    table = {"run": np.arange(count), "N": 1e6, "D": np.arange(1, count + 1) * 1e6, "loss": 3.0}
    assert len(read_external(written(tmp_path, table)).rows) == count


@pytest.mark.parametrize("text", ["N", "N=", "=Size", "N=a,N=b"])
def test_a_mapping_that_is_none_is_an_error(text):
    with pytest.raises(ValueError, match="--columns"):
        parse_columns(text)


def test_no_name_stands_for_two_columns():
    names = [other for name, column in SCHEMA.items() for other in (name, *column.names)]
    assert len(names) == len(set(names))

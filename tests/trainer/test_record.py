"""The run record: one writer, rows that survive a crash, files that are whole."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from trainer import record as record_module
from trainer.record import (
    RunOwnedError,
    RunRecord,
    read_json,
    read_rows,
    read_run,
    write_atomically,
    write_json,
)

HOLD_RECORD = """
import sys, time
from pathlib import Path
from trainer.record import RunRecord
record = RunRecord(Path(sys.argv[1]))
record.append_metrics({"step": 1, "loss_nats": 2.5})
print(record.incarnation, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the record of `run` open."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_RECORD, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_learns_the_owner(tmp_path, holder):
    with pytest.raises(RunOwnedError, match=f"process {holder.pid} on {os.uname().nodename}"):
        RunRecord(tmp_path / "run")


def test_a_refused_process_changes_nothing(tmp_path, holder):
    run = tmp_path / "run"
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(RunOwnedError):
        RunRecord(run)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_killed_owner_leaves_its_rows_and_the_next_incarnation(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with closing(RunRecord(tmp_path / "run")) as record:
        assert record.incarnation == 2
    assert read_run(tmp_path / "run").metrics == [{"step": 1, "loss_nats": 2.5, "incarnation": 1}]


def test_a_record_that_was_given_back_can_be_opened_again(tmp_path):
    for incarnation in (1, 2, 3):
        with closing(RunRecord(tmp_path)) as record:
            assert record.incarnation == incarnation


def test_a_record_knows_when_a_later_incarnation_took_over(tmp_path):
    with closing(RunRecord(tmp_path)) as record:
        assert record.still_owned()
        write_json(tmp_path / "OWNER.json", {"incarnation": 2, "pid": os.getpid()})
        assert not record.still_owned()


def test_a_torn_last_line_is_not_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "incarnation": 1}\n{"step": 2, "incarn')
    assert read_rows(file) == [{"step": 1, "incarnation": 1}]


def test_a_line_that_is_whole_but_for_its_newline_counts_as_torn(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "incarnation": 1}\n{"step": 2}')
    assert read_rows(file) == [{"step": 1, "incarnation": 1}]


def test_a_torn_last_line_is_cut_off_before_the_next_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "incarnation": 1}\n{"step": 2, "inc')
    with closing(RunRecord(tmp_path)) as record:
        record.append_metrics({"step": 2})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_file_of_one_torn_line_starts_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "inc')
    with closing(RunRecord(tmp_path)) as record:
        record.append_metrics({"step": 1})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RuntimeError, match=r"metrics\.jsonl line 2"):
        read_rows(file)


def test_of_one_step_the_latest_incarnation_counts(tmp_path):
    for loss in (3.0, 2.0):
        with closing(RunRecord(tmp_path)) as record:
            for step in (1, 2):
                record.append_metrics({"step": step, "loss_nats": loss})
    assert [row["loss_nats"] for row in read_run(tmp_path).metrics] == [2.0, 2.0]


def test_a_late_row_of_an_earlier_incarnation_does_not_count(tmp_path):
    rows = [{"step": 1, "loss_nats": loss, "incarnation": i} for loss, i in ((2.0, 2), (3.0, 1))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["loss_nats"] for row in read_run(tmp_path).metrics] == [2.0]


def test_steps_are_ordered_as_numbers(tmp_path):
    with closing(RunRecord(tmp_path)) as record:
        for step in (10, 9, 100):
            record.append_metrics({"step": step})
    assert [row["step"] for row in read_run(tmp_path).metrics] == [9, 10, 100]


def test_evaluations_of_one_step_are_kept_apart_by_set_and_id(tmp_path):
    with closing(RunRecord(tmp_path)) as record:
        for name, evaluation in (("a", "x"), ("b", "x"), ("a", "y"), ("a", "x")):
            record.append_evaluations(
                [{"step": 1, "evaluation_set": name, "evaluation_id": evaluation}]
            )
    assert len(read_run(tmp_path).evaluations) == 3


def test_a_failed_evaluation_without_a_set_is_read_beside_others(tmp_path):
    with closing(RunRecord(tmp_path)) as record:
        record.append_evaluations([{"step": 1, "evaluation_set": "a", "evaluation_id": "x"}])
        record.append_evaluations([{"step": 1, "error": "out of memory"}])
    assert len(read_run(tmp_path).evaluations) == 2


def test_a_column_that_is_not_declared_is_refused(tmp_path):
    with (
        closing(RunRecord(tmp_path)) as record,
        pytest.raises(AssertionError, match=r"metrics\.jsonl.*'los'"),
    ):
        record.append_metrics({"step": 1, "los": 2.0})


def test_a_float_is_read_back_bit_for_bit(tmp_path):
    losses = [0.1, 1 / 3, math.pi * 1e-300, 2.0**-1074]
    with closing(RunRecord(tmp_path)) as record:
        for step, loss in enumerate(losses):
            record.append_metrics({"step": step, "loss_nats": loss})
    assert [row["loss_nats"] for row in read_run(tmp_path).metrics] == losses


def test_a_certificate_of_64_bits_is_read_back_exactly(tmp_path):
    with closing(RunRecord(tmp_path)) as record:
        record.append_metrics({"step": 1, "certificate": 2**64 - 1})
    assert read_run(tmp_path).metrics[0]["certificate"] == 2**64 - 1


def test_values_that_are_not_finite_are_stored_as_nothing(tmp_path):
    with closing(RunRecord(tmp_path)) as record:
        record.append_metrics({"step": 1, "loss_nats": math.nan, "gradient_norm": math.inf})
        record.write_summary({"loss_nats": math.nan, "sets": [{"nats": -math.inf}]})
    run = read_run(tmp_path)
    assert run.metrics == [{"step": 1, "loss_nats": None, "gradient_norm": None, "incarnation": 1}]
    assert run.summary == {"loss_nats": None, "sets": [{"nats": None}]}


def test_numbers_of_numpy_are_stored_as_numbers(tmp_path):
    write_json(tmp_path / "x.json", {"a": np.int64(5), "b": np.float32(0.5), "c": np.bool_(True)})
    assert read_json(tmp_path / "x.json") == {"a": 5, "b": 0.5, "c": True}


def test_the_config_is_written_once(tmp_path):
    with closing(RunRecord(tmp_path)) as record:
        record.write_config({"seed": 1})
        record.write_config({"seed": 2})
    assert read_run(tmp_path).config == {"seed": 1}


def test_provenance_keeps_every_start_and_shows_the_latest(tmp_path):
    for commit in ("one", "two"):
        with closing(RunRecord(tmp_path)) as record:
            record.write_provenance({"commit": commit})
    provenance = read_run(tmp_path).provenance
    assert provenance["commit"] == "two"
    assert [start["commit"] for start in provenance["starts"]] == ["one", "two"]
    assert [start["incarnation"] for start in provenance["starts"]] == [1, 2]


def test_an_empty_folder_reads_as_an_empty_run(tmp_path):
    run = read_run(tmp_path)
    assert (run.config, run.status, run.summary, run.metrics) == ({}, {}, {}, [])


def test_a_json_file_that_is_broken_is_an_error_that_names_it(tmp_path):
    for text in ("", '{"incarn', "[1]"):
        (tmp_path / "OWNER.json").write_text(text)
        with pytest.raises(RuntimeError, match=r"OWNER\.json"):
            read_json(tmp_path / "OWNER.json")


def test_replacing_a_file_on_a_full_disk_keeps_the_old_one_and_no_remains(tmp_path, monkeypatch):
    file = tmp_path / "STATUS.json"
    write_atomically(file, "old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_reading_records_needs_no_torch():
    code = "import sys, trainer.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path.cwd()).returncode == 0

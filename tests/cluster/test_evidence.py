"""The drill's own eyes: what it reads from records and accounting tells right from wrong."""

from contextlib import closing

import pytest

from tests.cluster.accounting import read_accounts
from tests.cluster.records import compare
from trainer.record import RunRecord

LOSS = 2.718281828459045
NEXT_LOSS = 2.7182818284590455


def write_run(folder, losses, sha256="aa"):
    with closing(RunRecord(folder)) as record:
        for step, loss in enumerate(losses, start=1):
            record.append_metrics({"step": step, "loss_nats": loss, "step_seconds": 1.0 / step})
        record.write_summary({"state": "done", "parameters_sha256": sha256})
    return folder


def test_equal_records_do_not_differ_whatever_their_times(tmp_path):
    left = write_run(tmp_path / "left", [LOSS, LOSS])
    right = write_run(tmp_path / "right", [LOSS])
    write_run(right, [LOSS, LOSS])
    compared = compare(left, right)
    assert (compared.values, compared.different) == (5, 0)


@pytest.mark.parametrize(
    ("losses", "sha256", "different"),
    [([LOSS, NEXT_LOSS], "aa", 1), ([LOSS], "aa", 2), ([LOSS, LOSS], "ab", 1)],
)
def test_a_last_bit_a_missing_row_and_other_weights_differ(tmp_path, losses, sha256, different):
    left = write_run(tmp_path / "left", [LOSS, LOSS])
    right = write_run(tmp_path / "right", losses, sha256)
    assert compare(left, right).different == different


def test_accounting_is_read_as_one_job_of_several_times():
    listing = "4|REQUEUED|n[1-2]\n4|COMPLETED|n1\n5|CANCELLED by 0|n2\n6|PENDING|None assigned\n"
    accounts = {a.job: a for a in read_accounts(lambda *_: listing)}
    assert (accounts["4"].states, accounts["4"].nodes) == (("REQUEUED", "COMPLETED"), "n1")
    assert [accounts[job].restarts for job in "456"] == [1, 0, 0]
    assert [accounts[job].is_over for job in "456"] == [True, True, False]
    assert accounts["5"].states == ("CANCELLED",)

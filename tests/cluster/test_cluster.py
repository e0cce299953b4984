"""The launcher on a real SLURM, where one is installed; nothing is installed here."""

import pytest

from tests.cluster.cluster import missing
from tests.cluster.run import run_drill


@pytest.mark.cluster
@pytest.mark.slow
def test_a_sweep_on_slurm_survives_kills_and_requeues_and_equals_a_local_one(tmp_path):
    reason = missing()
    if reason:
        pytest.skip(f"{reason}, or run make slurm, which does it")
    measured = [m for m in run_drill(tmp_path) if m.unit != "s"]
    broken = {m.name: m.value for m in measured if m.holds is False}
    assert broken == {}

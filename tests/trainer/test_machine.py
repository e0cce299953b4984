"""Freed memory stays with the process, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from trainer.machine import keep_freed_memory

print(int(keep_freed_memory() if {keep} else False))
for _ in range(16):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults_of_a_process(*, keep, **variables):
    """Whether freed memory is kept, and how many pages four tensors of 64 MiB were given anew."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC", "GLIBC"))}
    answer = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)],
        env={**environment, **variables}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    kept, faults = answer.stdout.split()
    return bool(int(kept)), int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_pages_of_freed_tensors_are_used_again():
    kept, faults = faults_of_a_process(keep=True)
    assert kept
    assert faults < 100
    _, without = faults_of_a_process(keep=False)
    assert without > 30 * max(faults, 1)


def test_settings_of_the_user_are_left_alone():
    kept, _ = faults_of_a_process(keep=True, MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept

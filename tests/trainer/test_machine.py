"""Freed memory stays with the process, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

MAPPED = """
import ctypes, torch
from trainer.machine import keep_freed_memory

class Facts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Facts
print(int(keep_freed_memory() if {keep} else False))
for numbers in (2**22, 2**24):
    before = library.mallinfo2().e
    tensor = torch.ones(numbers)
    print((library.mallinfo2().e - before) // 2**20)
    del tensor
"""


def mapped_by_a_process(*, keep, **variables):
    """Whether freed memory is kept; MiB that tensors of 16 and 64 MiB took beside the heap."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC", "GLIBC"))}
    answer = subprocess.run(
        [sys.executable, "-c", MAPPED.format(keep=keep)],
        env={**environment, **variables}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [int(word) for word in answer.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_tensors_lie_in_a_heap_that_is_kept_but_for_the_largest():
    assert mapped_by_a_process(keep=True) == [1, 0, 64]
    assert mapped_by_a_process(keep=False) == [0, 16, 64]


def test_settings_of_the_user_are_left_alone():
    assert mapped_by_a_process(keep=True, MALLOC_TRIM_THRESHOLD_="131072")[0] == 0

"""The exit codes of jobs and commands; trainer.failures chooses one for an error."""

import enum


class ExitCode(enum.IntEnum):
    """Why a process ended."""

    DONE = 0
    FAILED = 1
    BAD_CONFIG = 64
    BAD_DATA = 65
    BAD_CHECKPOINT = 66
    NUMERIC_HALT = 70
    DISK = 71
    REQUEUE = 75
    HANG = 76
    INTERRUPTED = 130

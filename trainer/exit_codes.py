"""The exit codes by which a job tells its launcher how it ended."""

import enum


class ExitCode(enum.IntEnum):
    """Why a process ended, for whoever started it; the launcher decides by it what happens next."""

    DONE = 0
    BAD_CONFIG = 64
    BAD_DATA = 65
    BAD_CHECKPOINT = 66
    NUMERIC_HALT = 70
    DISK = 71
    REQUEUE = 75
    HANG = 76
    INTERRUPTED = 130

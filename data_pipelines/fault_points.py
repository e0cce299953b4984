"""Named points at which tests kill this process or simulate a full disk; no-ops in normal use.

`CROSSLADDER_FAULT=name` kills the process the first time it passes `fault_point(name)`,
`name:3` the third time, and `name:3:enospc` raises a full disk there instead.
"""

import errno
import os
import signal


def fault_point(name: str) -> None:
    """Do nothing, unless the environment requests a fault here.

    Raises:
        OSError: the environment requests a full disk here.
    """
    if name != _NAME:
        return
    global _passings
    _passings += 1
    if _passings != _COUNT:
        return
    if _KIND == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    os.kill(os.getpid(), signal.SIGKILL)


def _asked(text: str) -> tuple[str, int, str]:
    name, count, kind = [*text.split(":"), "", ""][:3]
    return name, int(count or 1), kind or "kill"


_NAME, _COUNT, _KIND = _asked(os.environ.get("CROSSLADDER_FAULT", ""))
_passings = 0

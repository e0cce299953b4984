"""The build folder of other packages' torch extensions, and the removal of stale locks in it."""

import contextlib
import fcntl
import functools
import os
import pathlib
from typing import IO

from kernels.native_library import cache_folder


def use_extension_cache() -> None:
    """Send the builds of torch extensions by other packages, such as DeepSpeed, to our cache.

    Torch's builder waits forever for a `lock` file that a killed process left behind. So every
    process that calls this holds a shared file lock until it exits, and one that can get an
    exclusive lock first is alone and removes stale files. A `TORCH_EXTENSIONS_DIR` set by the user
    is respected.
    """
    default = cache_folder() / "extensions"
    folder = pathlib.Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))
    folder.mkdir(parents=True, exist_ok=True)
    _hold_extension_lock(folder)


@functools.cache
def _hold_extension_lock(folder: pathlib.Path) -> IO[str]:
    """Hold the folder's shared file lock for the life of the process; the cache keeps it open."""
    file = (folder / "users.flock").open("w")
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for abandoned in folder.glob("*/lock"):
            abandoned.unlink()
    fcntl.flock(file, fcntl.LOCK_SH)
    return file

"""Create `.venv` from the lock file; runs on the system's Python, without any package.

python3 setup_environment.py            install whatever is missing
python3 setup_environment.py --lock     resolve requirements.lock again (3.11 and 3.12)
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements.lock"
MARK = VENV / "complete"
NEEDED_GB = 10
SUPPORTED = ((3, 11), (3, 12))


def main() -> int:
    """Set up, or lock; returns the exit code."""
    if "--lock" in sys.argv[1:]:
        return lock()
    wanted = fingerprint()
    if MARK.exists() and MARK.read_text() == wanted:
        return 0
    problem = missing()
    if problem:
        say(problem)
        return 1
    begin = time.monotonic()
    say("creating .venv: a few minutes, about 7 GB, only once; you can interrupt and rerun it")
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True, symlinks=True)
    run("installing exact versions from requirements.lock", *pip("-r", str(LOCK)))
    own = ("--no-deps", "--no-build-isolation", "-e", str(ROOT))
    run("installing this project", *pip(*own))
    if shutil.which("g++") or shutil.which("c++"):
        warm = "from trainer.engine import warm; warm()"
        run("compiling native kernels", str(PYTHON), "-c", warm)
    MARK.write_text(wanted)
    say(f"ready after {time.monotonic() - begin:.0f} s")
    return 0


def missing() -> str:
    """What this machine lacks and how to fix it; empty if nothing."""
    if sys.version_info[:2] not in SUPPORTED:
        return (
            f"this is Python {sys.version.split()[0]}, but 3.11 or 3.12 is needed; "
            "install one and name it: make PYTHON=python3.11 sweep"
        )
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < NEEDED_GB and not (VENV / "lib").exists():
        return f"{ROOT} has {free:.1f} GB free, but {NEEDED_GB} GB are needed; free some disk space"
    if not (shutil.which("g++") or shutil.which("c++")):
        say(
            "no C++ compiler found: everything works, but Mamba's scan is 50 times slower. "
            "Install one (Debian: apt-get install g++), delete .venv/complete and rerun"
        )
    return ""


def fingerprint() -> str:
    """A hash of everything the environment is built from; when it changes, it is set up again."""
    sources = sorted([*ROOT.glob("kernels/**/*.cpp"), *ROOT.glob("kernels/**/*.h")])
    parts = [LOCK, ROOT / "pyproject.toml", Path(__file__), *sources]
    digest = hashlib.sha256(str(ROOT).encode() + sys.version.encode())
    for part in parts:
        digest.update(part.read_bytes())
    return digest.hexdigest()


def lock() -> int:
    """Resolve exact versions for 3.11, and check that 3.12 resolves to the same ones."""
    run("installing the resolver", *pip("uv"))
    uv = (str(PYTHON), "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate")
    run("resolving for 3.11", *uv, "pyproject.toml", *("--extra", "dev"), *on("3.11", LOCK))
    again = VENV / "lock-3.12.txt"
    run("resolving the same for 3.12", *uv, str(LOCK), *on("3.12", again))
    if again.read_text() != LOCK.read_text():
        say("3.11 and 3.12 resolve differently: compare requirements.lock with .venv/lock-3.12.txt")
        return 1
    return 0


def on(version: str, out: Path) -> tuple[str, ...]:
    """The resolver's arguments for a Python version and an output file."""
    return ("--python-version", version, "--no-emit-index-url", "-o", str(out))


def pip(*words: str) -> tuple[str, ...]:
    """A pip command in the environment."""
    quiet = ("--quiet", "--disable-pip-version-check", "--progress-bar", "off")
    return (str(PYTHON), "-m", "pip", "install", *quiet, *words)


def run(what: str, *words: str) -> None:
    """Run one step; end the program if it fails."""
    say(f"{what} ...")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    if subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode != 0:
        say(f"{what} failed, see above; rerun the same command to resume")
        sys.exit(1)


def say(line: str) -> None:
    """Print a line for the user."""
    sys.stderr.write(f"setup: {line}\n")


if __name__ == "__main__":
    sys.exit(main())

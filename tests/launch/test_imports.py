"""What the launcher and the analysis load, and where the packages come from."""

import importlib
import tomllib
from pathlib import Path

import pytest

from tests.launch.command import ROOT, command

PACKAGES = ("analysis", "data_pipelines", "kernels", "launch", "models", "sweeps", "trainer")


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_come_from_this_checkout(name: str) -> None:
    file = importlib.import_module(name).__file__
    assert file is not None
    assert Path(file).is_relative_to(ROOT)


def test_the_launcher_loads_neither_deepspeed_nor_streaming() -> None:
    code = (
        "import sys, launch.sweep, launch.train, launch.job; "
        "print(sorted({'deepspeed', 'streaming'} & set(sys.modules)))"
    )
    assert command("-c", code).stdout.strip() == "[]"


def test_a_laptop_without_torch_draws_the_figures() -> None:
    code = "import sys, analysis.report.__main__; print('torch' in sys.modules)"
    assert command("-c", code).stdout.strip() == "False"


def test_no_file_of_launch_bears_the_name_of_a_library() -> None:
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    libraries = {line.partition("==")[0].replace("-", "_") for line in lock}
    assert not libraries & {path.stem for path in (ROOT / "launch").glob("*.py")}


def test_every_dependency_is_pinned_in_the_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lock if "==" in line}
    assert {word.split(">")[0].split("<")[0].split("=")[0] for word in wanted} <= pinned

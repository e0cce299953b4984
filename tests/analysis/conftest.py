"""Sweep folders that several tests read, written once."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.tables.run_table import Table
from analysis.tables.sweep_folder import load
from tests.analysis.synthetic_study import Study, write

PUBLISHED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def study() -> Study:
    return Study()


@pytest.fixture(scope="session")
def sweep(tmp_path_factory, study) -> Path:
    """A complete sweep with noise; tests do not write to it."""
    return write(study, tmp_path_factory.mktemp("runs") / "full", np.random.default_rng(3))


@pytest.fixture(scope="session")
def noise_free(tmp_path_factory) -> Table:
    root = tmp_path_factory.mktemp("runs") / "exact"
    return load(write(Study(seed_sd=0.0, point_sd=0.0), root, np.random.default_rng(0)))


@pytest.fixture(scope="session")
def chinchilla_rows() -> pd.DataFrame:
    """The 240 published points that the replication keeps, in the table's columns."""
    file = PUBLISHED / "chinchilla_epoch245.csv"
    if not file.exists():
        pytest.skip(f"{file.name} is not beside this checkout")
    points = pd.read_csv(file)
    points = points[points["loss"] < sorted(points["loss"])[-5]].reset_index(drop=True)
    return pd.DataFrame(
        {
            "run_id": points["run"].astype(str),
            "trunk_id": points["run"].astype(str),
            "architecture": "transformer",
            "corpus": "web",
            "parameters": points["N"],
            "tokens": points["D"],
            "flops": points["C"],
            "loss_nats": points["loss"],
        }
    )

"""Shared fixtures. Tests run on one torch thread, so that several workers do not fight for cores."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the real data sets (``DEMEM_DATA_ROOT``, or ``../shared/data``); skips where there is none."""
    named = os.environ.get("DEMEM_DATA_ROOT")
    root = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not root.is_dir():
        pytest.skip(f"no data folder at {root}; set DEMEM_DATA_ROOT to run this test")
    return root


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)

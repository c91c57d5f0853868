"""Shared fixtures. Tests run on one torch thread, so that several workers do not fight for cores."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

torch.set_num_threads(1)
# Forked processes have imported torch already; elsewhere than on Linux that is not safe.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder with the real data sets (``DEMEM_DATA_ROOT``, or ``../shared/data``); skips where there is none."""
    named = os.environ.get("DEMEM_DATA_ROOT")
    root = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not root.is_dir():
        pytest.skip(f"no data folder at {root}; set DEMEM_DATA_ROOT to run this test")
    return root


@pytest.fixture(scope="session")
def two_processes() -> dict[str, Any]:
    """Options of a Trainer that runs on two processes."""
    return {"strategy": f"ddp_{START_METHOD}", "devices": 2, "accelerator": "cpu"}


@pytest.fixture
def in_two_processes(tmp_path: Path) -> Callable[..., list[Any]]:
    """Calls ``work(rank, *args)`` in two processes of one group, and gives what each returned."""

    def run(work: Callable[..., Any], *args: Any) -> list[Any]:
        mp.start_processes(_one_of_two, (tmp_path, work, args), nprocs=2, start_method=START_METHOD)
        return [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    return run


def _one_of_two(rank: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    try:
        torch.save(work(rank, *args), folder / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with several processes come first: a fork of a process in which other tests have left threads may hang."""
    forks = {"two_processes", "in_two_processes"}
    items.sort(key=lambda item: forks.isdisjoint(getattr(item, "fixturenames", ())))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a benchmark that ran before may have taken more

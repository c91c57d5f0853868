"""Spread independent pieces of work over torch's number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def for_each(task: Callable[[T], None], items: Iterable[T]) -> None:
    """Run ``task`` on every item, on ``torch.get_num_threads()`` threads.

    Each piece runs on one thread: counting cannot be split inside an operation, and a pool on top of torch's own would
    only make threads wait for each other.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        for item in items:
            task(item)
        return
    inference = torch.is_inference_mode_enabled()

    def run(item: T) -> None:
        with torch.inference_mode(inference):  # the mode belongs to a thread; workers do not inherit it
            task(item)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(run, items):
                pass
    finally:
        torch.set_num_threads(threads)

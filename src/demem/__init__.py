"""demem: find and remove spurious memorization while a network trains.

The callbacks are here; the functions under them are in :mod:`demem.sites`, :mod:`demem.measures`,
:mod:`demem.metrics`, :mod:`demem.tracing`, :mod:`demem.groups`, :mod:`demem.removal`, :mod:`demem.linear` and
:mod:`demem.run`, the data sets in :mod:`demem.data`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from demem.callbacks import ActivationDiversityMonitor, MemorizationRemover, MemorizationTracer, WorstGroupMonitor

__version__ = "0.1.0"

__all__ = [
    "ActivationDiversityMonitor",
    "MemorizationRemover",
    "MemorizationTracer",
    "WorstGroupMonitor",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """A callback, or a room such as ``demem.groups``, imported when it is first asked for: Lightning takes seconds."""
    if name in __all__:
        return getattr(import_module("demem.callbacks"), name)
    if name.startswith("_"):
        raise AttributeError(f"module 'demem' has no attribute {name!r}")
    try:
        return import_module(f"demem.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"demem.{name}":
            raise
        raise AttributeError(f"module 'demem' has no attribute {name!r}") from None

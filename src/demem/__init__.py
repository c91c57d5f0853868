"""demem: find and remove spurious memorization while a network trains.

The callbacks are here; the functions under them are in :mod:`demem.sites`, :mod:`demem.measures`,
:mod:`demem.metrics`, :mod:`demem.tracing`, :mod:`demem.groups`, :mod:`demem.removal`, :mod:`demem.linear` and
:mod:`demem.run`, the data sets in :mod:`demem.data`.
"""

from demem.callbacks import ActivationDiversityMonitor, MemorizationRemover, MemorizationTracer, WorstGroupMonitor

__version__ = "0.1.0"

__all__ = [
    "ActivationDiversityMonitor",
    "MemorizationRemover",
    "MemorizationTracer",
    "WorstGroupMonitor",
    "__version__",
]

"""The callbacks: when, inside a Trainer, measuring, tracing and removing happen."""

from demem.callbacks.diversity import ActivationDiversityMonitor
from demem.callbacks.remover import MemorizationRemover
from demem.callbacks.tracer import MemorizationTracer
from demem.callbacks.worst_group import WorstGroupMonitor

__all__ = ["ActivationDiversityMonitor", "MemorizationRemover", "MemorizationTracer", "WorstGroupMonitor"]

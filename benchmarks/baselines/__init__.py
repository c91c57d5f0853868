"""The arms of the comparison. Each file says which paper it follows, and where it had to choose."""

from benchmarks.baselines import erm, last_layer
from benchmarks.experiment import Method

METHODS: list[Method] = [*erm.METHODS, *last_layer.METHODS]

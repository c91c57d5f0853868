"""Plant a spurious attribute that agrees with the class for most training examples and for half of the others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def plant_attribute(y: IntArray, correlation: float, rng: np.random.Generator) -> IntArray:
    """A binary attribute that equals the class for exactly the share ``correlation`` of each class (rounded).

    Args:
        y: binary classes ``(N,)``.
        correlation: share of each class whose attribute equals the class; .5 is no correlation.
        rng: decides which examples those are.

    Returns:
        attribute ``(N,)`` of 0 and 1.

    Raises:
        ValueError: ``y`` is not binary or ``correlation`` lies outside ``[0, 1]``.
    """
    if not 0 <= correlation <= 1:
        raise ValueError(f"correlation must lie between 0 and 1, got {correlation}.")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"A spurious attribute is planted on classes 0 and 1, got {np.unique(y).tolist()}.")
    attribute: IntArray = y.copy()
    for label in (0, 1):
        members = rng.permutation(np.flatnonzero(y == label))
        attribute[members[: len(members) - round(correlation * len(members))]] = 1 - label
    return attribute


def paint(gray: NDArray[np.float32], attribute: IntArray) -> NDArray[np.float32]:
    """Colour images ``(N, H, W)`` red (attribute 0) or green (attribute 1): ``(N, 3, H, W)``."""
    colored = np.zeros((len(gray), 3, *gray.shape[1:]), np.float32)
    colored[np.arange(len(gray)), attribute] = gray
    return colored


def stratified_split(
    labels: IntArray, sizes: tuple[float, float], rng: np.random.Generator
) -> tuple[IntArray, IntArray, IntArray]:
    """Disjoint train, validation and test positions, with the shares ``sizes`` and the rest, inside each label."""
    parts: tuple[list[IntArray], list[IntArray], list[IntArray]] = ([], [], [])
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        first, second = round(sizes[0] * len(members)), round((sizes[0] + sizes[1]) * len(members))
        for part, chosen in zip(parts, np.split(members, [first, second]), strict=True):
            part.append(chosen)
    train, val, test = (np.sort(np.concatenate(part)) for part in parts)
    return train, val, test

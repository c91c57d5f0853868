"""Real handwritten digits with a planted spurious colour: no download, seconds to train."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from demem.data.arrays import GroupedTensors
from demem.data.datamodule import GroupedDataModule, HeldOut, Sampling
from demem.data.planting import paint, plant_attribute, stratified_split


def make_spurious_digits(
    correlation: float = 0.95, seed: int = 0
) -> tuple[GroupedTensors, GroupedTensors, GroupedTensors]:
    """Train, validation and test sets of scikit-learn's 1,797 digits (8×8 pixels).

    Class ``y = [digit ≥ 5]``.  The spurious attribute is the ink: red (0) or green (1).  In training it equals the
    class for the share ``correlation`` of each class; in validation and test it is independent of the class, so groups
    are balanced inside each class as they are in Waterbirds.  The sets are disjoint and stratified by digit: about
    990 / 270 / 540.  Group = 2·class + colour, so groups 1 and 2 are the minority.

    Args:
        correlation: share of the training examples whose colour equals the class; .5 is no spurious correlation.
        seed: decides the split and which examples break the rule.

    Returns:
        Three sets with ``x`` ``(N, 3, 8, 8)`` in [0, 1].
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    y = (digits.target >= 5).astype(np.int64)
    rng = np.random.default_rng(seed)
    positions = stratified_split(digits.target.astype(np.int64), (0.55, 0.15), rng)
    sets = []
    for part, share in zip(positions, (correlation, 0.5, 0.5), strict=True):
        color = plant_attribute(y[part], share, rng)
        x = torch.from_numpy(paint(images[part], color))
        sets.append(GroupedTensors(x, torch.from_numpy(y[part]), torch.from_numpy(2 * y[part] + color)))
    return sets[0], sets[1], sets[2]


class SpuriousDigits(GroupedDataModule):
    """:func:`make_spurious_digits` as a data module: ``Trainer().fit(model, datamodule=SpuriousDigits())``.

    Args:
        correlation: share of the training examples whose colour equals the class; .5 is no spurious correlation.
        held_out: see :class:`~demem.data.GroupedDataModule`, as for the other arguments.
        held_out_share: of the training set, with ``held_out="iid"``.
        sampling: how training examples are drawn.
        batch_size: examples per training batch.
        seed: decides the split, which examples break the rule, and the ``iid`` slice.
    """

    def __init__(
        self,
        correlation: float = 0.95,
        held_out: HeldOut = "val",
        held_out_share: float = 0.2,
        sampling: Sampling = "shuffle",
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(
            num_classes=2,
            num_groups=4,
            held_out=held_out,
            held_out_share=held_out_share,
            sampling=sampling,
            batch_size=batch_size,
            seed=seed,
        )
        self.correlation = correlation

    def build(self) -> tuple[Any, Any, Any, Any]:
        return (*make_spurious_digits(self.correlation, self.seed), None)

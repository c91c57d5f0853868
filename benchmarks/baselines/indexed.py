"""Training examples that bring their index along, for arms that keep something for each of them."""

from __future__ import annotations

from typing import Any

from demem.data import GroupedDataset


class Indexed(GroupedDataset):
    """Adds each example's index to what a grouped data set yields."""

    def __init__(self, dataset: GroupedDataset) -> None:
        super().__init__(dataset, dataset.y, dataset.group)

    def __getitem__(self, index: int) -> Any:
        return {"x": self.inputs[index][0], "y": self.y[index], "group": self.group[index], "index": index}

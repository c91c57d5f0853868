"""Grouped data: data sets, how to make them, and Lightning data modules."""

from demem.data.arrays import GroupedDataset, GroupedTensors, as_grouped, collate
from demem.data.datamodule import GroupedDataModule
from demem.data.digits import SpuriousDigits, make_spurious_digits
from demem.data.mnist import ColoredMNIST, Dominoes, make_colored_mnist, make_dominoes
from demem.data.wilds import WildsDataModule

__all__ = [
    "ColoredMNIST",
    "Dominoes",
    "GroupedDataModule",
    "GroupedDataset",
    "GroupedTensors",
    "SpuriousDigits",
    "WildsDataModule",
    "as_grouped",
    "collate",
    "make_colored_mnist",
    "make_dominoes",
    "make_spurious_digits",
]

"""Grouped data: data sets, how to make them, and Lightning data modules."""

from demem.data.arrays import GroupedDataset, GroupedTensors, as_grouped, collate
from demem.data.datamodule import GroupedDataModule
from demem.data.digits import SpuriousDigits, make_spurious_digits
from demem.data.mnist import ColoredMNIST, Dominoes, load_mnist, make_colored_mnist, make_dominoes
from demem.data.planting import IntArray, plant_attribute, stratified_split
from demem.data.wilds import WildsDataModule, image_transform, load_wilds, make_grouper

__all__ = [
    "ColoredMNIST",
    "Dominoes",
    "GroupedDataModule",
    "GroupedDataset",
    "GroupedTensors",
    "IntArray",
    "SpuriousDigits",
    "WildsDataModule",
    "as_grouped",
    "collate",
    "image_transform",
    "load_mnist",
    "load_wilds",
    "make_colored_mnist",
    "make_dominoes",
    "make_grouper",
    "make_spurious_digits",
    "plant_attribute",
    "stratified_split",
]

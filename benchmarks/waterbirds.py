"""Waterbirds on two cores: a pretrained network whose first layers are frozen, their outputs kept on disk.

The frozen layers (:mod:`benchmarks.backbones`) give 96×10×10 numbers per 160 px crop with MobileNetV2 and 112×10×10
with EfficientNet-Lite0.  They are computed once, for the plain view of every image and three augmented views of each
training image.  Training then covers the tail, with batch-norm statistics frozen: seconds per epoch instead of minutes.
"""

from __future__ import annotations

from functools import cache as once
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.backbones import Tail, image_arrays, make_backbone, open_image, weights_file, weights_source
from benchmarks.cache import Create, Make, Progress, file_hash, find_or_make, read
from demem.data import GroupedDataModule, GroupedTensors, load_wilds, make_grouper
from demem.module import Classifier

if TYPE_CHECKING:
    from benchmarks.experiment import Settings

RESIZE, CROP, AUGMENTED_VIEWS = 180, 160, 3
SPLITS = {"train": AUGMENTED_VIEWS, "val": 0, "test": 0}  # augmented views


class WaterbirdsFeatures(GroupedDataModule):
    """Cached outputs of the frozen layers as a data module; a random view of each training example is drawn each time.

    Args:
        folder: what :func:`cache_features` returned.
        held_out: as in ``GroupedDataModule``, like ``seed``, ``sampling`` and ``batch_size``.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        super().__init__(num_classes=2, num_groups=4, **{"batch_size": 64, **options})
        self.folder = Path(folder)

    def build(self) -> tuple[Any, Any, Any, Any]:
        def split(name: str, views: int) -> GroupedTensors:
            labels = read(self.folder, f"{name}_labels")
            arrays = [f"{name}_plain", *(f"{name}_augmented{v}" for v in range(views))]
            return GroupedTensors([read(self.folder, array) for array in arrays], labels[0], labels[1])

        return split("train", AUGMENTED_VIEWS), split("val", 0), split("test", 0), split("train", 0)


def make_data(backbone: str, settings: Settings, **options: Any) -> WaterbirdsFeatures:
    """The data of the comparison; ``options`` are those of :class:`WaterbirdsFeatures`."""
    weights = weights_file(backbone, settings)
    folder = cache_features(settings.root("waterbirds"), weights, settings.cache, settings.on_caching, backbone)
    return WaterbirdsFeatures(folder, **options)


def make_module(backbone: str, settings: Settings, **options: Any) -> Classifier:
    """The network of the comparison; ``options`` are those of ``Classifier``."""
    network = Tail(make_backbone(backbone, weights_file(backbone, settings)))
    return Classifier(network, freeze_batchnorm=True, **{"lr": 3e-3, **options})


def sources(backbone: str, settings: Settings) -> list[str]:
    """Where data and weights come from, and their licences."""
    folder = settings.root("waterbirds") / "waterbirds_v1.0"
    data = f"data: {folder} (CUB-200-2011 and Places; non-commercial research and education)"
    return [data, weights_source(backbone, weights_file(backbone, settings))]


def cache_features(
    root: str | Path,
    weights: Path,
    cache: Path | None = None,
    progress: Progress | None = None,
    backbone: str = "mobilenetv2",
) -> Path:
    """Compute the outputs of the frozen layers, or find them on disk (:func:`benchmarks.cache.find_or_make`).

    Args:
        root: holds ``waterbirds_v1.0``.
        weights: the backbone's file (:func:`benchmarks.backbones.weights_file`).
        cache: parent folder (0.7 GB); default :func:`benchmarks.cache.default_cache`.
        progress: see :data:`benchmarks.cache.Progress`.
        backbone: ``"mobilenetv2"`` or ``"efficientnet_lite0"``.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: data or weights are missing or damaged.
    """
    metadata = Path(root) / "waterbirds_v1.0" / "metadata.csv"
    if not metadata.is_file():
        raise FileNotFoundError(
            f"There is no Waterbirds at {metadata.parent}: pass --data-root with the folder above it."
        )
    dataset = once(lambda: load_wilds("waterbirds", root))
    model = once(lambda: make_backbone(backbone, weights))

    def positions(split: str) -> np.ndarray:
        return np.flatnonzero(dataset().split_array == dataset().split_dict[split])

    def image(position: int) -> Any:
        return open_image(metadata.parent / str(dataset()._input_array[position]))

    def labels(split: str) -> Make:
        def fill(create: Create) -> None:
            here = positions(split)
            group = make_grouper(dataset()).metadata_to_group(dataset().metadata_array[here])
            rows = np.stack([torch.as_tensor(dataset().y_array)[here].numpy(), group.numpy()])
            create(rows.shape, np.int64)[:] = rows

        return fill

    arrays: dict[str, Make] = {}
    for split, views in SPLITS.items():
        arrays[f"{split}_labels"] = labels(split)
        arrays |= image_arrays(split, model, image, partial(positions, split), views, RESIZE, CROP, progress)
    made_from = {
        "metadata": file_hash(metadata),
        "backbone": backbone,
        "weights": file_hash(weights),
        "sizes": [RESIZE, CROP],
        "views": AUGMENTED_VIEWS,
        "version": 2,
    }
    return find_or_make(cache, f"waterbirds-{backbone}", made_from, arrays)

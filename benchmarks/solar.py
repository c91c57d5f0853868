"""Solar cells: real photographs whose cell type goes with the defect, from two pip packages.

2,223 electroluminescence photographs of solar cells (the package elpv-dataset; Buerhop-Lutz et al. 2018, Deitsch et
al. 2019; CC BY-NC-SA 4.0), surely functional (class 0) or surely defective (class 1) to its experts.  The attribute is
the cell type: monocrystalline (0) or polycrystalline (1).  In training 95% of the functional cells are monocrystalline
and 95% of the defective ones polycrystalline; in the validation and the test set both types are equally frequent in
each class.  Group = 2·class + type, so groups 1 and 2 are the minority.

The network is EfficientNet-Lite0 with ImageNet weights, cut in two as for Waterbirds (:mod:`benchmarks.backbones`).
"""

from __future__ import annotations

from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.backbones import Tail, efficientnet_lite0, image_arrays, lite0_file, open_image, weights_source
from benchmarks.cache import Create, Progress, file_hash, find_or_make, read
from benchmarks.packages import require, version_of
from demem.data import GroupedDataModule, GroupedTensors, IntArray
from demem.module import Classifier

if TYPE_CHECKING:
    from benchmarks.experiment import Settings

PACKAGE, EXTRA = "elpv_dataset", "solar"
RESIZE, CROP, AUGMENTED_VIEWS = 192, 192, 3
CORRELATION = 0.95
VAL_SHARE, TEST_SHARE = 0.12, 0.3  # of the photographs of a class's frequent type
TYPES = {"mono": 0, "poly": 1}


def read_labels(file: Path) -> tuple[list[Path], IntArray, IntArray]:
    """Photographs, classes and types, from the data set's ``labels.csv`` (columns: path, probability, type).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is damaged; the message gives its number.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file}. Install elpv-dataset again: pip install -e '.[{EXTRA}]'")
    paths, y, attribute = [], [], []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        columns = line.split()
        try:
            path, probability, kind = columns
            kind = TYPES[kind]
            if not 0 <= float(probability) <= 1:
                raise ValueError(probability)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file} is damaged at line {number}: {line[:80]!r}") from error
        if float(probability) in (0, 1):
            paths.append(file.parent / path)
            y.append(int(float(probability)))
            attribute.append(kind)
    return paths, np.array(y, np.int64), np.array(attribute, np.int64)


def split_photographs(y: IntArray, attribute: IntArray, seed: int) -> tuple[IntArray, IntArray, IntArray]:
    """Disjoint training, validation and test positions.

    In each class the frequent type is the one that equals the class.  Of it, 12% and 30% go to validation and test,
    with as many of the other type; the rest of it is trained on, with as many of the other type as make 95%.  What
    is left of the other type is not used.

    Args:
        y: binary classes ``(N,)``.
        attribute: binary types ``(N,)``.
        seed: of the draw.

    Raises:
        ValueError: a group has too few photographs for that.
    """
    rng = np.random.default_rng(seed)
    parts: tuple[list[IntArray], list[IntArray], list[IntArray]] = ([], [], [])
    for label in (0, 1):
        frequent, rare = (
            rng.permutation(np.flatnonzero((y == label) & (attribute == kind))) for kind in (label, 1 - label)
        )
        val, test = round(VAL_SHARE * len(frequent)), round(TEST_SHARE * len(frequent))
        kept = len(frequent) - val - test
        minority = round(kept * (1 - CORRELATION) / CORRELATION)
        needed = val + test + minority
        if min(val, test, minority) < 1 or len(rare) < needed:
            raise ValueError(
                f"Class {label} has {len(frequent)} photographs of its frequent type and {len(rare)} of the other; the "
                f"split needs {max(needed, 1)} of the latter."
            )
        for part, start, size in ((1, 0, val), (2, val, test)):
            parts[part].extend((frequent[start : start + size], rare[start : start + size]))
        parts[0].extend((frequent[val + test :], rare[val + test : needed]))
    train, val_set, test_set = (np.sort(np.concatenate(part)) for part in parts)
    return train, val_set, test_set


class SolarFeatures(GroupedDataModule):
    """Cached outputs of the frozen layers as a data module; a random view of each training example is drawn each time.

    Args:
        folder: what :func:`cache_features` returned.
        held_out: as in ``GroupedDataModule``, like ``seed`` (which also decides the split), ``sampling`` and
            ``batch_size``.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        super().__init__(num_classes=2, num_groups=4, **{"batch_size": 32, **options})
        self.folder = Path(folder)

    def build(self) -> tuple[Any, Any, Any, Any]:
        y, attribute = read(self.folder, "labels")
        group = 2 * y + attribute
        views = [read(self.folder, a) for a in ("all_plain", *(f"all_augmented{v}" for v in range(AUGMENTED_VIEWS)))]

        def part(positions: Tensor, views: list[Tensor]) -> GroupedTensors:
            return GroupedTensors(views, y[positions], group[positions], positions)

        train, val, test = map(torch.from_numpy, split_photographs(y.numpy(), attribute.numpy(), self.seed))
        return part(train, views), part(val, views[:1]), part(test, views[:1]), part(train, views[:1])


def cache_features(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Compute the outputs of the frozen layers, or find them on disk (:func:`benchmarks.cache.find_or_make`).

    Args:
        cache: parent folder (0.3 GB); default :func:`benchmarks.cache.default_cache`.
        progress: see :data:`benchmarks.cache.Progress`.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: a package is not installed, or a file of it is missing or damaged.
        ValueError: a line of its labels is damaged.
    """
    labels = require(PACKAGE, EXTRA) / "data" / "labels.csv"
    paths, y, attribute = read_labels(labels)

    def fill_labels(create: Create) -> None:
        create((2, len(y)), np.int64)[:] = np.stack([y, attribute])

    views = image_arrays(
        "all",
        once(efficientnet_lite0),
        lambda i: open_image(paths[i]),
        lambda: np.arange(len(paths)),
        AUGMENTED_VIEWS,
        RESIZE,
        CROP,
        progress,
    )
    made_from = {
        "labels": file_hash(labels),
        "data": f"{PACKAGE} {version_of(PACKAGE)}",
        "weights": file_hash(lite0_file()),
        "sizes": [RESIZE, CROP],
        "views": AUGMENTED_VIEWS,
        "version": 1,
    }
    return find_or_make(cache, "solar", made_from, {"labels": fill_labels, **views})


def make_data(settings: Settings, **options: Any) -> SolarFeatures:
    """The data of the comparison; ``options`` are those of :class:`SolarFeatures`."""
    return SolarFeatures(cache_features(settings.cache, settings.on_caching), **options)


def make_module(settings: Settings, **options: Any) -> Classifier:
    """The network of the comparison; ``options`` are those of ``Classifier``."""
    return Classifier(Tail(efficientnet_lite0()), freeze_batchnorm=True, **{"lr": 3e-3, **options})


def check(settings: Settings) -> None:
    """Raise a ``FileNotFoundError`` that says what to install, if a package is missing."""
    require(PACKAGE, EXTRA)
    lite0_file()


def sources(settings: Settings) -> list[str]:
    """Where data and weights come from, and their licences."""
    data = f"data: package elpv-dataset {version_of(PACKAGE)} (solar cells; CC BY-NC-SA 4.0)"
    return [data, weights_source("efficientnet_lite0", lite0_file())]

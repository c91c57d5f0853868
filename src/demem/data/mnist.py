"""Colored MNIST and MNIST–FashionMNIST dominoes, made from torchvision's data sets in a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from demem.data.arrays import GroupedTensors
from demem.data.datamodule import GroupedDataModule, HeldOut, Sampling
from demem.data.planting import IntArray, paint, plant_attribute

Images = NDArray[np.float32]


def load_mnist(root: str | Path, train: bool, fashion: bool = False) -> tuple[Images, IntArray]:
    """Images ``(N, 28, 28)`` in [0, 1] and classes ``(N,)`` of MNIST or Fashion-MNIST; nothing is downloaded.

    Raises:
        FileNotFoundError: the idx files are missing or damaged.
    """
    from torchvision import datasets

    kind = datasets.FashionMNIST if fashion else datasets.MNIST
    folder = Path(root) / kind.__name__ / "raw"
    try:
        data = kind(str(root), train=train, download=False)
        images, labels = data.data.numpy(), data.targets.numpy().astype(np.int64)
    except Exception as error:  # torchvision: RuntimeError, EOFError, struct.error, assertion, by kind of damage
        raise FileNotFoundError(
            f"{kind.__name__} could not be read from {folder}: it needs the four idx files that torchvision makes "
            f"({kind.__name__}(root, download=True) fetches them once). Reason: {error or type(error).__name__}"
        ) from error
    return (images / 255).astype(np.float32), labels


def make_colored_mnist(
    root: str | Path,
    correlation: float = 0.95,
    label_noise: float = 0.0,
    train_size: int = 5000,
    val_size: int = 1000,
    test_size: int = 4000,
    seed: int = 0,
) -> tuple[GroupedTensors, GroupedTensors, GroupedTensors]:
    """Two classes, two colours: ``y = [digit ≥ 5]``, red (0) or green (1) ink, 14×14 pixels (every second one).

    In training the colour equals the class for the share ``correlation`` of each class, in validation and test for half
    of it.  Training and validation come from MNIST's training file, test from its test file.  Group = 2·class + colour.

    Args:
        root: folder that holds ``MNIST/raw``.
        correlation: .5 is no spurious correlation.
        label_noise: share of the labels of all sets that are flipped before the colour is chosen (.25 in Arjovsky et
            al. 2019).
        train_size, val_size, test_size: examples drawn by ``seed``.
        seed: decides the draw, the noise and the colours.
    """
    rng = np.random.default_rng(seed)
    sources = _draw(root, False, [(True, train_size), (True, val_size), (False, test_size)], rng)
    sets = []
    for (images, digits), share in zip(sources, (correlation, 0.5, 0.5), strict=True):
        y = (digits >= 5).astype(np.int64)
        y = np.where(rng.random(len(y)) < label_noise, 1 - y, y)
        color = plant_attribute(y, share, rng)
        sets.append(_tensors(paint(images[:, ::2, ::2], color), y, color))
    return sets[0], sets[1], sets[2]


def make_dominoes(
    root: str | Path,
    correlation: float = 0.95,
    mnist_classes: Sequence[int] = (0, 1),
    fashion_classes: Sequence[int] = (7, 9),
    train_size: int = 5000,
    val_size: int = 1000,
    test_size: int = 1800,
    seed: int = 0,
) -> tuple[GroupedTensors, GroupedTensors, GroupedTensors]:
    """Dominoes (Shah et al. 2020): an MNIST digit (spurious) above a Fashion-MNIST garment (the class), 56×28 pixels.

    Class 0 / 1 is the garment ``fashion_classes[0]`` / ``[1]`` (default sneaker and ankle boot), attribute 0 / 1 the
    digit ``mnist_classes[0]`` / ``[1]``.  In training the digit agrees with the class for the fraction ``correlation``,
    in validation and test for half.  Group = 2·class + attribute.  Images are ``(1, 56, 28)``.

    Args:
        root: folder that holds ``MNIST/raw`` and ``FashionMNIST/raw``.
        correlation: .95 or .99 in the literature; .5 is no spurious correlation.
        mnist_classes: the two digits.
        fashion_classes: the two garments.
        train_size, val_size, test_size: examples drawn by ``seed``, half of each class.
        seed: decides the draw and the pairing.

    Raises:
        ValueError: a pair does not name two different classes, or a file has too few examples of a class.
    """
    for name, pair in (("mnist_classes", mnist_classes), ("fashion_classes", fashion_classes)):
        if len(pair) != 2 or pair[0] == pair[1] or not all(0 <= c <= 9 for c in pair):
            raise ValueError(f"{name} must be two different classes of 0 … 9, got {list(pair)}.")
    rng = np.random.default_rng(seed)
    files = {(fashion, train): load_mnist(root, train, fashion) for fashion in (False, True) for train in (True, False)}
    rest = {
        (fashion, train, index): list(rng.permutation(np.flatnonzero(files[fashion, train][1] == label)))
        for fashion, pair in ((False, mnist_classes), (True, fashion_classes))
        for train in (True, False)
        for index, label in enumerate(pair)
    }
    sets = []
    for train, size, share in ((True, train_size, correlation), (True, val_size, 0.5), (False, test_size, 0.5)):
        y = rng.permutation(np.arange(size) % 2)
        attribute = plant_attribute(y, share, rng)
        halves = []
        for fashion, key in ((False, attribute), (True, y)):
            chosen = np.zeros(size, np.int64)
            for index in (0, 1):
                pool, members = rest[fashion, train, index], np.flatnonzero(key == index)
                if len(pool) < len(members):
                    raise ValueError(
                        f"{len(members)} images of one class are wanted and {len(pool)} are left; lower the sizes."
                    )
                chosen[members] = [pool.pop() for _ in members]
            halves.append(files[fashion, train][0][chosen])
        sets.append(_tensors(np.concatenate(halves, 1)[:, None], y, attribute))
    return sets[0], sets[1], sets[2]


def _draw(
    root: str | Path, fashion: bool, wanted: Sequence[tuple[bool, int]], rng: np.random.Generator
) -> list[tuple[Images, IntArray]]:
    """Disjoint random draws from the training (True) and test (False) files."""
    files = {train: load_mnist(root, train, fashion) for train in (True, False)}
    order = {train: rng.permutation(len(files[train][1])) for train in (True, False)}
    drawn = []
    for train, size in wanted:
        if size > len(order[train]):
            raise ValueError(f"{size} examples are wanted and {len(order[train])} are left; lower the sizes.")
        chosen, order[train] = order[train][:size], order[train][size:]
        drawn.append((files[train][0][chosen], files[train][1][chosen]))
    return drawn


def _tensors(x: Images, y: IntArray, attribute: IntArray) -> GroupedTensors:
    return GroupedTensors(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(2 * y + attribute))


class ColoredMNIST(GroupedDataModule):
    """:func:`make_colored_mnist` as a data module; the other arguments are those of ``GroupedDataModule``."""

    def __init__(
        self,
        root: str,
        correlation: float = 0.95,
        label_noise: float = 0.0,
        train_size: int = 5000,
        val_size: int = 1000,
        test_size: int = 4000,
        held_out: HeldOut = "val",
        held_out_share: float = 0.2,
        sampling: Sampling = "shuffle",
        batch_size: int = 64,
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
        self.root = root
        self.options: dict[str, Any] = {
            "correlation": correlation,
            "label_noise": label_noise,
            "train_size": train_size,
            "val_size": val_size,
            "test_size": test_size,
        }

    def build(self) -> tuple[Any, Any, Any, Any]:
        return (*make_colored_mnist(self.root, seed=self.seed, **self.options), None)


class Dominoes(GroupedDataModule):
    """:func:`make_dominoes` as a data module; the other arguments are those of ``GroupedDataModule``."""

    def __init__(
        self,
        root: str,
        correlation: float = 0.95,
        mnist_classes: Sequence[int] = (0, 1),
        fashion_classes: Sequence[int] = (7, 9),
        train_size: int = 5000,
        val_size: int = 1000,
        test_size: int = 1800,
        held_out: HeldOut = "val",
        held_out_share: float = 0.2,
        sampling: Sampling = "shuffle",
        batch_size: int = 64,
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
        self.root = root
        self.options: dict[str, Any] = {
            "correlation": correlation,
            "mnist_classes": tuple(mnist_classes),
            "fashion_classes": tuple(fashion_classes),
            "train_size": train_size,
            "val_size": val_size,
            "test_size": test_size,
        }

    def build(self) -> tuple[Any, Any, Any, Any]:
        return (*make_dominoes(self.root, seed=self.seed, **self.options), None)

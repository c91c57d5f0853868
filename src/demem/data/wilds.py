"""Any wilds data set (Waterbirds, CelebA, CivilComments, …) from a local folder, without a network call."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from demem.data.arrays import GroupedDataset
from demem.data.datamodule import GroupedDataModule, HeldOut, Sampling

GROUP_BY = {"waterbirds": ("background", "y"), "celebA": ("male", "y"), "civilcomments": ("male", "y")}
"""Metadata fields whose combinations are the groups, where the user names none."""


def load_wilds(name: str, root: str | Path) -> Any:
    """The wilds data set ``name`` in ``root``; nothing is downloaded and nothing is printed.

    Raises:
        ValueError: wilds has no such data set.
        FileNotFoundError: the folder is missing or damaged.
    """
    wilds = _import_wilds()
    known = {known.lower(): known for known in wilds.supported_datasets}
    if name.lower() not in known:
        raise ValueError(f"wilds has no data set {name!r}. It has: {', '.join(sorted(known.values()))}.")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"The data folder {root} does not exist; it should hold the wilds folder of {name}.")
    try:
        with redirect_stdout(StringIO()), _text_as_objects():
            return wilds.get_dataset(known[name.lower()], root_dir=str(root), download=False)
    except Exception as error:  # by kind of damage: FileNotFoundError, pandas' and wilds' own errors
        found = ", ".join(sorted(p.name for p in Path(root).iterdir() if p.is_dir())) or "no folders"
        raise FileNotFoundError(
            f"wilds could not read {name} below {root} (there is: {found}). Its folder is called like "
            f"'waterbirds_v1.0' and holds RELEASE_v1.0.txt, the metadata and all files. Reason: {error}"
        ) from error


@contextmanager
def _text_as_objects() -> Iterator[None]:
    """wilds writes numbers into text columns, which the string type of pandas 3 refuses (CivilComments)."""
    import pandas

    option = "future.infer_string"
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.filterwarnings("ignore", message=f".*{option}")
        with suppress(pandas.errors.OptionError):  # pandas before 2.1 does not have it, and it is to go
            stack.enter_context(pandas.option_context(option, False))
        yield


class WildsDataModule(GroupedDataModule):
    """A wilds data set by its official split; groups are the combinations of metadata fields.

    Args:
        name: ``"waterbirds"``, ``"celebA"``, ``"civilcomments"``, or any other of wilds.
        root: folder that holds e.g. ``waterbirds_v1.0``.
        group_by: metadata fields; default by data set, else ``y`` and the first other field.
        resize: short side after resizing, for image data.
        crop: side of the square that is cropped: centre for evaluation; for training a random resized crop (70–100% of
            the area) and a flip.
        mean, std: of the normalisation, by channel.
        transform: instead of the above for evaluation, e.g. a tokenizer (Python only).
        train_transform: the same for training; default ``transform``.
        held_out, held_out_share, sampling, batch_size, num_workers, seed: see ``GroupedDataModule``.

    Raises:
        FileNotFoundError: on setup, the folder is missing or damaged; the message says what was looked for.
    """

    def __init__(
        self,
        name: str = "waterbirds",
        root: str = "data",
        group_by: Sequence[str] | None = None,
        resize: int = 256,
        crop: int = 224,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        transform: Callable[[Any], Any] | None = None,
        train_transform: Callable[[Any], Any] | None = None,
        held_out: HeldOut = "val",
        held_out_share: float = 0.2,
        sampling: Sampling = "shuffle",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            held_out=held_out,
            held_out_share=held_out_share,
            sampling=sampling,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.dataset_name = name
        self.root = root
        self.group_by = None if group_by is None else tuple(group_by)
        self.resize, self.crop = resize, crop
        self.mean, self.std = tuple(mean), tuple(std)
        self.transform, self.train_transform = transform, train_transform

    def build(self) -> tuple[Any, Any, Any, Any]:
        dataset = load_wilds(self.dataset_name, self.root)
        grouper = make_grouper(dataset, self.group_by)
        self.grouper = grouper
        self._num_groups = int(grouper.n_groups)
        self._num_classes = int(dataset.n_classes) if dataset.n_classes else None
        plain = self.transform or image_transform(self.resize, self.crop, self.mean, self.std)
        train = self.train_transform or self.transform
        train = train or image_transform(self.resize, self.crop, self.mean, self.std, augment=True)
        wanted = (("train", train), ("val", plain), ("test", plain), ("train", plain))
        splits = [_split(dataset, grouper, split, t) for split, t in wanted]
        first = splits[3]
        assert first is not None  # every wilds data set has a training split
        try:
            first[0]
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"The first training example of {self.dataset_name} below {self.root} cannot be read: "
                f"the folder is damaged or incomplete. Reason: {error}"
            ) from error
        return splits[0], splits[1], splits[2], splits[3]


def make_grouper(dataset: Any, group_by: Sequence[str] | None = None) -> Any:
    """wilds' ``CombinatorialGrouper`` over metadata fields; the field that comes last in the data set leads.

    Raises:
        ValueError: a field does not exist.
    """
    from wilds.common.grouper import CombinatorialGrouper

    fields = list(dataset.metadata_fields)
    if group_by is None:
        name = str(dataset.dataset_name)
        group_by = GROUP_BY.get(name) or [f for f in fields if f != "y"][:1] + ["y"] * ("y" in fields)
    missing = [field for field in group_by if field not in fields]
    if missing:
        raise ValueError(f"{dataset.dataset_name} has no metadata field {missing}. It has: {', '.join(fields)}.")
    return CombinatorialGrouper(dataset, list(group_by))


def image_transform(
    resize: int, crop: int, mean: Sequence[float], std: Sequence[float], augment: bool = False
) -> Callable[[Any], Any]:
    """Centre view for evaluation, or random resized crop (.7–1 of the area) and flip for training; normalised."""
    from torchvision import transforms as T

    view = (
        [T.RandomResizedCrop(crop, scale=(0.7, 1.0)), T.RandomHorizontalFlip()]
        if augment
        else [T.Resize(resize), T.CenterCrop(crop)]
    )
    transform: Callable[[Any], Any] = T.Compose([*view, T.ToTensor(), T.Normalize(mean, std)])
    return transform


class _WildsInputs:
    """What :class:`GroupedDataset` reads: ``(x,)`` of one wilds subset, transformed."""

    def __init__(self, dataset: Any, positions: Any, transform: Callable[[Any], Any]) -> None:
        self.dataset, self.positions, self.transform = dataset, positions, transform

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any]:
        return (self.transform(self.dataset.get_input(int(self.positions[index]))),)


def _split(dataset: Any, grouper: Any, split: str, transform: Callable[[Any], Any]) -> GroupedDataset | None:
    if split not in dataset.split_dict:
        return None
    positions = np.flatnonzero(dataset.split_array == dataset.split_dict[split])
    groups = grouper.metadata_to_group(dataset.metadata_array[positions])
    y = torch.as_tensor(dataset.y_array)[positions]
    return GroupedDataset(_WildsInputs(dataset, positions, transform), y, groups)


def _import_wilds() -> Any:
    # Importing wilds starts a thread that asks PyPI for a newer version unless this package is out of reach.
    warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning, "wilds")
    if "wilds" not in sys.modules:
        real = sys.modules.get("outdated")
        sys.modules["outdated"] = types.ModuleType("outdated")
        try:
            import wilds
        finally:
            if real is None:
                del sys.modules["outdated"]
            else:
                sys.modules["outdated"] = real
    import wilds

    return wilds

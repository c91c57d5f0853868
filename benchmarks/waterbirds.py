"""Waterbirds on two cores: MobileNetV2 whose first layers are frozen, their outputs kept on disk.

conv_stem … blocks.4 of a pretrained MobileNetV2 (160 px crops) give 96×10×10 numbers an image; they are computed
once, for the plain view of every image and three augmented views of each training image.  Training then covers
blocks.5, blocks.6, conv_head and the classifier, with batch-norm statistics frozen: seconds an epoch instead of
minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from demem.data import GroupedDataModule, GroupedTensors
from demem.data.wilds import image_transform, load_wilds, make_grouper

RESIZE, CROP, AUGMENTED_VIEWS, CHANNELS, SIDE = 180, 160, 3, 96, 10
Progress = Callable[[str, int, int], None]


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/demem``, or ``~/.cache/demem``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "demem"


def pretrained(weights: str | Path) -> nn.Module:
    """timm's MobileNetV2 with the weights of a local safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    import timm

    if not Path(weights).is_file():
        raise FileNotFoundError(
            f"There are no weights at {weights}. Pass --weights with a MobileNetV2 safetensors file."
        )
    model: nn.Module = timm.create_model(
        "mobilenetv2_100",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(weights)},
        pad_type="same",
        num_classes=2,
    )
    return model


class Tail(nn.Module):
    """The trained part: ``blocks`` (5 and 6), ``conv_head``, ``bn2``, pooling and a new ``classifier``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.blocks: nn.Module = model.blocks[5:]
        self.conv_head: nn.Module = model.conv_head
        self.bn2: nn.Module = model.bn2
        self.global_pool: nn.Module = model.global_pool
        # timm's initialisation of its own classifier starts at a loss of 4.6 and diverges at lr 3e-3.
        self.classifier = nn.Linear(1280, 2)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x.contiguous(memory_format=torch.channels_last))
        logits: Tensor = self.classifier(self.global_pool(self.bn2(self.conv_head(x))))
        return logits


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
        def split(name: str, views: list[str]) -> GroupedTensors:
            labels = np.load(self.folder / f"{name}_labels.npy")
            # Copy-on-write: pages are read from disk as they are needed and shared between processes.
            arrays = [torch.from_numpy(np.load(self.folder / f"{v}.npy", mmap_mode="c")) for v in views]
            return GroupedTensors(arrays, torch.from_numpy(labels[0]), torch.from_numpy(labels[1]))

        augmented = [f"train_augmented{v}" for v in range(AUGMENTED_VIEWS)]
        return (
            split("train", ["train_plain", *augmented]),
            split("val", ["val_plain"]),
            split("test", ["test_plain"]),
            split("train", ["train_plain"]),
        )


def cache_features(
    root: str | Path, weights: str | Path, cache: str | Path | None = None, progress: Progress | None = None
) -> Path:
    """Compute the outputs of the frozen layers, or find them on disk.

    The folder's name is a hash of the metadata file, the weights, the sizes and the views.  Each file is written under
    another name and renamed when it is complete, and a list of what was made closes the folder: a run that is cut off
    goes on with the next file, and its folder is not taken for a finished one.

    Args:
        root: holds ``waterbirds_v1.0``.
        weights: MobileNetV2 safetensors file.
        cache: parent folder (0.7 GB); default :func:`default_cache`.
        progress: called with (file, images done, images in all).

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
    model = pretrained(weights).eval()
    made_from = {
        "metadata": hashlib.sha256(metadata.read_bytes()).hexdigest(),
        "weights": hashlib.sha256(Path(weights).read_bytes()).hexdigest(),
        "sizes": [RESIZE, CROP],
        "views": AUGMENTED_VIEWS,
        "version": 1,
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache or default_cache()) / f"waterbirds-{key}"
    if (folder / "complete.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)

    dataset = load_wilds("waterbirds", root)
    grouper = make_grouper(dataset)
    half = (0.5, 0.5, 0.5)
    plain = image_transform(RESIZE, CROP, half, half)
    augmented = image_transform(RESIZE, CROP, half, half, augment=True)
    for split in ("train", "val", "test"):
        positions = np.flatnonzero(dataset.split_array == dataset.split_dict[split])
        group = grouper.metadata_to_group(dataset.metadata_array[positions])
        labels = np.stack([torch.as_tensor(dataset.y_array)[positions].numpy(), group.numpy()]).astype(np.int64)
        _write(folder / f"{split}_labels.npy", labels)
        views = [("plain", plain)] + [(f"augmented{v}", augmented) for v in range(AUGMENTED_VIEWS) if split == "train"]
        for seed, (view, transform) in enumerate(views):
            _cache_view(folder / f"{split}_{view}.npy", model, dataset, positions, transform, seed, progress)
    _write(folder / "complete.json", made_from)
    return folder


def _cache_view(
    path: Path, model: nn.Module, dataset: Any, positions: Any, transform: Any, seed: int, progress: Progress | None
) -> None:
    if path.is_file():
        return
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    rows = open_memmap(partial, mode="w+", dtype=np.float16, shape=(len(positions), CHANNELS, SIDE, SIDE))
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(seed)
        for start in range(0, len(positions), 64):
            chosen = positions[start : start + 64]
            try:
                x = torch.stack([transform(dataset.get_input(int(i))) for i in chosen])
            except OSError as error:
                partial.unlink()
                raise FileNotFoundError(f"A Waterbirds image is missing or damaged: {error}") from error
            x = model.bn1(model.conv_stem(x.contiguous(memory_format=torch.channels_last)))
            for block in model.blocks[:5]:
                x = block(x)
            rows[start : start + len(chosen)] = x.numpy().astype(np.float16)
            if progress is not None:
                progress(path.stem, start + len(chosen), len(positions))
    rows.flush()
    del rows
    os.replace(partial, path)


def _write(path: Path, content: Any) -> None:
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    if isinstance(content, np.ndarray):
        with partial.open("wb") as file:
            np.save(file, content)
    else:
        partial.write_text(json.dumps(content))
    os.replace(partial, path)

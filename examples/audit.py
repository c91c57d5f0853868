"""Ask what is in the data before anything is trained: a shortcut, wrong labels or merely hard examples."""

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader

from demem.data import make_spurious_digits
from demem.groups import Detection, detect


def inked(correlation: float) -> tuple[Tensor, Tensor]:
    """Digits below and above five; the colour of the ink goes with the class for a share of them."""
    data = make_spurious_digits(correlation, seed=0)[0]
    return data.rows(torch.arange(len(data)))[:2]


def mislabelled(share: float) -> tuple[Tensor, Tensor]:
    """Zeros and sevens, which nobody mistakes for each other; a share of them has the label of the other."""
    digits = load_digits()
    kept = torch.from_numpy((digits.target == 0) | (digits.target == 7))
    x, y = torch.from_numpy(digits.images / 16)[kept].float(), torch.from_numpy(digits.target)[kept] == 7
    wrong = torch.rand(len(y), generator=torch.Generator().manual_seed(0)) < share
    return x[:, None].repeat(1, 3, 1, 1), (y ^ wrong).long()


def audit(x: Tensor, y: Tensor) -> Detection:
    torch.manual_seed(0)
    # Pretrained weights (pretrained=True) see more; fresh ones do where the shortcut is as plain as the colour of ink.
    model = timm.create_model("resnet10t", num_classes=2)
    return detect(model, DataLoader(list(zip(x, y, strict=True)), batch_size=128, shuffle=True))


def main() -> list[Detection]:
    asked = {
        "red and green ink": inked(0.95),
        "any ink": inked(0.5),
        "one label in ten wrong": mislabelled(0.1),
    }
    found = [audit(*rows) for rows in asked.values()]
    for name, detection in zip(asked, found, strict=True):
        print(f"{name}: {detection}")
    print("the first examples against the shortcut:", found[0].minority.nonzero()[:5, 0].tolist())
    suspects = (found[2].verdict.wrong_label > 0.5).nonzero()[:5, 0].tolist()
    print("the first labels that look wrong, in the order in which they were read:", suspects)
    return found


if __name__ == "__main__":
    main()

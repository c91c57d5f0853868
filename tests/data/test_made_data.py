import numpy as np
import pytest
import torch

from demem.data import ColoredMNIST, Dominoes, SpuriousDigits, make_spurious_digits
from demem.data.mnist import load_mnist
from demem.data.planting import plant_attribute


def test_planted_share_is_exact_in_each_class():
    y = np.array([0] * 100 + [1] * 40)
    attribute = plant_attribute(y, 0.95, np.random.default_rng(0))
    assert (attribute[y == 0] == 0).sum() == 95
    assert (attribute[y == 1] == 1).sum() == 38
    with pytest.raises(ValueError, match="between 0 and 1"):
        plant_attribute(y, 95, np.random.default_rng(0))


def test_digits_have_the_groups_they_promise():
    data = SpuriousDigits(correlation=0.95)
    assert data.num_groups == 4
    counts = data.train_group_counts
    for y in (0, 1):
        own = counts[2 * y + y] / counts[2 * y : 2 * y + 2].sum()
        assert float(own) == pytest.approx(0.95, abs=0.005)
    for split in (data.val_dataset, data.test_dataset):
        sizes = torch.bincount(split.group)
        assert int((sizes[0] - sizes[1]).abs()) <= 1
        assert int((sizes[2] - sizes[3]).abs()) <= 1
    x, y, group = next(iter(data.train_dataloader()))
    assert x.shape[1:] == (3, 8, 8)
    assert 0 <= float(x.min()) < float(x.max()) == 1
    ink = x.sum((2, 3)).argmax(1)
    assert torch.equal(group, 2 * y + ink)


def test_digits_do_not_leak_between_splits():
    gray = [split.views[0].sum(1).flatten(1) for split in make_spurious_digits()]
    assert sum(map(len, gray)) == 1797
    rows = [tuple(row.tolist()) for split in gray for row in split]
    assert len(set(rows)) == len(rows)


def test_digits_follow_the_seed():
    one, again, other = (make_spurious_digits(seed=s)[0] for s in (3, 3, 4))
    assert torch.equal(one.views[0], again.views[0])
    assert torch.equal(one.group, again.group)
    assert not torch.equal(one.views[0], other.views[0])


def test_no_spurious_correlation_means_balanced_groups():
    counts = SpuriousDigits(correlation=0.5).train_group_counts
    assert int((counts[0] - counts[1]).abs()) <= 1


def test_colored_mnist_from_a_folder(data_root):
    data = ColoredMNIST(str(data_root), train_size=400, val_size=100, test_size=100)
    assert data.train_group_counts.sum() == 400
    x, y, group = next(iter(data.train_dataloader()))
    assert x.shape[1:] == (3, 14, 14)
    assert torch.equal(group, 2 * y + x.sum((2, 3)).argmax(1))


def test_label_noise_is_in_the_label_that_colour_follows(data_root):
    clean = ColoredMNIST(str(data_root), train_size=2000, correlation=1.0)
    noisy = ColoredMNIST(str(data_root), train_size=2000, correlation=1.0, label_noise=0.25)
    assert clean.num_groups == 4
    assert noisy.train_group_counts[1] == noisy.train_group_counts[2] == 0
    same = (clean.train_dataset.y == noisy.train_dataset.y).float().mean()
    assert float(same) == pytest.approx(0.75, abs=0.04)


def test_dominoes_from_a_folder(data_root):
    data = Dominoes(str(data_root), 0.99, mnist_classes=(3, 8), train_size=400, val_size=100, test_size=100)
    assert data.train_group_counts.tolist() == [198, 2, 2, 198]
    assert torch.bincount(data.test_dataset.group).tolist() == [25, 25, 25, 25]
    images, digits = load_mnist(data_root, train=False)
    x, _, group = data.test_dataset.rows(torch.arange(100))
    assert x.shape == (100, 1, 56, 28)
    by_image = {images[i].tobytes(): int(digits[i]) for i in np.flatnonzero(np.isin(digits, (3, 8)))}
    found = [by_image[top.numpy().tobytes()] for top in x[:, 0, :28]]
    assert [int(f == 8) for f in found] == (group % 2).tolist()


def test_dominoes_need_two_classes():
    with pytest.raises(ValueError, match="fashion_classes must be two different classes"):
        Dominoes("nowhere", fashion_classes=(1, 1)).setup()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_or_damaged_folder_is_named(tmp_path, damage):
    pytest.importorskip("torchvision")
    if damage == "cut":
        (tmp_path / "MNIST" / "raw").mkdir(parents=True)
        for part in ("train", "t10k"):
            for kind in ("images-idx3", "labels-idx1"):
                (tmp_path / "MNIST" / "raw" / f"{part}-{kind}-ubyte").write_bytes(b"\0\0\x08\x03\0\0")
    with pytest.raises(FileNotFoundError, match=r"MNIST could not be read from .*raw"):
        ColoredMNIST(str(tmp_path)).setup()

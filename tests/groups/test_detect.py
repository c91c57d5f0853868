import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from demem.data import make_spurious_digits
from demem.groups import detect


def _digits(correlation, seed=0):
    train, _, _ = make_spurious_digits(correlation, seed)
    return train.rows(torch.arange(len(train)))


def _cnn(classes=2):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, classes),
    )  # fmt: skip


def _loader(x, y, batch_size=64):
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(x, y), batch_size, shuffle=True, generator=generator)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_shortcut_is_found_with_its_minority(seed):
    x, y, group = _digits(0.95, seed)
    found = detect(_cnn(), [(x, y)])
    assert found.groups.shortcut
    truth = (group == 1) | (group == 2)
    assert float(found.minority[truth].float().mean()) > 0.9
    assert float(truth[found.minority].float().mean()) > 0.9
    assert "a shortcut" in repr(found)
    assert f"{int(found.minority.sum())} of them" in repr(found)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_unrelated_attributes_do_not_fire(seed, noise):
    """Ink that goes with nothing, an ambiguous class, wrong labels: no shortcut."""
    x, y, _ = _digits(0.5, seed)
    flipped = torch.rand(len(y), generator=torch.Generator().manual_seed(seed)) < noise
    found = detect(_cnn(), _loader(x, torch.where(flipped, 1 - y, y)))
    assert not found.groups.shortcut
    assert not found.minority.any()
    assert "no shortcut" in repr(found)


def test_wrong_labels_are_told_from_a_minority():
    g = torch.Generator().manual_seed(1)
    y = torch.arange(1500) % 2
    x = torch.randn(1500, 6, generator=g)
    x[:, 0] += 6 * y
    flipped = torch.rand(1500, generator=g) < 0.08
    found = detect(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)), [(x, torch.where(flipped, 1 - y, y))])
    assert found.groups.kind == "label noise"
    assert float(found.verdict.wrong_label[flipped].mean()) > 0.8
    assert float(found.verdict.wrong_label[~flipped].mean()) < 0.05


def test_wrong_labels_beside_a_shortcut_are_no_minority():
    x, y, group = _digits(0.95)
    flipped = torch.rand(len(y), generator=torch.Generator().manual_seed(0)) < 0.05
    found = detect(_cnn(), [(x, torch.where(flipped, 1 - y, y))])
    minority = (group % 2 != group // 2) & ~flipped
    assert found.groups.shortcut
    assert float(minority[found.minority].float().mean()) > 0.7
    assert float(found.minority[minority].float().mean()) > 0.7


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_timm_models(name):
    x, y, _ = _digits(0.95)
    size = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8} if "vit" in name else {}
    model = timm.create_model(name, num_classes=2, **size).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = nn.functional.interpolate(x, 32)
    found = detect(model, _loader(images, y))
    assert found.groups.shortcut
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class _Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask):
        return self.head((self.embedding(input_ids) * attention_mask[..., None]).sum(1))


def test_mappings_and_single_layers():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(800) % 2
    word = torch.where(torch.rand(800, generator=g) < 0.05, 1 - y, y)
    ids = torch.randint(10, 50, (800, 12), generator=g)
    ids[:, 3:8] = 4 + y[:, None]  # five words of the class
    ids[:, 0] = 1 + word
    mask = torch.ones_like(ids)
    batches = [
        {"input_ids": ids[i : i + 100], "attention_mask": mask[i : i + 100], "labels": y[i : i + 100]}
        for i in range(0, 800, 100)
    ]
    found = detect(_Tokens(), batches, layers="embedding", max_examples=500)
    assert len(found.groups.y) == 500
    assert found.groups.site == "embedding"


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no examples"),
        ([(torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.long))], "two examples of each class"),
        ([(torch.randn(8, 3, 8, 8), torch.arange(8))], "0 … 1"),
        ([(torch.full((8, 3, 8, 8), torch.nan), torch.arange(8) % 2)], "NaN"),
    ],
)
def test_bad_input(batches, message):
    with pytest.raises(ValueError, match=message):
        detect(_cnn(), batches)

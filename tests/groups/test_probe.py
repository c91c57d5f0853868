import pytest
import torch

from demem.groups import find_shortcut, probe_shortcut
from demem.groups.probe import _sure


def _layers(n=2000, share=0.95, seed=0):
    """An early layer that shows the attribute, a middle one that shows both, a late one that shows the class best."""
    generator = torch.Generator().manual_seed(seed)
    noise = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    y = torch.randint(0, 2, (n,), generator=generator)
    attribute = torch.where(torch.rand(n, generator=generator) < share, y, 1 - y)
    a, c = 2.0 * attribute[:, None] - 1, 2.0 * y[:, None] - 1
    early = torch.cat([2 * a + 0.5 * noise(n, 4), noise(n, 8)], 1)
    late = torch.cat([1.5 * a + noise(n, 4), 1.5 * c + noise(n, 4)], 1)
    return {"pixels": noise(n, 6), "early": early, "late": late}, y, attribute


def test_finds_the_planted_attribute_without_being_told():
    features, y, attribute = _layers()
    probe = find_shortcut(features, y, 2)
    assert probe.site == "early"  # not the pixels, which tell nothing, nor the late layer, which knows the class
    assert float((probe.attribute == attribute).float().mean()) > 0.99
    assert torch.equal(probe.groups(y), 2 * y + probe.attribute)
    minority = attribute != y
    assert float((probe.attribute != y)[minority].float().mean()) > 0.95
    # An example outside is judged by the probe that was fitted on all.
    others, _, truth = _layers(seed=1)
    assert torch.equal(probe.groups(truth, others["early"]), 2 * truth + probe.head(others["early"]).argmax(1))
    assert float((probe.head(others["early"]).argmax(1) == truth).float().mean()) > 0.99
    assert probe.found
    assert 0.8 < probe.sure <= 1  # as sure of the minority as of the others


def test_late_layer_hides_the_minority():
    features, y, attribute = _layers()
    late = probe_shortcut(features["late"], y, 2)
    minority = attribute != y
    assert float((late.attribute != y)[minority].float().mean()) < 0.5


def test_hard_examples_are_no_shortcut():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(6000) % 3
    x = 2.0 * torch.nn.functional.one_hot(y, 3) + 0.55 * torch.randn(6000, 3, generator=generator)
    probe = probe_shortcut(x, y, 3)
    assert 0.002 < probe.error < 0.02
    assert not probe.found
    assert torch.equal(probe.groups(y), 4 * y)
    assert torch.equal(probe.groups(y[:9], x[:9]), 4 * y[:9])
    assert probe_shortcut(x, y, 3, min_sure=0).found


def test_sure_mistakes_by_hand():
    y = torch.tensor([0] * 40 + [1] * 22)
    logits = torch.zeros(62, 2)
    logits[:40, 0] = torch.arange(1.0, 41.0)  # right; the 5% quantile of the margins is 2.95
    logits[40:60, 0] = 5.0  # class 1 called 0, margin 5 ...
    logits[60:, 1] = torch.tensor([10.0, 10.0])  # ... below 10, that of the two that are right
    assert _sure(logits, y) == 0
    logits[40:45, 0] = 11.0
    assert _sure(logits, y) == pytest.approx(5 / 20)
    assert _sure(logits[:40], y[:40]) == 1


def test_is_class_balanced_and_multiclass():
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([torch.zeros(900), torch.ones(60), torch.full((40,), 2.0)]).long()
    x = torch.nn.functional.one_hot(y, 3) + 0.1 * torch.randn(1000, 3, generator=generator)
    probe = probe_shortcut(x, y, 3)
    assert probe.error < 0.01
    assert int(probe.groups(y).max()) == 8


def test_refuses_nothing_to_probe():
    with pytest.raises(ValueError, match="at least one layer"):
        find_shortcut({}, torch.tensor([0, 1]), 2)


def test_every_class_counts_the_same_in_the_probe():
    """Of 20 : 1 overlapping classes a probe without class weights gives up the small one."""
    generator = torch.Generator().manual_seed(0)
    y = (torch.arange(2100) % 21 == 0).long()
    x = torch.randn(2100, 3, generator=generator) + 1.5 * y[:, None]
    probe = probe_shortcut(x, y, 2)
    assert probe.error < 0.2
    wrong = probe.attribute != y
    assert float(wrong[y == 1].float().mean()) < 0.2

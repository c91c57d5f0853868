from dataclasses import replace

import pytest
import torch

from demem.removal import Examples, best_round, remove_in_rounds, worst_group


def _examples(n, share, seed, width=40):
    """Half of the units show the class with noise, half a spurious attribute with less."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (n,), generator=generator)
    a = torch.where(torch.rand(n, generator=generator) < share, y, 1 - y)
    signal = torch.cat([(2.0 * y[:, None] - 1).expand(n, width // 2), (2.0 * a[:, None] - 1).expand(n, width // 2)], 1)
    noise = torch.randn(n, width, generator=generator) * torch.tensor([3.0, 1.0]).repeat_interleave(width // 2)
    return Examples(signal + noise, y, torch.zeros_like(y)), 2 * y + a


def test_masks_the_spurious_units_and_lifts_the_worst_group():
    train, _ = _examples(2000, 0.98, 0)
    held_out, group = _examples(60, 0.5, 1)  # few: a head that reads all units fits their noise
    test, test_group = _examples(4000, 0.5, 2)
    held_out = held_out._replace(group=group)
    rounds = remove_in_rounds(train, held_out, num_classes=2, shares=(0.25, 0.5, 0.9))
    before, _ = worst_group(rounds[0].head(test.features), test.y, test_group)
    half = rounds[2]
    assert int((half.gate[20:] == 0).sum()) >= 19  # the 20 spurious ones, or all but one
    after, _ = worst_group(half.head(test.features), test.y, test_group)
    assert after > before + 0.03
    for r, share in zip(rounds, (0, 0.25, 0.5, 0.9), strict=True):
        assert int((r.gate == 0).sum()) == round(share * 40)
        assert (r.head.weight[:, r.gate == 0] == 0).all()
    assert (rounds[1].gate >= rounds[2].gate).all()  # masks only grow


def test_held_out_accuracy_is_judged_without_the_example():
    """Labels that nothing tells cannot be predicted."""
    train, _ = _examples(100, 0.5, 0, width=200)
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, 2, (120,), generator=generator)
    held_out = Examples(torch.randn(120, 200, generator=generator), y, torch.zeros_like(y))
    rounds = remove_in_rounds(train, held_out, num_classes=2, shares=(), l2=1e-6)
    assert rounds[0].worst < 0.7


def test_best_round_masks_least_within_one_standard_error():
    train, _ = _examples(200, 0.9, 0)
    rounds = remove_in_rounds(train, train, num_classes=2, shares=(0.2, 0.4))
    same = [replace(r, worst=w, standard_error=0.1) for r, w in zip(rounds, (0.5, 0.65, 0.7), strict=True)]
    assert best_round(same) == 1
    assert best_round(same, tolerance=0) == 2
    surer = [replace(r, standard_error=0.01) for r in same]
    assert best_round(surer) == 2


def test_worst_group_leaves_out_groups_too_small_to_judge():
    logits = torch.tensor([[1.0, 0.0]]).repeat(22, 1)
    y = torch.tensor([0] * 20 + [1, 1])
    group = torch.tensor([0] * 10 + [1] * 10 + [2, 2])
    assert worst_group(logits, y, group)[0] == 1.0
    assert worst_group(logits[20:], y[20:], group[20:])[0] == 0.0


def test_bad_input_is_refused():
    train, _ = _examples(100, 0.9, 0)
    one_class = Examples(train.features[train.y == 0], train.y[train.y == 0], train.group[train.y == 0])
    with pytest.raises(ValueError, match=r"none of class \[1\]"):
        remove_in_rounds(train, one_class, num_classes=2)
    with pytest.raises(ValueError, match="must grow"):
        remove_in_rounds(train, train, num_classes=2, shares=(0.5, 0.2))
    broken = train._replace(features=train.features * torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        remove_in_rounds(broken, train, num_classes=2)

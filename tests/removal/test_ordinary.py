import pytest
import torch

import demem.removal.ordinary as ordinary_module
from demem.linear import LinearHead
from demem.removal import Examples, as_trained, gives_back, ordinary_refit


def _examples(size=400):
    """Class 1 is a quarter; a fifth of each class, the first ones, is atypical."""
    y = (torch.arange(size) % 4 == 0).long()
    x = 2.0 * y[:, None] + torch.randn(size, 1, generator=torch.Generator().manual_seed(0))
    return Examples(x, y, 2 * y + torch.where(torch.arange(size) < size // 5, 1 - y, y))


TYPICAL = torch.tensor([0, 3])
MOVED = LinearHead(torch.tensor([[0.0], [1.0]]), torch.zeros(2))  # as training that counts the classes alike leaves it


def test_the_round_is_that_of_a_head_which_counts_examples_alike():
    examples = _examples()
    trained = as_trained(examples, MOVED)
    ordinary = ordinary_refit(examples, trained, 2)
    assert ordinary is not None
    assert ordinary.ordinary
    assert not trained.ordinary
    assert (ordinary.share, ordinary.weight) == (0.0, 1.0)
    assert int(ordinary.right.sum()) > int(trained.right.sum()) + 50
    whole = (ordinary.head(examples.features).argmax(1) == examples.y).float().mean()
    assert abs(float(whole) - float(ordinary.right.float().mean())) < 0.02  # one feature: cross-fitting costs little
    record = ordinary.record(examples.group, chosen=True, refitted=True, why="so")
    assert record.ordinary
    assert record.why == "so"
    assert record.worst == pytest.approx(
        min(float(ordinary.right[examples.group == k].float().mean()) for k in range(4))
    )
    assert "all examples alike" in repr(record)


def test_it_gives_back_what_balancing_cost():
    examples = _examples()
    trained = as_trained(examples, MOVED)
    ordinary = ordinary_refit(examples, trained, 2)
    assert gives_back(ordinary, trained, examples, TYPICAL)
    assert not gives_back(trained, ordinary, examples, TYPICAL)  # fewer are right
    assert gives_back(trained, trained, examples, TYPICAL)  # as many


def test_a_network_that_a_shortcut_misleads_keeps_its_head():
    examples = _examples()
    trained = as_trained(examples, MOVED)
    wrong = trained.right & ~examples.atypical(TYPICAL)
    misled = as_trained(examples, MOVED)
    object.__setattr__(misled, "right", wrong)
    ordinary = ordinary_refit(examples, trained, 2)
    assert int(ordinary.right.sum()) > int(wrong.sum())
    assert not gives_back(ordinary, misled, examples, TYPICAL)


def test_without_atypical_examples_accuracy_decides():
    examples = _examples()._replace(group=3 * _examples().y)
    trained = as_trained(examples, MOVED)
    assert gives_back(ordinary_refit(examples, trained, 2), trained, examples, TYPICAL)


def test_fits_of_more_than_minutes_are_left_out(monkeypatch):
    examples = _examples()
    trained = as_trained(examples, MOVED)
    monkeypatch.setattr(ordinary_module, "WORK", 6 * 400 * 42)
    assert ordinary_refit(examples, trained, 2) is not None
    monkeypatch.setattr(ordinary_module, "WORK", 6 * 400 * 42 - 1)
    assert ordinary_refit(examples, trained, 2) is None

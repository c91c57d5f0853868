"""Every rule of the restart's table keeps a value narrow and gives what the operation gives."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from demem.batch import Batch
from demem.sites import find_sites
from demem.tracing import ablation_impact, narrow
from demem.tracing.restart import Restart

LAYERS = {
    nn.BatchNorm1d: lambda: nn.BatchNorm1d(4),
    nn.BatchNorm2d: lambda: nn.BatchNorm2d(4),
    nn.BatchNorm3d: lambda: nn.BatchNorm3d(4),
    nn.MaxPool2d: lambda: nn.MaxPool2d(2),
    nn.AvgPool2d: lambda: nn.AvgPool2d(2),
    nn.AdaptiveAvgPool2d: lambda: nn.AdaptiveAvgPool2d(2),
    nn.AdaptiveMaxPool2d: lambda: nn.AdaptiveMaxPool2d(2),
    nn.Conv2d: lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    nn.Linear: lambda: nn.Linear(4, 4),
    nn.Flatten: nn.Flatten,
}
VALUES = {nn.BatchNorm1d: (5, 4), nn.BatchNorm3d: (5, 4, 2, 2, 2), nn.Linear: (5, 4), nn.Flatten: (5, 4, 1, 1)}
METHODS = {"flatten": lambda x: x.flatten(1), "mean": lambda x: x.mean((2, 3))}
FUNCTIONS = {torch.flatten: lambda x: torch.flatten(x, 1)}


class Around(nn.Module):
    """A site before the operation, and a head behind it."""

    def __init__(self, operation, shape):
        super().__init__()
        self.site = nn.Identity()
        self.operation = operation
        with torch.no_grad():
            self.head = nn.Linear(operation(torch.randn(shape)).flatten(1).shape[1], 3)

    def forward(self, x):
        return self.head(self.operation(self.site(x)).flatten(1))


def _cases():
    for kind in narrow.MODULES:
        yield pytest.param(LAYERS.get(kind, kind)(), VALUES.get(kind, (5, 4, 6, 6)), kind, id=kind.__name__)
    for function in narrow.FUNCTIONS:
        shape = (5, 4, 1, 1) if function is torch.flatten else (5, 4, 6, 6)
        yield pytest.param(FUNCTIONS.get(function, function), shape, function, id=function.__name__)
    for name in narrow.METHODS:
        shape = (5, 4, 1, 1) if name == "flatten" else (5, 4, 6, 6)
        yield pytest.param(METHODS.get(name, lambda x, n=name: getattr(x, n)()), shape, name, id=f"x.{name}")


def _noted(rule, results):
    def noted(step):
        results.append(rule(step))
        return results[-1]

    return noted


@pytest.mark.parametrize(("operation", "shape", "key"), list(_cases()))
def test_a_rule_gives_what_the_operation_gives(operation, shape, key, monkeypatch):
    results = []
    for table in (narrow.MODULES, narrow.FUNCTIONS, narrow.METHODS):
        if key in table:
            monkeypatch.setitem(table, key, _noted(table[key], results))
    model, x = Around(operation, shape), torch.randn(shape)
    if isinstance(operation, nn.Module):
        with torch.no_grad():
            model(torch.randn(shape) + 1)  # statistics other than 0 and 1
    data = [Batch(x, torch.arange(5) % 3)]
    (site,) = find_sites(model, "site")
    fast = ablation_impact(model, [site], data)["site"]
    assert results
    assert all(r is not None for r in results)
    if not isinstance(operation, nn.Linear):
        assert any(isinstance(r, narrow.Narrow) for r in results)
    torch.testing.assert_close(fast, ablation_impact(model, [site], data, fast=False)["site"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.GroupNorm(2, 4),
        nn.Flatten(2),
        nn.Softmax(1),
    ],
    ids=["circular", "padding by name", "two groups", "group norm", "flatten maps", "softmax"],
)
def test_what_no_rule_covers_is_run_whole(layer):
    model, data = Around(layer, (5, 4, 6, 6)), [Batch(torch.randn(5, 4, 6, 6), torch.arange(5) % 3)]
    (site,) = find_sites(model, "site")
    with torch.no_grad():
        Restart(model.eval(), [site], data[0].x)  # is not refused
    fast, slow = (ablation_impact(model, [site], data, fast=f)["site"] for f in (True, False))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_sums_of_changed_values():
    def both(x):
        return x.relu() + x

    def other_channels(x):
        return x + x.flip(1)

    for operation in (both, other_channels, lambda x: x + F.avg_pool2d(x, 3, 1, 1), lambda x: x + 1, lambda x: x + x):
        model, data = Around(operation, (5, 4, 6, 6)), [Batch(torch.randn(5, 4, 6, 6), torch.arange(5) % 3)]
        (site,) = find_sites(model, "site")
        fast, slow = (ablation_impact(model, [site], data, fast=f)["site"] for f in (True, False))
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)

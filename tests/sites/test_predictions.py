import copy

import pytest
import torch
from torch import nn

from demem.sites import PredictionReader


class Net(nn.Module):
    def __init__(self, outputs=3):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.head = nn.Linear(5, outputs)
        self.squash = nn.Identity()

    def forward(self, x):
        return self.squash(self.head(self.body(x)))


X = torch.randn(6, 4)


def test_what_the_step_returns_comes_first():
    net, reader = Net(), PredictionReader(head="head")
    reader.start(net)
    net(X)
    logits = torch.randn(6, 3, requires_grad=True)
    assert torch.equal(reader.read({"logits": logits}, 6), logits)
    assert not reader.read({"logits": logits}, 6).requires_grad
    assert torch.equal(reader.read({"preds": logits}, 6), logits)
    assert not reader.read({"preds": logits}, 6).requires_grad
    single = reader.read({"logits": logits[:, 0]}, 6)
    assert torch.equal(single, torch.stack([torch.zeros(6), logits[:, 0]], 1))


def test_the_last_output_with_a_row_for_each_example():
    net, reader = Net(), PredictionReader()
    reader.start(net)
    net(X)
    expected = net(X + 1)
    net(X[:2])  # e.g. a few for a figure
    assert torch.equal(reader.read(None, 6), expected)
    assert not reader.read(torch.tensor(0.5), 6).requires_grad


def test_forward_or_head():
    net = Net()
    net.squash.forward = lambda z: z + 1
    for named, shift in ((None, 1), ("head", 0)):
        reader = PredictionReader(named)
        reader.start(net)
        net(X)
        torch.testing.assert_close(reader.read(None, 6), net.head(net.body(X)) + shift)
    reader.start(net)
    net.head(net.body(X))  # a step that does not call self(x)
    torch.testing.assert_close(reader.read(None, 6), net.head(net.body(X)))


@pytest.mark.parametrize(("squash", "head_counts"), [(torch.sigmoid, True), (torch.tanh, False)])
def test_the_sigmoid_of_a_single_logit(squash, head_counts):
    net, reader = Net(outputs=1), PredictionReader()
    net.squash.forward = lambda z: squash(z)[:, 0]
    reader.start(net)
    net(X)
    z = net.head(net.body(X))[:, 0]
    torch.testing.assert_close(reader.read(None, 6)[:, 1], z if head_counts else squash(z))


def test_nothing_is_left_behind():
    net, reader = Net(), PredictionReader()
    reader.start(net)
    assert not reader.ran
    net(X)
    assert reader.ran
    reader.start(net)
    assert not reader.ran
    assert len(net._forward_hooks) == len(net.head._forward_hooks) == 1
    net(X)
    assert len(copy.deepcopy(net)._forward_hooks) == 1  # what was seen has a graph, and is not copied
    reader.stop()
    assert not reader.ran
    assert not any(module._forward_hooks for module in net.modules())
    with pytest.raises(RuntimeError, match="saw no predictions"):
        reader.read(None, 6)


def test_passes_that_are_ignored():
    net, ignored = Net(), []
    reader = PredictionReader(ignore=lambda: bool(ignored))
    reader.start(net)
    ignored.append(1)
    net(X)
    assert not reader.ran


def test_models_without_a_linear_layer_and_heads_that_do_not_exist():
    net = nn.Sequential(nn.Flatten())
    reader = PredictionReader()
    reader.start(net)
    assert torch.equal(reader.read(net(X), 6), X)
    with pytest.raises(ValueError, match="head='fc'"):
        PredictionReader("fc").start(Net())

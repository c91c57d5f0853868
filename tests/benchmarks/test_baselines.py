import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.baselines import METHODS
from benchmarks.baselines.example_tied_dropout import ExampleTiedDropout
from benchmarks.baselines.neuron_tune import wrong_minus_right
from benchmarks.baselines.silent_majority import largest_gradient_channels, nt_xent, smallest_weights
from benchmarks.baselines.training_groups import GroupDROLoss
from benchmarks.experiment import TASKS, Experiment, Settings, Shared, judge
from benchmarks.heads import fit_head, halves, worst_accuracy
from demem.batch import Batch
from demem.linear import balanced_weights
from demem.module import Classifier


def test_every_arm_states_its_tier_and_rule():
    assert len({(m.name, m.tier) for m in METHODS}) == len(METHODS)
    for method in METHODS:
        assert method.tier in ("T0", "T1", "T2", "T3")
        assert method.selection


def test_head_is_the_regularised_optimum():
    torch.manual_seed(0)
    z, y = torch.randn(80, 5) * 3 + 1, torch.randint(3, (80,))
    weights = balanced_weights(y)
    weight, bias = (p.double().requires_grad_() for p in fit_head(z, y, weights, 0.1, 3))
    std = z.std(0).double()
    losses = F.cross_entropy(z.double() @ weight.T + bias, y, reduction="none")
    objective = (losses * weights / weights.sum()).sum() + 0.05 * (weight * std).square().sum()
    gradients = torch.autograd.grad(objective, (weight, bias))
    assert max(float(g.abs().max()) for g in gradients) < 1e-3


def test_halves_and_worst_accuracy():
    key = torch.tensor([0] * 10 + [1] * 4)
    first, second = halves(key, 0)
    assert sorted(torch.cat([first, second]).tolist()) == list(range(14))
    assert key[first].bincount().tolist() == [5, 2]
    assert worst_accuracy(torch.zeros(14), torch.zeros(14), key) == 1.0
    assert worst_accuracy(torch.tensor([0, 1]), torch.zeros(2), torch.tensor([0, 1])) == 0.0


def test_group_dro_moves_weight_to_the_group_with_the_larger_loss():
    loss = GroupDROLoss(3, step=1.0)
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    value = loss(logits, Batch(None, torch.tensor([0, 0]), torch.tensor([0, 1])))
    low, high = (float(F.cross_entropy(logits[i : i + 1], torch.tensor([0]))) for i in (0, 1))
    q = torch.tensor([low, high, 0.0]).exp()
    q = q / q.sum()
    assert torch.allclose(loss.q, q)
    assert float(value) == pytest.approx(float(q[0] * low + q[1] * high), rel=1e-5)
    with pytest.raises(ValueError, match="needs groups"):
        loss(logits, Batch(None, torch.tensor([0, 0])))


def test_nt_xent_against_a_loop():
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    rows = [F.normalize(r, dim=0) for r in [*a, *b]]
    total = 0.0
    for i in range(8):
        partner = (i + 4) % 8
        scores = torch.stack([rows[i] @ rows[j] / 0.5 for j in range(8) if j != i])
        total += float(torch.logsumexp(scores, 0) - rows[i] @ rows[partner] / 0.5)
    assert float(nt_xent(a, b)) == pytest.approx(total / 8, rel=1e-5)


def test_masks_of_the_silent_majority():
    model = nn.Sequential(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 2))
    masks = smallest_weights(model, 0.1)
    zeroed = torch.cat([model.get_parameter(n).detach().abs()[m == 0].flatten() for n, m in masks.items()])
    kept = torch.cat([model.get_parameter(n).detach().abs()[m == 1].flatten() for n, m in masks.items()])
    assert len(zeroed) == 11  # of 110
    assert float(zeroed.max()) <= float(kept.min())

    loss = F.cross_entropy(model(torch.randn(6, 1, 8, 8)), torch.tensor([0, 1] * 3))
    norms = torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0].flatten(1).norm(dim=1)
    masks = largest_gradient_channels(model, loss, 0.2)
    assert set(masks) == {"0.weight"}
    assert (masks["0.weight"].flatten(1) == 0).all(1).nonzero()[:, 0].tolist() == norms.topk(2).indices.sort()[
        0
    ].tolist()


def test_neuron_tune_ranks_the_unit_that_errors_share():
    y = torch.tensor([0] * 6 + [1] * 6)
    predicted = y.clone()
    predicted[[0, 1, 6, 7]] = 1 - predicted[[0, 1, 6, 7]]
    z = torch.rand(12, 3) * 0.1
    z[predicted != y, 1] += 1.0
    assert int(wrong_minus_right(z, y, predicted).argmax()) == 1


def test_the_penalty_of_a_head_is_the_same_at_every_width():
    z, y = torch.randn(200, 40), torch.arange(200) % 2
    z[:, 0] += y
    wide, narrow = fit_head(z, y), fit_head(z[:, :5], y)
    for head, x in ((wide, z), (narrow, z[:, :5])):  # where the gradient of the loss is that of l2/2·‖V‖²
        std, mean = torch.std_mean(x, 0, correction=0)
        error = (head(x).softmax(1) - torch.nn.functional.one_hot(y, 2)) / len(y)
        assert torch.allclose(-error.T @ ((x - mean) / std), 0.1 * head.weight * std, atol=1e-4)


def test_example_tied_dropout_ties_units_to_examples_and_drops_them_at_test_time():
    module = Classifier(nn.Sequential(nn.Identity(), nn.Linear(100, 2, bias=False)))
    nn.init.ones_(module.model[1].weight)
    tied = ExampleTiedDropout(module, examples=5, general=0.2, own=0.1, seed=0)
    x = torch.ones(2, 100)
    with torch.no_grad():
        assert float(module(x)[0, 0]) == pytest.approx(20 * 0.3 / 0.2)
        tied.indices = torch.tensor([3, 4])
        first = module(x)[:, 0]
        assert torch.equal(first, module(x)[:, 0])
    assert torch.equal(first, tied.masks[3:5].sum(1).float())
    assert (tied.masks[:, :20]).all()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.tier}")
def test_every_arm_runs_on_digits(method, monkeypatch):
    from benchmarks.baselines import example_tied_dropout, jtt, training_groups

    monkeypatch.setattr(jtt, "UPWEIGHT", (20,))
    monkeypatch.setattr(jtt, "EPOCHS", (1,))
    monkeypatch.setattr(example_tied_dropout, "OWN", (0.1,))
    monkeypatch.setattr(training_groups, "WEIGHT_DECAY", (1e-4,))
    experiment = Experiment(TASKS["digits"], Settings(), seed=0, held_out="val", epochs=2, shared=_SHARED)
    outcome = method.run(experiment)
    row = judge(outcome, experiment.data())
    assert 0 <= row["worst_group_acc"] <= row["avg_acc"] <= 1
    # Two epochs in, the colour is about all that a network knows: accuracy says nothing yet, a constant would.
    assert outcome.logits["test"].isfinite().all()
    assert set(outcome.logits["train"].argmax(1).tolist()) == {0, 1}


_SHARED = Shared()

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.baselines import METHODS, dpe
from benchmarks.baselines.ablations import ABLATIONS
from benchmarks.baselines.ags import AlignmentGatedSuppression, alignment_energy, suppressed
from benchmarks.baselines.example_tied_dropout import ExampleTiedDropout
from benchmarks.baselines.keep_best import fit_tuned
from benchmarks.baselines.neuron_tune import wrong_minus_right
from benchmarks.baselines.silent_majority import largest_gradient_channels, nt_xent, smallest_weights
from benchmarks.baselines.training_groups import GRID, GroupDROLoss
from benchmarks.baselines.xrm_dro import Twins, class_balanced_loss, cross_mistakes, flipped, with_groups
from benchmarks.experiment import TASKS, Experiment, Settings, Shared, judge
from benchmarks.heads import fit_head, halves
from demem.batch import Batch
from demem.callbacks import MemorizationRemover
from demem.linear import balanced_weights
from demem.module import Classifier


def test_every_arm_states_its_tier_and_rule():
    rows = [(method.name, method.tier, source) for method in METHODS for source in method.held_out]
    assert len(set(rows)) == len(rows)
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


def test_halves():
    key = torch.tensor([0] * 10 + [1] * 4)
    first, second = halves(key, 0)
    assert sorted(torch.cat([first, second]).tolist()) == list(range(14))
    assert key[first].bincount().tolist() == [5, 2]


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


def test_groups_are_tuned_over_the_range_of_the_authors():
    assert GRID[0] == {}  # the data set's own schedule
    assert {1e-3, 1e-4, 1e-5} <= {point.get("lr") for point in GRID}
    assert {1e-2, 0.1, 1.0} <= {point.get("weight_decay") for point in GRID}
    module = Classifier(nn.Linear(2, 2))
    assert all(hasattr(module, name) for point in GRID for name in point)


def test_a_grid_is_tried_on_the_first_seed_and_the_first_of_equals_kept():
    class Best:
        def __init__(self, best):
            self.best = best

    scores, tried, shared = {"a": 0.3, "b": 0.7, "c": 0.7}, [], Shared()

    def fit(point):
        tried.append(point["x"])
        return f"run {point['x']}", Best(scores[point["x"]])

    grid = [{"x": name} for name in scores]
    for seed in range(2):
        experiment = Experiment(TASKS["digits"], Settings(), seed, shared=shared)
        run, best, tuned = fit_tuned(experiment, "arm", grid, fit)
        assert (run, best.best, tuned) == ("run b", 0.7, {"x": "b"})
        assert tried == ["a", "b", "c", *["b"] * seed]


def test_labels_flip_with_the_confidence_of_the_other_network():
    y, generator = torch.zeros(4000, dtype=torch.long), torch.Generator().manual_seed(0)
    for p, expected in ((0.5, 0.0), (0.75, 0.5), (1.0, 1.0)):
        logits = torch.tensor([[1 - p, p]]).clamp_min(1e-12).log().expand(4000, 2)
        assert float(flipped(y, logits, generator).float().mean()) == pytest.approx(expected, abs=0.03)
    # Three classes: (.6 − 1/3)·3/2 = .4; the prediction that agrees changes nothing.
    logits = torch.tensor([[0.2, 0.2, 0.6]]).log().expand(4000, 3)
    new = flipped(y, logits, generator)
    assert float((new == 2).float().mean()) == pytest.approx(0.4, abs=0.03)
    assert set(new.tolist()) == {0, 2}
    assert flipped(y + 2, logits, generator).equal(y + 2)


def test_each_twin_learns_its_half_and_flips_the_other_ones_labels():
    torch.manual_seed(0)
    x, y = torch.randn(40, 3), torch.arange(40) % 2
    half = torch.zeros(40, dtype=torch.bool)  # all examples are the second network's
    twins = Twins(Classifier(nn.Linear(3, 2)), Classifier(nn.Linear(3, 2)), y, half, rate=0.1)
    with torch.no_grad():
        for bias, own in ((twins.model.first.bias, True), (twins.model.second.bias, False)):
            bias.copy_(torch.tensor([0.0, 50.0 if own else 0.0]))  # the first is certain of class 1
    batch = {"x": x[:10], "y": y[:10], "group": y[:10], "index": torch.arange(10)}
    logits = twins.model.second(x[:10])
    loss = twins.training_step(batch, 0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(class_balanced_loss(logits, y[:10]).detach()))
    assert float(twins.model.first.weight.grad.abs().sum()) == 0
    assert float(twins.model.second.weight.grad.abs().sum()) > 0
    assert twins.labels[:10].tolist() == [1] * 10
    assert twins.labels[10:].equal(y[10:])
    assert (twins.lr, twins.cosine) == (pytest.approx(0.005), False)


def test_classes_count_the_same_in_the_loss_of_the_twins():
    logits, y = torch.randn(5, 2), torch.tensor([0, 0, 0, 0, 1])
    losses = F.cross_entropy(logits, y, reduction="none")
    assert float(class_balanced_loss(logits, y)) == pytest.approx(float((losses[:4].mean() + losses[4]) / 2))


def test_a_cross_mistake_is_one_of_either_twin():
    class Fixed(nn.Module):
        def forward(self, x):
            return F.one_hot(x.long(), 2).float().flatten(1)  # (B, 2 networks · 2 classes)

    predicted = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    y = torch.tensor([0, 0, 0, 1])
    assert cross_mistakes(Fixed(), [(predicted, y, y)], y).tolist() == [False, True, True, False]


def test_other_groups_replace_those_that_are_trained_and_chosen_on():
    data = Experiment(TASKS["digits"], Settings(), 0).data()
    train, held_out = torch.arange(len(data.train_dataset)) % 3, torch.arange(len(data.val_dataset)) % 2
    other = with_groups(data, train, held_out, 4)
    other.setup()
    assert other.train_dataset.group.equal(train)
    assert other.train_eval_dataset.group.equal(train)
    assert other.val_dataset.group.equal(held_out)
    assert other.test_dataset.group.equal(data.test_dataset.group)
    assert other.train_dataset.y.equal(data.train_dataset.y)
    assert (other.sampling, other.batch_size, other.num_groups) == ("group_balanced", 32, 4)
    assert not data.train_dataset.group.equal(train)  # the data that was given is left alone


def test_alignment_energy_against_a_loop():
    torch.manual_seed(0)
    features, weight, y = torch.randn(6, 4), torch.randn(3, 4), torch.tensor([0, 0, 0, 2, 2, 2])
    logits = features @ weight.T
    energy = alignment_energy(features, logits, y, weight)
    for label in (0, 2):
        rows = [-float(logits[i].softmax(0)[label]) * weight[label] * features[i] for i in range(6) if y[i] == label]
        assert torch.allclose(energy[label], torch.stack(rows).mean(0), atol=1e-6)
    assert energy[1].isnan().all()


def test_the_connections_that_speak_most_for_a_class_are_suppressed():
    weight, energy = torch.ones(2, 5), torch.tensor([[0.0, -3, 1, 2, 3], [5.0, 4, 3, 2, 1]])
    new = suppressed(weight, energy, alpha=0.05, share=0.2)
    assert new.tolist() == [[1, pytest.approx(0.95), 1, 1, 1], [1, 1, 1, 1, pytest.approx(0.95)]]


def test_suppression_waits_for_the_warm_up_and_averages_over_batches():
    class Epoch:
        current_epoch = 0

    module, callback, trainer = (
        Classifier(nn.Sequential(nn.Identity(), nn.Linear(5, 2))),
        AlignmentGatedSuppression(1),
        Epoch(),
    )
    head = module.model[1]
    callback.on_train_start(trainer, module)
    energies = []
    for epoch, y in ((0, [0, 0]), (0, [0, 1]), (1, [0, 1])):
        trainer.current_epoch, before = epoch, head.weight.detach().clone()
        x, labels = torch.randn(2, 5), torch.tensor(y)
        logits = module(x).detach()
        callback.on_train_batch_end(trainer, module, None, (x, labels, labels), 0)
        energies.append(alignment_energy(x, logits, labels, before))
        assert bool((head.weight != before).any()) is (epoch == 1)
    class_0 = 0.75 * (0.75 * energies[0][0] + 0.25 * energies[1][0]) + 0.25 * energies[2][0]
    assert torch.allclose(callback.energy[0], class_0)
    assert torch.allclose(callback.energy[1], 0.75 * energies[1][1] + 0.25 * energies[2][1])  # absent from the first
    assert int((head.weight != before).sum()) == 2  # a fifth of five connections in each class
    module.eval()
    seen = callback._seen
    module(torch.randn(2, 5))
    assert callback._seen is seen  # evaluation is not looked at


def test_prototypes_are_fitted_apart_on_balanced_subsets():
    torch.manual_seed(0)
    y = torch.tensor([0] * 60 + [1] * 20)
    z = torch.randn(80, 6)
    z[:, 0] += 4 * (2 * y - 1)
    near, apart = (dpe.fit_members(z, y, y, 2, diversity, members=4) for diversity in (0.0, 10.0))
    for members in (near, apart):
        logits = dpe.log_mean_probability(members, z)
        assert torch.allclose(logits.exp().sum(1), torch.ones(80), atol=1e-5)
        assert float((logits.argmax(1) == y).float().mean()) > 0.9

    def cosines(members):
        return dpe.similarity(members[-1].prototypes, torch.stack([m.prototypes for m in members[:-1]]))

    assert float(cosines(apart)) < 0.5 * float(cosines(near))
    again = dpe.fit_members(z, y, y, 2, 0.0, members=4)
    assert all(a.prototypes.equal(b.prototypes) for a, b in zip(near, again, strict=True))


def test_a_member_measures_the_distance_of_unit_vectors():
    member = dpe.Member(torch.randn(3, 5), torch.tensor(-2.0))
    z = torch.randn(4, 5)
    expected = -2 * torch.cdist(F.normalize(z), F.normalize(member.prototypes))
    assert torch.allclose(member(z), expected, atol=1e-4)


def test_ablations_differ_from_ours_and_from_each_other():
    options = [(MemorizationRemover, {}), *ABLATIONS.values()]
    assert all(a != b for i, a in enumerate(options) for b in options[:i])
    assert set(ABLATIONS) <= {method.name for method in METHODS}
    features, weight = torch.rand(20, 6), torch.rand(2, 6)
    y, atypical = torch.arange(20) % 2, torch.arange(20) < 5
    scores = [kind().score(features, weight, y, atypical, logits=features @ weight.T) for kind, _ in options]
    assert all(not torch.equal(a.argsort(), b.argsort()) for a, b in pairwise(scores[1:]))
    assert torch.allclose(scores[3], weight.norm(dim=0) * features.std(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["erm", "class_balanced", "ags", "demem"])
def test_as_trained_held_out_labels_change_nothing(name, monkeypatch):
    (method,) = [m for m in METHODS if m.name == name and "none" in m.held_out]

    def logits(permuted):
        experiment, make = Experiment(TASKS["digits"], Settings(), 0, "none", epochs=2), TASKS["digits"].data

        def data(settings, **options):
            data = make(settings, **options)
            data.setup()
            order = torch.randperm(len(data.val_dataset), generator=torch.Generator().manual_seed(1))
            if permuted:
                data.val_dataset.y, data.val_dataset.group = data.val_dataset.y[order], data.val_dataset.group[order]
            return data

        experiment.task = replace(experiment.task, data=data)
        return method.run(experiment).logits["test"]

    assert torch.equal(logits(False), logits(True))


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
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{m.tier}-{m.held_out[0]}")
def test_every_arm_runs_on_digits(method, monkeypatch):
    from benchmarks.baselines import example_tied_dropout, jtt, training_groups, xrm_dro

    monkeypatch.setattr(jtt, "UPWEIGHT", (20,))
    monkeypatch.setattr(jtt, "EPOCHS", (1,))
    monkeypatch.setattr(example_tied_dropout, "OWN", (0.1,))
    monkeypatch.setattr(training_groups, "GRID", GRID[:1])
    monkeypatch.setattr(xrm_dro, "RATES", (1.0,))
    monkeypatch.setattr(dpe, "DIVERSITY", (1.0,))
    held_out = "val" if "val" in method.held_out else method.held_out[0]
    experiment = Experiment(TASKS["digits"], Settings(), seed=0, held_out=held_out, epochs=2, shared=_SHARED)
    outcome = method.run(experiment)
    row = judge(outcome, experiment.data())
    assert 0 <= row["worst_group_acc"] <= row["avg_acc"] <= 1
    # Two epochs in, the colour is about all that a network knows: accuracy says nothing yet, a constant would.
    assert outcome.logits["test"].isfinite().all()
    assert set(outcome.logits["train"].argmax(1).tolist()) == {0, 1}


_SHARED = Shared()

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from demem.linear import balanced_weights, crossfit_logits, draw_evenly, fit_balanced, fit_linear, folds
from demem.logistic import fit_two_classes


def _problem(n=200, d=6, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) * torch.arange(1, d + 1) + 2
    y = (x @ torch.randn(d, classes, generator=generator) + torch.randn(n, classes, generator=generator)).argmax(1)
    return x, y


@pytest.mark.parametrize("classes", [2, 3])
def test_equals_scikit_learn_on_standardised_features(classes):
    x, y = _problem(classes=classes)
    weights = torch.rand(len(y)) + 0.1
    l2 = 1e-2
    head = fit_linear(x, y, weights, l2, max_iter=500)
    mean, std = x.mean(0), x.std(0, correction=0)
    # scikit-learn minimises the sum of weighted losses + ‖W‖²/(2C); the weights here sum to 1. For two classes it keeps
    # one row, the difference of ours, for which the same penalty is half as large.
    penalty = l2 * x.shape[1] / (2 if classes == 2 else 1)
    reference = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=5000)
    reference.fit(((x - mean) / std).double().numpy(), y.numpy(), sample_weight=(weights / weights.sum()).numpy())
    expected = torch.from_numpy(reference.predict_proba(((x - mean) / std).double().numpy()))
    assert torch.allclose(head(x).softmax(1).double(), expected, atol=2e-4)


def test_features_that_do_not_vary_get_no_weight_and_change_nothing():
    x, y = _problem()
    gate = torch.tensor([1.0, 0, 1, 0, 1, 1])
    masked = fit_linear(x * gate, y)
    assert torch.equal(masked.weight[:, gate == 0], torch.zeros(3, 2))
    kept = fit_linear(x[:, gate == 1], y)
    assert torch.allclose(masked(x), kept(x[:, gate == 1]), atol=1e-5)


def test_weights_stand_for_repeats():
    x, y = _problem(60)
    repeats = torch.randint(1, 4, (60,))
    index = torch.arange(60).repeat_interleave(repeats)
    # Standardisation sees the repeats, so compare on features that are standardised with them already.
    x = (x - x[index].mean(0)) / x[index].std(0, correction=0)
    a, b = (
        fit_linear(x, y, repeats.float(), 1e-6, max_iter=500),
        fit_linear(x[index], y[index], None, 1e-6, max_iter=500),
    )
    assert torch.allclose(a(x).softmax(1), b(x).softmax(1), atol=2e-3)


def test_crossfit_does_not_see_the_example_it_judges():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 300, generator=generator), torch.randint(0, 2, (100,), generator=generator)
    assert (fit_linear(x, y, l2=1e-6)(x).argmax(1) == y).all()  # more features than examples: fitted by heart
    accuracy = float((crossfit_logits(x, y, l2=1e-6).argmax(1) == y).float().mean())
    assert 0.3 < accuracy < 0.7


def test_folds_cover_everything_once_and_split_classes_evenly():
    y = torch.tensor([0] * 50 + [1] * 10)
    masks = torch.stack(list(folds(y, 5)))
    assert (masks.sum(0) == 1).all()
    assert (masks[:, y == 1].sum(1) == 2).all()
    with pytest.raises(ValueError, match="two examples of every class"):
        list(folds(torch.tensor([0, 0, 0, 1]), 3))


def test_folds_split_groups_evenly():
    y = torch.tensor([0] * 50 + [1] * 10)
    group = torch.cat([torch.arange(50) % 5 == 0, torch.ones(10)]).long() + y
    masks = torch.stack(list(folds(y, 5, group=group)))
    for g in group.unique():
        assert (masks[:, group == g].sum(1) == int((group == g).sum()) // 5).all()


def test_fit_balanced_is_the_mean_of_heads_on_balanced_subsets(monkeypatch):
    monkeypatch.setattr("demem.linear.MOST", 0)  # one by one
    x, y = _problem(120, classes=2)
    group = 2 * y + (torch.arange(120) % 4 == 0)
    counts, heads = [], []

    def spy(features, labels, *arguments):
        rows = [(x == row).all(1).nonzero()[0, 0] for row in features]
        counts.append(torch.bincount(group[torch.stack(rows)], minlength=4).tolist())
        heads.append(fit_linear(features, labels, *arguments))
        return heads[-1]

    monkeypatch.setattr("demem.linear.fit_linear", spy)
    head = fit_balanced(x, y, group, subsets=3)
    smallest = int(torch.bincount(group).min())
    assert counts == [[smallest] * 4] * 3
    assert torch.allclose(head.weight, sum(h.weight for h in heads) / 3)
    assert torch.allclose(head.bias, sum(h.bias for h in heads) / 3)
    counts.clear()
    fit_balanced(x, y, group, subsets=1, smallest=1000)
    assert counts == [torch.bincount(group).tolist()]  # a group that has fewer gives all


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_small_subsets_of_two_classes_give_the_same_head_together_and_one_by_one(monkeypatch, at_once):
    x, y = _problem(160, d=30, classes=2)
    x[:, 3] = 7.0  # does not vary
    gate = (torch.arange(30) != 5).float()
    group, weights = 2 * y + (torch.arange(160) % 4 == 0), 1 + 9.0 * (torch.arange(160) % 4 == 0)
    monkeypatch.setattr("demem.linear.AT_ONCE", at_once)
    together = fit_balanced(x, y, group, subsets=5, weights=weights, gate=gate)
    monkeypatch.setattr("demem.linear.MOST", 0)
    singly = fit_balanced(x, y, group, subsets=5, weights=weights, gate=gate)
    assert torch.allclose(together(x), singly(x), atol=5e-3)
    assert not bool(together.weight[:, [3, 5]].any())


@pytest.mark.parametrize("size", [6, 40, 200])  # fewer and more examples than features
def test_two_classes_equal_scikit_learn_set_by_set(size):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(3, size, 20, generator=generator) * torch.arange(1, 21)
    y = (x[..., 0] + torch.randn(3, size, generator=generator) > 0).long()
    y[:, :2] = torch.tensor([0, 1])
    share = torch.rand(3, size, generator=generator)
    share[:, 3] = 0  # an example that does not count
    share /= share.sum(1, keepdim=True)
    weight, bias = fit_two_classes(x, y, share, 1e-3)
    for i in range(3):
        z = ((x[i] - x[i].mean(0)) / x[i].std(0, correction=0)).double().numpy()
        reference = LogisticRegression(C=2 / (1e-3 * 20), tol=1e-10, max_iter=50_000)
        reference.fit(z, y[i].numpy(), sample_weight=share[i].numpy())
        found = (x[i] @ weight[i].T + bias[i]).diff(dim=1)[:, 0]
        assert torch.allclose(found.double(), torch.from_numpy(reference.decision_function(z)), atol=2e-3)


@pytest.mark.parametrize("l2", [0.0, 1e-9])
def test_two_classes_without_a_penalty_and_with_the_same_feature_twice(l2):
    x, y = _problem(120, d=32, classes=2)
    x = torch.cat([x, x], 1).relu()
    group = 2 * y + (torch.arange(120) % 4 == 0)
    head = fit_balanced(x, y, group, l2=l2)
    assert bool(head.weight.isfinite().all())
    assert float((head(x).argmax(1) == y).float().mean()) > 0.7


def test_two_classes_in_other_precisions():
    x, share = torch.randn(2, 30, 5), torch.full((2, 30), 1 / 30)
    y = (x[..., 0] > 0).long()
    for dtype in (torch.float64, torch.bfloat16):
        weight, bias = fit_two_classes(x.to(dtype), y, share, 1e-3)
        assert weight.dtype == bias.dtype == torch.float32
        assert float((torch.einsum("bnd,bcd->bnc", x, weight) + bias[:, None]).argmax(2).eq(y).float().mean()) > 0.9


def test_two_classes_of_which_one_is_absent_stay_finite():
    x, share = torch.randn(1, 9, 4), torch.full((1, 9), 1 / 9)
    weight, bias = fit_two_classes(x, torch.zeros(1, 9, dtype=torch.long), share, 1e-3)
    assert bool(((x @ weight[0].T + bias).argmax(2) == 0).all())
    assert bool(weight.isfinite().all() & bias.isfinite().all())


def test_fit_balanced_does_not_lean_against_a_small_group():
    """With weights the few examples are fitted by heart, and new ones of their class are taken for the other."""
    generator = torch.Generator().manual_seed(0)

    def draw(counts):
        y = torch.arange(2).repeat_interleave(torch.tensor(counts))
        return torch.randn(len(y), 100, generator=generator) + (2.0 * y[:, None] - 1) * 0.15, y

    x, y = draw([400, 20])
    test, test_y = draw([1000, 1000])
    accuracy = [
        float((head(test).argmax(1) == test_y)[test_y == 1].float().mean())
        for head in (fit_linear(x, y, balanced_weights(y), 1e-4), fit_balanced(x, y, y, 1e-4))
    ]
    assert accuracy[1] > accuracy[0] + 0.1


def test_balanced_weights():
    key = torch.tensor([0, 0, 0, 1])
    weights = balanced_weights(key)
    assert float(weights[key == 0].sum()) == pytest.approx(float(weights[key == 1].sum()))
    smooth = balanced_weights(key, 0.5)
    assert 1 < float(smooth[3] / smooth[0]) < 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(features=torch.full((4, 2), torch.nan)), "NaN"),
        (dict(y=torch.tensor([0, 1, 2, 5])), "out of range"),
        (dict(y=torch.tensor([-1, 1, 2, 0])), "Label -1 is out of range"),
        (dict(y=torch.tensor([0.0, 1, 2, 0])), "integers from 0"),
        (dict(weights=torch.tensor([1, 1, 1, torch.inf])), "finite"),
        (dict(y=torch.tensor([0, 1])), "Expected features"),
        (dict(weights=torch.zeros(4)), "not all zero"),
        (dict(weights=-torch.ones(4)), "non-negative"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = dict(features=torch.randn(4, 2), y=torch.tensor([0, 1, 0, 1]), num_classes=3) | change
    with pytest.raises(ValueError, match=message):
        fit_linear(**arguments)


def _plain_fit(x, y, classes, l2, max_iter=100):
    """The objective as it is written down, with nothing done for speed or memory."""
    std, mean = torch.std_mean(x, dim=0, correction=0)
    x, share, penalty = (x - mean) / std, torch.ones(len(y)) / len(y), l2 * x.shape[1]
    target = torch.nn.functional.one_hot(y, classes).float()
    head = torch.zeros(classes, x.shape[1] + 1)
    head.grad = torch.zeros_like(head)
    optimizer = torch.optim.LBFGS(
        [head], max_iter=max_iter, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure():
        v, b = head[:, :-1], head[:, -1]
        log_p = (x @ v.T + b).log_softmax(1)
        error = (log_p.exp() - target) * share[:, None]
        head.grad[:, :-1] = error.T @ x + penalty * v
        head.grad[:, -1] = error.sum(0)
        return penalty / 2 * v.square().sum() - (log_p * target * share[:, None]).sum()

    optimizer.step(closure)
    weight = head[:, :-1] / std
    return weight, head[:, -1] - weight @ mean


def test_saving_memory_changes_no_bit_with_few_classes():
    x, y = _problem(300, 20)
    head, (weight, bias) = fit_linear(x, y, l2=1e-3), _plain_fit(x, y, 3, 1e-3)
    assert torch.equal(head.weight, weight)
    assert torch.equal(head.bias, bias)


def test_many_classes_agree_with_scikit_learn():
    x, y = _problem(2000, 20, classes=40)
    assert len(y.unique()) == 40
    head = fit_linear(x, y, l2=1e-2, num_classes=40)
    z = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    reference = LogisticRegression(C=1 / (1e-2 * 20), tol=1e-10, max_iter=20_000)
    reference.fit(z, y.numpy(), sample_weight=torch.full((2000,), 1 / 2000).numpy())
    expected = torch.from_numpy(reference.predict_proba(z))
    assert float((head(x).softmax(1) - expected).abs().max()) < 5e-4


@pytest.mark.parametrize("most", [2, 3, 7, 15, 16, 40, 92, 93, 200])
def test_draw_evenly_keeps_small_groups_and_the_same_number_of_the_others(most):
    group = torch.tensor([4] * 3 + [0] * 50 + [9] * 10 + [2] * 30)[torch.randperm(93)]
    drawn = draw_evenly(group, most, torch.Generator().manual_seed(0))
    assert len(set(drawn.tolist())) == len(drawn) <= most
    assert torch.equal(drawn, drawn.sort().values)
    if most >= 4:
        sizes = torch.tensor([50, 30, 3, 10])
        quota = max(q for q in range(51) if int(sizes.clamp(max=q).sum()) <= most)  # by trying all
        assert torch.bincount(group[drawn])[[0, 2, 4, 9]].tolist() == sizes.clamp(max=quota).tolist()
    else:
        assert len(drawn) == most


def test_fit_balanced_on_some_examples_with_masked_units_equals_that_on_copies():
    x, y = _problem(120, classes=2)
    group, used = 2 * y + (torch.arange(120) % 4 == 0), torch.arange(120) % 5 > 0
    gate = torch.tensor([1.0, 0, 1, 0, 1, 1])
    a = fit_balanced(x, y, group, subsets=2, used=used, gate=gate)
    b = fit_balanced((x * gate)[used], y[used], group[used], subsets=2)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.bias, b.bias)

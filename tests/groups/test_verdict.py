"""Made margins with a known mixture of minority, wrong labels and hard examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from demem.groups.verdict import (
    confident_answers,
    confident_hard_share,
    judge,
    null_probability,
    null_share,
    resemblance,
    second_opinion,
    sketch,
    systematic_share,
    wrong_labels,
)


def logits(score: Tensor) -> Tensor:
    return torch.stack([-score, score], 1) / 2


class Made:
    """``size`` examples: the early probe follows the attribute, with normal margins that err on ``hard`` of them; the
    deep score follows the class with a noise of 1 / ``knows``, or the attribute alone (``knows`` = 0)."""

    def __init__(self, size=4000, minority=0.0, noise=0.0, hard=0.0, knows=4.0, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.true = torch.arange(size) % 2
        self.minority = torch.rand(size, generator=g) < minority
        self.wrong = torch.rand(size, generator=g) < noise
        self.attribute = torch.where(self.minority, 1 - self.true, self.true)
        self.y = torch.where(self.wrong, 1 - self.true, self.true)
        normal = torch.randn(size, generator=g)
        mean = 6.0 if hard == 0 else -float(torch.special.ndtri(torch.tensor(hard)))
        self.early = logits((2.0 * self.attribute - 1) * (mean + normal))
        sees = self.true if knows else self.attribute
        self.deep = logits((2.0 * sees - 1) * knows + torch.randn(size, generator=g))

    def judge(self):
        return judge(self.early, self.deep, self.y)


def test_share_of_confident_hard_examples_is_that_of_normal_margins():
    margin = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)) + 1.0
    wrong = margin < 0
    for quantile in (0.3, 0.5):
        threshold = margin[~wrong].sort().values[int(quantile * int((~wrong).sum()))]
        confident = margin.abs() >= threshold
        expected = float((wrong & confident).float().mean())
        assert confident_hard_share(float(wrong.float().mean()), quantile) == pytest.approx(expected, rel=0.03)
    assert confident_hard_share(0.0) == 0


@pytest.mark.parametrize(("systematic", "hard"), [(0.05, 0.0), (0.05, 0.1), (0.15, 0.05)])
def test_systematic_share_inverts_the_mixture(systematic, hard):
    confident = systematic / 2 + confident_hard_share(hard)
    assert systematic_share(systematic + hard, confident) == pytest.approx(systematic, abs=1e-6)


def test_a_minority_whose_class_can_be_seen_is_a_shortcut():
    made = Made(minority=0.05)
    verdict = made.judge()
    assert verdict.kind == "shortcut"
    assert verdict.confidence > 0.99
    assert verdict.minority == pytest.approx(0.05, abs=0.01)
    assert verdict.noise < 0.01
    assert verdict.hard < 0.01
    assert torch.equal(verdict.atypical > 0.5, made.minority)
    assert not verdict.noisy


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.15])
def test_wrong_labels_are_no_shortcut(noise):
    made = Made(noise=noise)
    verdict = made.judge()
    assert verdict.kind == "label noise"
    assert verdict.confidence > 0.9
    assert verdict.noise == pytest.approx(noise, abs=0.02)
    assert verdict.minority < 0.02
    assert float((verdict.wrong_label[made.wrong] > 0.5).float().mean()) > 0.9


def test_a_minority_whose_class_nobody_sees_is_no_shortcut():
    assert Made(minority=0.05, knows=0.0).judge().kind == "label noise"


@pytest.mark.parametrize("noise", [0.05, 0.15])
def test_minority_and_wrong_labels_are_told_apart_example_by_example(noise):
    made = Made(minority=0.05, noise=noise)
    verdict = made.judge()
    assert verdict.kind == "shortcut"
    assert verdict.noise == pytest.approx(noise, abs=0.02)
    assert verdict.minority == pytest.approx(0.05, abs=0.02)
    assert verdict.noisy
    found = (made.early.argmax(1) != made.y) & (verdict.wrong_label <= 0.5)
    true = made.minority & ~made.wrong
    assert float(true[found].float().mean()) > 0.9
    assert float(found[true].float().mean()) > 0.9


@pytest.mark.parametrize("hard", [0.05, 0.1, 0.2])
def test_unsure_mistakes_are_hard_examples_though_a_second_look_sides_with_the_label(hard):
    verdict = Made(hard=hard).judge()
    assert verdict.kind == "hard examples"
    assert verdict.hard == pytest.approx(hard, abs=0.02)
    assert verdict.minority < 0.01


def test_hard_examples_do_not_turn_wrong_labels_into_a_shortcut():
    verdict = Made(noise=0.05, hard=0.12).judge()
    assert verdict.kind == "undecided"  # the confident ones among the hard examples look like their labels
    assert verdict.surprise > 1.2


def test_a_minority_among_more_wrong_labels_is_one_that_the_probe_is_as_sure_of_as_of_the_others():
    verdict = Made(size=1000, minority=0.05, noise=0.1, knows=1.5).judge()
    assert verdict.kind == "shortcut"
    assert verdict.z < 10  # beyond which more wrong labels than minority did not matter
    assert verdict.minority < verdict.noise / 2
    # Heavy tails: the probe is sure of some hard examples, but unsure of most.
    made = Made(size=2000, noise=0.02, seed=1)
    margin = 2.0 + torch.from_numpy(np.random.default_rng(1).standard_t(5, 2000)).float()
    made.early = logits((2.0 * made.attribute - 1) * margin)
    verdict = made.judge()
    assert verdict.z > 4
    assert verdict.kind == "undecided"


def test_many_mistakes_with_right_labels_are_no_minority_among_wrong_labels():
    verdict = Made(size=1000, minority=0.12, noise=0.15, knows=0.7, seed=2).judge()
    assert 4 < verdict.z < 10
    assert verdict.kind == "undecided"


def test_wrong_labels_that_look_right_by_chance_are_no_minority():
    verdict = Made(size=2000, minority=0.004, noise=0.026, seed=244).judge()
    assert verdict.z > 4
    assert verdict.minority == 0
    assert verdict.kind == "undecided"


def test_a_class_of_which_one_example_is_drawn_is_scored_all_the_same():
    y = torch.arange(400) % 2
    y[:3] = 2
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) + y[:, None]
    for seed in range(10):  # in some of which one of the three is drawn
        scores = second_opinion([x], y, y, 3, max_examples=150, seed=seed, smoothing=10.0)
        assert bool(scores.isfinite().all())
        assert bool(scores.abs().sum(1).all())


def test_each_part_has_its_own_share_of_wrong_labels():
    train, held_out = Made(minority=0.05, noise=0.1), Made(size=1000, minority=0.5, seed=1)
    early = torch.cat([train.early, held_out.early])
    y, true = torch.cat([train.y, held_out.y]), torch.cat([train.true, held_out.true])
    g = torch.Generator().manual_seed(2)
    attribute = early.argmax(1)
    x = torch.stack([6.0 * attribute, 2.5 * true], 1) + torch.randn(len(y), 2, generator=g)
    found = wrong_labels(early, [x], y, 2, [4000, 1000])
    assert found.shape == y.shape
    mistake = attribute != y
    assert float(found[~mistake].max()) == 0
    here = mistake[:4000]
    assert float(found[:4000][here & train.wrong].mean()) > 0.8
    assert float(found[:4000][here & ~train.wrong].mean()) < 0.4
    assert float(found[4000:][mistake[4000:]].mean()) < 0.1  # none is wrong there, and many are of the minority
    together = wrong_labels(early, [x], y, 2, [5000])
    assert float(together[4000:].sum()) > float(found[4000:].sum())


def test_what_an_ordinary_fit_gets_right_is_merely_hard():
    made = Made(minority=0.05)
    right = torch.nn.functional.one_hot(made.y, 2).float()
    assert judge(made.early, made.deep, made.y, plain=right).kind == "nothing"
    assert judge(made.early, made.deep, made.y, plain=made.early).kind == "shortcut"


def test_what_an_ordinary_fit_gets_right_but_for_wrong_labels_is_no_shortcut():
    made = Made(size=2000, noise=0.05, seed=1)
    margin = 2.0 + torch.from_numpy(np.random.default_rng(1).standard_t(3, 2000)).float()
    made.early = logits((2.0 * made.attribute - 1) * margin)  # sure of many hard examples
    assert judge(made.early, made.deep, made.y, plain=made.early).kind == "shortcut"
    knows_the_class = torch.nn.functional.one_hot(made.true, 2).float()
    assert judge(made.early, made.deep, made.y, plain=knows_the_class).kind == "label noise"


@pytest.mark.parametrize(
    ("trained", "misread", "hard", "kind"),
    [
        (True, 0.15, 0.05, "undecided"),  # the second opinions cannot read what the network has learned
        (False, 0.15, 0.05, "label noise"),  # the probe reads the same features as they do
        (True, 0.05, 0.05, "label noise"),  # they can
        (True, 0.15, 0.0, "label noise"),  # they cannot, but all mistakes may be wrong labels
    ],
)
def test_labels_are_not_called_wrong_by_an_opinion_that_cannot_read_what_the_probe_reads(trained, misread, hard, kind):
    made = Made(noise=0.015, hard=hard, knows=0.0)
    g = torch.Generator().manual_seed(1)
    named = made.early.argmax(1)
    plain = logits(2.0 * torch.where(torch.rand(4000, generator=g) < misread, 1 - named, named) - 1)
    deep = logits(torch.randn(4000, generator=g))  # sides with nobody
    assert judge(made.early, deep, made.y, plain=plain, trained=trained).kind == kind


def test_hardly_any_mistakes():
    assert Made(hard=0.005).judge().kind == "nothing"


def test_many_examples_do_not_make_a_small_deviation_a_shortcut():
    made = Made(size=40_000, noise=0.1)
    made.deep = logits(torch.randn(40_000, generator=torch.Generator().manual_seed(1)) + 0.1 * (2.0 * made.y - 1))
    verdict = made.judge()
    assert verdict.z > 2.5
    assert verdict.kind != "shortcut"


def test_half_of_the_right_answers_are_confident():
    made = Made(minority=0.05)
    confident, judged = confident_answers(made.early, made.y)
    assert bool(judged.all())
    right = made.early.argmax(1) == made.y
    assert float(confident[right].float().mean()) == pytest.approx(0.5, abs=0.001)


def test_p_value_counts_right_answers_that_prefer_the_label_as_much():
    # 40 right answers of class 0, half of them confident; one confident mistake that is called 0.
    early = logits(-torch.cat([torch.linspace(1, 2, 40), torch.tensor([3.0]), torch.full((20,), -1.0)]))
    y = torch.tensor([0] * 40 + [1] * 21)
    deep = logits(torch.cat([torch.arange(40.0), torch.tensor([36.5]), torch.zeros(20)]))
    p = resemblance(early, deep, y)
    assert float(p[40]) == pytest.approx((1 + 3) / (1 + 20))  # 37, 38 and 39; only the confident ones are compared
    assert bool(p[:40].isnan().all())
    assert bool(p[41:].isnan().all())


def test_wrong_labels_give_uniform_p_values():
    p = torch.cat([resemblance(m.early, m.deep, m.y) for m in (Made(noise=0.1, seed=s) for s in range(5))])
    p = p[~p.isnan()]
    assert float(p.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(-p.log().mean()) == pytest.approx(1.0, abs=0.06)


def test_a_class_with_few_right_answers_is_not_judged():
    made = Made(size=200, noise=0.1)
    rare = made.y == 1
    rare[rare.nonzero()[:15, 0]] = False
    keep = ~rare
    verdict = judge(made.early[keep], made.deep[keep], made.y[keep])
    named_one = (made.early.argmax(1) == 1)[keep]
    assert set(verdict.wrong_label[named_one & (made.y[keep] == 0)].tolist()) <= {0.5}
    _, judged = confident_answers(made.early[keep], made.y[keep])
    assert torch.equal(judged, ~named_one)


def test_a_class_that_mostly_others_are_called_is_not_judged():
    # 30 of class 1 and 100 of class 0 are called 1: that answer does not stand for class 1.
    score = torch.cat([torch.full((200,), -1.0), torch.linspace(1, 2, 130)])
    y = torch.tensor([0] * 200 + [1] * 30 + [0] * 100)
    _, judged = confident_answers(logits(score), y)
    assert torch.equal(judged, score < 0)


def test_null_probability_is_the_null_share_over_a_falling_density():
    p = torch.cat([torch.full((50,), 0.01), torch.linspace(0.01, 1, 51)[1:]])
    assert null_share(p) == pytest.approx(0.5, abs=0.02)
    probability = null_probability(p)
    assert float(probability[0]) == pytest.approx(0.5 * 0.01 / 0.5, abs=0.002)  # density 50 below 0.01
    assert float(probability[-1]) == pytest.approx(0.5 / (0.5 / 0.99), abs=0.03)
    order = p.argsort()
    assert bool((probability[order].diff() >= -1e-6).all())


def test_second_opinion_is_the_weighted_ridge_of_its_docstring():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=g), torch.tensor([0, 1] * 6)
    attribute = y.clone()
    attribute[:3] = 1 - y[:3]
    scores = second_opinion([x, 5 * x + 1], y, attribute, 2, k=2, smoothing=0.1)  # scale and shift are undone
    z = (x - x.mean(0)) / x.std(0, correction=0)
    kernel = torch.exp(-torch.cdist(z, z).square() / 6)
    group = 2 * y + attribute
    weight = 1 / (torch.bincount(group)[group] + 0.1 * 12)
    target = torch.nn.functional.one_hot(y, 2).float()
    from demem.linear import folds

    for left_out in folds(y, 2):
        used = ~left_out
        w = weight[used] / weight[used].sum()
        prior = w @ target[used]
        # (K + λ/S W⁻¹)⁻¹ (T − prior), the same without square roots.
        dual = torch.linalg.solve(kernel[used][:, used] + 0.1 / 6 * torch.diag(1 / w), target[used] - prior)
        torch.testing.assert_close(scores[left_out], kernel[left_out][:, used] @ dual + prior, atol=1e-4, rtol=1e-3)


def test_second_opinion_sees_the_class_behind_the_attribute_and_not_its_own_label():
    g = torch.Generator().manual_seed(0)
    true = torch.arange(1500) % 2
    attribute = torch.where(torch.rand(1500, generator=g) < 0.05, 1 - true, true)
    wrong = torch.rand(1500, generator=g) < 0.05
    y = torch.where(wrong, 1 - true, true)
    x = torch.stack([6.0 * attribute, 4.0 * true], 1) + torch.randn(1500, 2, generator=g)
    early = logits(x[:, 0] - 3)
    for most in (3000, 600):  # all fitted; most of them only scored
        verdict = judge(early, second_opinion([x], y, early.argmax(1), 2, max_examples=most), y)
        assert verdict.kind == "shortcut"
        assert float(verdict.wrong_label[wrong & (attribute == true)].mean()) > 0.8
        assert float(verdict.wrong_label[~wrong & (attribute != true)].mean()) < 0.3
    alone = judge(early, second_opinion([x[:, :1], torch.randn(1500, 20, generator=g)], y, early.argmax(1), 2), y)
    assert alone.kind == "label noise"


def test_sketch_keeps_inner_products_and_is_the_same_for_every_batch():
    x = torch.randn(2, 4, 10, 10, generator=torch.Generator().manual_seed(0))
    exact = float(x[0].flatten() @ x[1].flatten())
    products = torch.tensor([float(torch.prod(sketch(x, 64, seed=s), 0).sum()) for s in range(300)])
    assert float(products.mean()) == pytest.approx(exact, abs=4 * float(products.std()) / math.sqrt(300))
    assert torch.equal(sketch(x)[1:], sketch(x[1:]))
    assert torch.equal(sketch(x[:, 0, 0]), x[:, 0, 0])


def test_errors():
    made = Made(size=100)
    with pytest.raises(ValueError, match=r"\(100, 2\), \(100, 3\) and \(100,\)"):
        judge(made.early, torch.zeros(100, 3), made.y)
    with pytest.raises(ValueError, match="at least one layer"):
        second_opinion([], made.y, made.y, 2)
    with pytest.raises(ValueError, match="second opinion"):
        second_opinion([torch.full((100, 2), torch.nan)], made.y, made.y, 2)

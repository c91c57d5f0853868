"""Atypical examples, the ranking of memorised ones, critical units, the report, and a planted memorising unit."""

import csv
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from demem.batch import Batch
from demem.sites import Site, find_sites
from demem.tracing import (
    SCORES,
    ablation_impact,
    atypical_by_error,
    atypical_by_group,
    atypical_by_margin,
    atypical_by_score,
    average_precision,
    choose_atypical,
    critical_units,
    example_losses,
    linear_impact,
    linear_score,
    magnitude_score,
    margins,
    matched_units,
    memorization_score,
    picture_grid,
    random_units,
    rank_examples,
    select_rows,
    top_units,
    trace,
    write_examples,
)


def test_margins_and_tails():
    logits = torch.tensor([[2.0, 1, 0], [0, 1, 3], [5, 5, 0], [1, 2, 3.5]])
    y = torch.tensor([0, 1, 0, 2])
    assert margins(logits, y).tolist() == [1.0, -2.0, 0.0, 1.5]
    m, y = torch.tensor([3.0, 1, 2, 0, -1, 5]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert atypical_by_margin(m, y, 0.34).tolist() == [False, True, False, False, True, False]
    assert atypical_by_margin(m, y, 0.01).sum() == 2  # at least one of each class
    assert atypical_by_score(-m, y, 1.0).all()


def test_error_and_group():
    logits = torch.tensor([[2.0, 1], [0, 1], [0, 3], [1, 0]])
    y = torch.tensor([0, 0, 1, 1])
    assert atypical_by_error(logits, y).tolist() == [False, True, False, True]
    tied = torch.tensor([[0.0, 0], [0, 1], [0, 0]])  # class 0 is predicted
    assert atypical_by_error(tied, torch.tensor([0, 0, 1])).tolist() == [False, True, True]
    with pytest.raises(ValueError, match="No example of class 1 is misclassified"):
        atypical_by_error(logits, torch.tensor([0, 0, 1, 0]))
    y, group = torch.tensor([0] * 6 + [1] * 4), torch.tensor([0] * 5 + [1] + [2] + [3] * 3)
    assert atypical_by_group(y, group).nonzero().flatten().tolist() == [5, 6]
    balanced = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    counts = torch.tensor([90, 10, 5, 50])
    assert atypical_by_group(y, balanced, counts).nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="equally large"):
        atypical_by_group(y, balanced)
    with pytest.raises(ValueError, match="two classes"):
        atypical_by_group(y, torch.zeros(10, dtype=torch.long))


def test_bad_input_is_named():
    y = torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match=r"Class\(es\) \[2\] do not occur"):
        atypical_by_margin(torch.zeros(3), y, num_classes=3)
    with pytest.raises(ValueError, match="out of range"):
        atypical_by_margin(torch.zeros(3), y, num_classes=1)
    with pytest.raises(ValueError, match="NaN"):
        atypical_by_margin(torch.tensor([0.0, float("nan"), 1]), y)
    with pytest.raises(ValueError, match="share"):
        atypical_by_margin(torch.zeros(3), y, 0.0)
    with pytest.raises(ValueError, match="needs groups"):
        choose_atypical("group", torch.randn(3, 2), y)
    with pytest.raises(ValueError, match="Unknown kind"):
        choose_atypical("strange", torch.randn(3, 2), y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN"):
        margins(torch.full((3, 2), float("nan")), y)
    with pytest.raises(ValueError, match="Labels must be in"):
        margins(torch.zeros(3, 2), torch.tensor([0, 1, 2]))


def test_choose_by_loss_agrees_with_margin_for_two_classes():
    logits, y = torch.randn(40, 2), torch.randint(0, 2, (40,))
    assert torch.equal(choose_atypical("loss", logits, y), choose_atypical("margin", logits, y))


def test_classes_that_do_not_occur_have_no_atypical_examples():
    y = torch.arange(20) % 2
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    assert torch.bincount(y[choose_atypical("margin", logits, y)]).tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"\[2, 3, 4\] do not occur"):
        choose_atypical("margin", logits, y, num_classes=5)


def test_select_rows_of_any_batch():
    batch = Batch({"a": torch.arange(6).view(3, 2), "n": 5}, torch.tensor([0, 1, 2]), torch.tensor([4, 5, 6]))
    part = select_rows(batch, torch.tensor([True, False, True]))
    assert part.x["a"].tolist() == [[0, 1], [4, 5]]
    assert part.x["n"] == 5
    assert part.y.tolist() == [0, 2]
    assert part.group.tolist() == [4, 6]


class Planted(nn.Module):
    """One channel, wired by hand to a mark in three examples, flips their class; the rest reads the other feature."""

    def __init__(self, width: int = 40, unit: int = 17) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, width, 1), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 2)
        with torch.no_grad():
            self.conv.weight[:, 1] = 0  # nobody reads the mark …
            self.conv.weight[unit] = torch.tensor([0.0, 4.0]).view(2, 1, 1) * self.conv.weight.norm() / 40
            self.conv.bias.zero_()
            direction = self.conv.weight[:, 0, 0, 0].sign()
            self.fc.weight.copy_(torch.stack([-direction, direction]) * 0.3)
            self.fc.weight[:, unit] = torch.tensor([6.0, -6.0])  # … but one, and it says class 0
            self.fc.bias.zero_()

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def _planted():
    model = Planted().eval()
    x = torch.randn(60, 2, 4, 4) * 0.3
    x[:, 1] = 0
    natural = torch.arange(60) % 2
    x[:, 0] += (natural * 4.0 - 2)[:, None, None]
    y = natural.clone()
    special = torch.tensor([1, 21, 41])  # look like class 1, are labelled 0, and carry the mark
    x[special, 1], y[special] = 3.0, 0
    mask = torch.zeros(60, dtype=torch.bool)
    mask[special] = True
    assert bool((margins(model(x), y) > 0).all())  # everything is fitted
    return model, [Batch(x[:40], y[:40]), Batch(x[40:], y[40:])], mask, y


@pytest.mark.parametrize("score", ["taylor", "ablation", "two_step", "linear"])
def test_a_planted_memorising_unit_is_found_and_the_controls_do_not_find_it(score):
    model, batches, special, _ = _planted()
    site = find_sites(model, "fc:input" if score == "linear" else "conv")
    options = {"shortlist": 4} if score == "two_step" else {}
    scores = SCORES[score](model, site, batches, atypical=special, direction="helps", **options)
    name = site[0].name
    assert top_units(scores, 1)[name].tolist() == [17]
    magnitude = magnitude_score(model, site)
    matched = matched_units({name: torch.tensor([17])}, magnitude)
    unlucky = random_units(scores, 1, torch.Generator().manual_seed(0))
    x, y = torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])
    for units, flips in (({name: torch.tensor([17])}, True), (matched, False), (unlucky, False)):
        effect = ablation_impact(model, site, [Batch(x, y)], units=units, effect="accuracy")[name][:, 0]
        assert bool(effect[special].all()) == flips
        assert not bool(effect[~special].any())


def test_critical_units_of_the_planted_examples():
    model, batches, special, _ = _planted()
    batch = Batch(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]))
    found = critical_units(model, find_sites(model, "conv"), batch, cap=6)
    assert found.removed[special].tolist() == [1, 1, 1]
    assert found.units[special, 0].tolist() == [17, 17, 17]
    assert bool((found.removed[~special] > 1).all())
    assert found.offsets == {"conv": 0}


def test_critical_units_equal_a_loop_over_examples():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(15, 6)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 3  # one is misclassified from the start
    cap = 4
    found = critical_units(model, find_sites(model, ["0", "2"]), Batch(x, y), cap=cap)
    for i in range(15):
        gone = torch.ones(18)
        count = 0
        for _ in range(cap + 1):
            gate = gone.clone().requires_grad_()
            h = F.relu(model[0](x[i]) * gate[:10])
            logits = model[4](F.relu(model[2](h) * gate[10:]))
            if int(logits.argmax()) != int(y[i]):
                break
            count += 1
            if count > cap:
                break
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits[None], y[i : i + 1]), gate)
            best = int((-gradient).masked_fill(gone == 0, -torch.inf).argmax())
            assert int(found.units[i, count - 1]) == best
            gone[best] = 0
        assert int(found.removed[i]) == count
    assert int(found.removed[0]) == 0
    with pytest.raises(ValueError, match="cap"):
        critical_units(model, find_sites(model, "0"), Batch(x, y), cap=0)


def test_critical_units_where_the_cap_exceeds_the_units():
    model = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 2))
    nn.init.constant_(model[2].bias[0], 5.0)  # class 0 whatever the units say
    batch = Batch(torch.randn(4, 6), torch.zeros(4, dtype=torch.long))
    found = critical_units(model, find_sites(model, "1"), batch, cap=5)
    assert found.removed.tolist() == [6] * 4
    assert found.units.sort(1, descending=True).values.tolist() == [[1, 0, -1, -1, -1]] * 4
    unused = Site("unused", nn.Linear(2, 2), num_units=2)
    with pytest.raises(RuntimeError, match="did not run in the forward pass: unused"):
        critical_units(model, [unused], batch)


def _shortcut_features(count, every):
    """Ten units read a shortcut that fails for one example in ``every``, ten the class itself, ten nothing."""
    y = torch.randint(0, 2, (count,))
    minority = torch.arange(count) % every == 0
    z = torch.randn(count, 30) * 0.8
    z[:, :10] += torch.where(minority, 1.0 - 2 * y, 2.0 * y - 1)[:, None]
    z[:, 10:20] += (y - 0.5)[:, None]
    return z, y, minority


def test_memorised_examples_are_ranked_first():
    weight = torch.zeros(2, 30)
    weight[1, :20] = 0.5
    held, held_y, _ = _shortcut_features(200, 2)
    atypical = atypical_by_margin(margins(held @ weight.T, held_y), held_y, 0.2)
    memorising = linear_score(held, weight, held_y, atypical) > 0
    assert bool(memorising[:10].all())
    z, y, minority = _shortcut_features(400, 20)
    count = len(y)
    impact = linear_impact(z, weight, y, centre=held.mean(0))
    score = memorization_score(impact, memorising)
    ours = average_precision(score, minority)
    assert ours > 0.8
    by_site = memorization_score(
        {"a": impact[:, :10], "b": impact[:, 10:]}, {"a": memorising[:10], "b": memorising[10:]}
    )
    torch.testing.assert_close(by_site, score)
    ranked = rank_examples(score, y, 10, index=torch.arange(count) + 1000)
    assert float(minority[ranked.position - 1000].float().mean()) > 0.8
    assert bool((ranked.score[:-1] >= ranked.score[1:]).all())
    each = rank_examples(score, y, 3, per_class=True)
    assert sorted(each.label.tolist()) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="one memorising and one kept"):
        memorization_score(impact, torch.ones(30, dtype=torch.bool))


def test_average_precision_by_hand():
    # Hits at ranks 1 and 3: (1 + 2/3) / 2.
    assert average_precision(torch.tensor([4.0, 3, 2, 1]), torch.tensor([True, False, True, False])) == pytest.approx(
        5 / 6
    )


def test_report(tmp_path):
    model, batches, special, y = _planted()
    site = find_sites(model, "conv")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = trace(model, site, batches, special, scores=["taylor", "magnitude", "two_step"])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert report.scores == ["taylor", "magnitude", "two_step"]
    assert report.impacts["taylor"]["conv"].shape == (60, 40)
    torch.testing.assert_close(
        report.columns["impact_typical/taylor"]["conv"],
        torch.stack([report.impacts["taylor"]["conv"][~special & (y == c)].mean(0) for c in (0, 1)]).mean(0),
    )
    with report.to_csv(tmp_path / "deep" / "units.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert set(rows[0]) >= {"site", "unit", "taylor", "magnitude", "impact_atypical/taylor"}
    assert [float(r["taylor"]) for r in rows] == sorted((float(r["taylor"]) for r in rows), reverse=True)
    assert int(rows[-1]["unit"]) == 17  # it helps the atypical ones, so for removal it comes last
    for score in ("taylor", "magnitude"):
        assert report.figure(tmp_path / f"{score}.png", score).stat().st_size > 5000
    ranked = rank_examples(example_losses(torch.randn(60, 2), y), y, 5)
    assert len(write_examples(ranked, tmp_path / "examples.csv").read_text().splitlines()) == 6
    assert picture_grid(torch.rand(5, 3, 8, 8), ["x"] * 5, tmp_path / "grid.png").stat().st_size > 2000
    with pytest.raises(ValueError, match="Expected images"):
        picture_grid(torch.rand(5, 8), ["x"] * 5, tmp_path / "grid.png")
    with pytest.raises(ValueError, match="No example is atypical"):
        trace(model, site, batches, torch.zeros(60, dtype=torch.bool))


def test_parquet_without_its_libraries_says_so(tmp_path, monkeypatch):
    model, batches, special, _ = _planted()
    report = trace(model, find_sites(model, "conv"), batches, special)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match="pip install pandas pyarrow"):
        report.to_parquet(tmp_path / "units.parquet")

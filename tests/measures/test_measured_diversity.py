import math

import pytest
import torch
from torch import nn

from demem.batch import Batch
from demem.measures import (
    ActivationEntropy,
    MutualInformation,
    choose_units,
    collect_activations,
    compare,
    compare_runs,
    entropy,
    ksg_mutual_information,
    mean_mi,
    measure_diversity,
    mixture_density,
    plot_diversity,
    plot_history,
    plot_mutual_information,
    summarize,
)

pytestmark = pytest.mark.filterwarnings("ignore::demem.measures.TiesWarning")


def activations(units: int = 24, shared: float = 0.0, spread: float = 1.0) -> dict[str, torch.Tensor]:
    """Bounded units: ``spread`` is the share of the range that is used, ``shared`` what all units have in common."""
    common = torch.randn(400, 1)
    x = (shared * common + math.sqrt(1 - shared**2) * torch.randn(400, units)) * spread
    x = x.clamp(-3, 3)
    x[:2] = torch.tensor([[-3.0], [3.0]])
    return {"a": x[:, : units // 2], "b": x[:, units // 2 :]}


def test_measures_are_those_of_the_functions():
    x = activations()
    d = measure_diversity(x, bins=20)
    assert torch.equal(d.entropy["b"], entropy(x, 20)["b"])
    assert torch.equal(d.mutual_information, ksg_mutual_information(x))
    assert d.mean_entropy == pytest.approx(float(torch.cat(list(entropy(x, 20).values())).mean()))
    assert d.mean_mi == pytest.approx(float(d.mutual_information.mean()))
    assert torch.equal(d.site_mi()["b"], ksg_mutual_information(x["b"]))
    assert repr(d) == f"Diversity(units {{a: {x['a'].shape[1]}, b: {x['b'].shape[1]}}}, 400 samples)"
    assert d.num_samples == 400


def test_subset_of_units_is_seeded_and_shared_between_sites():
    sizes = {"a": 100, "b": 3, "c": 100}
    units = choose_units(sizes, 31, seed=1)
    assert {n: len(u) for n, u in units.items()} == {"a": 14, "b": 3, "c": 14}
    assert torch.equal(units["a"], choose_units(sizes, 31, seed=1)["a"])
    assert not torch.equal(units["a"], choose_units(sizes, 31, seed=2)["a"])
    assert all(len(choose_units(sizes, None)[n]) == size for n, size in sizes.items())
    d = measure_diversity(activations(), max_units=6, max_mi_samples=100, estimator="binned", mi_bins=5)
    assert d.mutual_information.shape == (6, 6)
    assert d.num_samples == 100
    assert len(d.entropy["a"]) == 12
    with pytest.raises(ValueError, match="max_units"):
        choose_units(sizes, 1)
    with pytest.raises(ValueError, match="estimator"):
        measure_diversity(activations(), estimator="k")


def test_summary_is_the_notch_of_a_box_plot():
    x = torch.arange(101).float()
    s = summarize(x)
    assert (s.mean, s.median, s.count) == (50, 50, 101)
    assert s.high - s.median == pytest.approx(1.57 * 50 / math.sqrt(101))
    assert s.median - s.low == pytest.approx(s.high - s.median)
    with pytest.raises(ValueError, match="nothing"):
        summarize(torch.empty(0))


def test_median_interval_covers_the_median_about_as_often_as_it_says():
    hits = sum(s.low <= 0 <= s.high for s in (summarize(torch.randn(60)) for _ in range(300)))
    assert 0.9 < hits / 300 < 0.99


def test_mean_with_and_without_diagonal():
    m = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    assert float(mean_mi(m)) == 2
    assert float(mean_mi(m, diagonal=False)) == 1


def test_mixture_density_integrates_to_one():
    grid, density = mixture_density(torch.randn(3000).abs(), torch.linspace(-3, 8, 2000, dtype=torch.float64))
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="components"):
        mixture_density(torch.zeros(2, 2))


def test_verdict_tells_the_two_kinds_of_memorization_apart():
    plain = measure_diversity(activations(shared=0.5, spread=0.7), bins=20)
    heuristic = measure_diversity(activations(shared=0.9, spread=0.4), bins=20)
    example = measure_diversity(activations(shared=0.0, spread=1.0), bins=20)
    verdicts = compare_runs({"plain": plain, "heuristic": heuristic, "example": example})
    assert verdicts["heuristic"].lean == "heuristic"
    assert verdicts["example"].lean == "example-level"
    assert min(v.confidence for v in verdicts.values()) > 0.99
    estimate, low, high = verdicts["heuristic"].entropy_change
    assert low < estimate < high < 0
    back = compare(heuristic, [plain, plain])
    assert back.lean == "example-level"


def test_verdict_is_unclear_between_equals_and_when_the_measures_disagree():
    one, two = (measure_diversity(activations(shared=0.5), bins=20) for _ in range(2))
    assert compare(one, two).confidence < 0.95
    both_up = measure_diversity(activations(shared=0.9, spread=1.0), bins=20)
    both_down = measure_diversity(activations(shared=0.0, spread=0.4), bins=20)
    assert compare(both_down, both_up).lean == "unclear"
    with pytest.raises(ValueError, match="at least two"):
        compare_runs({"a": one})
    with pytest.raises(ValueError, match="no run 'c'"):
        compare_runs({"a": one, "b": two}, reference="c")


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 36, 5), nn.ReLU(), nn.Linear(5, 2)
    )


def test_collect_reads_several_sites_in_one_pass():
    model = net().train()
    x = torch.randn(50, 1, 8, 8)
    batches = [Batch(part, torch.zeros(len(part)).long()) for part in x.split(16)]
    got = collect_activations(model, batches, ["0", "3", "4", "5:input"])
    assert {name: tuple(v.shape) for name, v in got.items()} == {
        "0": (50, 4), "3": (50, 5), "4": (50, 5), "5:input": (50, 5)
    }  # fmt: skip
    before = model[0](x)
    assert torch.allclose(got["0"], before.mean((2, 3)))
    assert torch.allclose(got["3"].relu(), got["4"])
    assert torch.equal(got["4"], got["5:input"])
    assert model.training
    top = collect_activations(model, x.split(16), "0", reduce="max")["0"]
    assert torch.allclose(top, before.amax((2, 3)))
    everywhere = collect_activations(model, x.split(16), "0", reduce="positions", max_samples=None)["0"]
    assert torch.allclose(everywhere, before.flatten(2).mT.flatten(0, 1))


def test_collect_keeps_the_same_examples_of_every_site_and_bounds_them():
    model, x = net(), torch.randn(60, 1, 8, 8)
    few = collect_activations(model, x.split(16), ["3", "4"], max_samples=20)
    again = collect_activations(model, x.split(7), ["3"], max_samples=20)
    assert few["3"].shape == (20, 5)
    assert torch.equal(few["3"].relu(), few["4"])
    assert torch.allclose(few["3"].sort(0).values, again["3"].sort(0).values, atol=1e-6)
    with pytest.raises(ValueError, match="no batches"):
        collect_activations(model, [])


@pytest.mark.parametrize("most", [None, 10])
def test_collect_copies_what_is_kept_seldom(most, monkeypatch):
    copied = 0
    cat = torch.cat

    def count(parts, *args):
        nonlocal copied
        out = cat(parts, *args)
        copied += len(out)
        return out

    monkeypatch.setattr("demem.measures.collect.torch.cat", count)
    rows = collect_activations(nn.Sequential(nn.Linear(2, 3)), torch.randn(400, 2).split(2), "0", max_samples=most)
    assert len(rows["0"]) == (most or 400)
    assert copied < 3000  # of two kinds, and once more by the reader; all of them at every batch would be 80,000


def test_collect_needs_no_logits():
    coder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 3, 2))
    assert collect_activations(coder, [torch.randn(5, 3, 4, 4)], "0")["0"].shape == (5, 4)


def test_plots_draw_what_they_are_given():
    x = activations()
    runs = {"one": measure_diversity(x, bins=20), "two": measure_diversity(activations(shared=0.8), bins=20)}
    _, axes = plot_diversity(runs)
    assert len(axes[1].lines) == 2
    metric = ActivationEntropy(bins=20)
    metric.update(x)
    _, ax = metric.plot()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b"]
    pairs = MutualInformation(bins=5)
    pairs.update(x)
    _, ax = pairs.plot()
    assert len(ax.lines) == 1
    _, same = plot_mutual_information(runs["one"].mutual_information, ax=ax)
    assert same is ax
    assert len(ax.lines) == 2
    _, ax = plot_history({"h": [1.0, 2.0]})
    assert ax.lines[0].get_ydata().tolist() == [1, 2]

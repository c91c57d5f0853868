import itertools
import random

import pytest

from benchmarks import names
from benchmarks.baselines import METHODS
from benchmarks.experiment import HELD_OUT, TASKS
from benchmarks.figures import KINDS, draw_grid, draw_panel, spread_apart, write_pngs
from benchmarks.rows import FEWEST, memorization

KIND = {kind.name: kind for kind in KINDS}
IDENTITY = {"data": "digits", "method": "demem", "tier": "T0", "held_out": "val", "seed": 0}


def _rows(methods, seeds=3, held_out="val", data="digits"):
    generator, rows = random.Random(0), []
    for method, tier in methods:
        for seed in range(seeds):
            worst = generator.random()
            accuracy = {"worst_group_acc": worst, "group_acc": [0.9, worst], "train_group_acc": [1.0, 0.95]}
            averages = {"avg_acc": 0.9, "adjusted_avg_acc": generator.uniform(0.8, 1)}
            identity = {"data": data, "method": method, "tier": tier, "held_out": held_out, "seed": seed}
            rows.append({**identity, **accuracy, **averages, "epochs": 1, "seconds": 1.0})
    return rows


ALL = _rows([(method.name, method.tier) for method in METHODS if "val" in method.held_out])


def _units(touched, **other):
    impacts = {"typical": 0.3, "atypical": -0.2, "typical_after": 0.1, "atypical_after": 0.1}
    return [{**IDENTITY, **other, "unit": i, **impacts, "gated": i < touched} for i in range(5)]


def _texts(figure):
    """What can be read in each panel: pairs of text and its box in pixels."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    found = []
    for axis in figure.axes:
        texts = [*axis.texts, axis.title, axis.xaxis.label, axis.yaxis.label, *axis.get_xticklabels()]
        texts.append(axis._left_title)
        found.append([(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text()])
    return found


def test_everything_of_the_comparison_has_a_name_in_words():
    assert {method.name for method in METHODS} <= names.METHODS.keys()
    assert set(TASKS) <= names.DATA.keys()
    assert {method.tier for method in METHODS} <= names.TIERS.keys()
    assert set(HELD_OUT) == names.HELD_OUT.keys() == names.HELD_OUT_MEANINGS.keys()
    assert names.method_name("strong_decay") == "strong decay"
    assert len(set(names.METHODS.values())) == len(names.METHODS)


@pytest.mark.parametrize("name", ["worst_group", "worst_against_average", "memorization_gap"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_no_words_lie_on_others_or_on_points_or_outside_the_figure(name, seeds):
    rows = [row for row in ALL if row["seed"] < seeds]
    # Some arms have the very same accuracies, as those that share a run.
    rows += [{**row, "held_out": "iid"} | {"worst_group_acc": 0.9, "adjusted_avg_acc": 0.95} for row in rows]
    figure = draw_grid(KIND[name], KIND[name].cells(rows))
    panels = _texts(figure)
    assert len(panels) == 2
    everything = [pair for panel in panels for pair in panel]
    for (one, box), (other, box2) in itertools.combinations(everything, 2):
        assert not box.shrunk(0.98, 0.9).overlaps(box2.shrunk(0.98, 0.9)), (one, other)
    points = [p for axis in figure.axes for c in axis.collections for p in axis.transData.transform(c.get_offsets())]
    for words, box in everything:
        assert not [point for point in points if box.contains(*point)], words
        assert box.x0 >= -1, words
        assert box.x1 <= figure.bbox.x1 + 1, words
        assert box.y0 >= -1, words
        assert box.y1 <= figure.bbox.y1 + 1, words
    assert not [axis for axis in figure.axes if axis.get_legend()]


def test_names_are_written_out_and_tiers_explained_beside_them():
    (panel,) = _texts(draw_panel(KIND["worst_group"], KIND["worst_group"].cells(ALL)[0]))
    words = [text for text, _ in panel]
    methods = {"plain training (ERM)", "class-balanced last-layer retraining (CB-LLR)", "XRM with GroupDRO", "demem"}
    assert methods <= set(words)
    assert not [text for text in words if "_" in text]
    for tier, meaning in names.TIERS.items():
        assert f"{tier}: {meaning}" in words
    of_tier = words.index("T2: " + names.TIERS["T2"])
    dfr = next(i for i, text in enumerate(words) if text == "deep feature reweighting (DFR)")
    assert of_tier < dfr < words.index("T3: " + names.TIERS["T3"])


def test_every_seed_is_a_dot_of_its_own_and_few_have_no_interval():
    def drawn(seeds):
        rows = [row | {"worst_group_acc": 0.7} for row in _rows([("erm", "T0")], seeds)]
        axis = draw_panel(KIND["worst_group"], KIND["worst_group"].cells(rows)[0]).axes[0]
        dots = axis.collections[0].get_offsets().tolist()
        return dots, axis.get_xlabel(), rows

    dots, label, _ = drawn(5)
    assert [x for x, _ in dots] == pytest.approx([70] * 5)
    assert len({y for _, y in dots}) == 5
    assert "95% interval" in label
    assert "2 seeds: no interval" in drawn(2)[1]
    assert FEWEST == 3


def test_held_out_sources_and_data_sets_have_panels_of_their_own():
    methods = [("erm", "T0"), ("demem", "T0")]
    rows = [r for source in ("val", "none") for d in ("digits", "solar") for r in _rows(methods, 2, source, d)]
    cells = KIND["worst_group"].cells(rows)
    assert [cell.title for cell in cells] == [
        "Digits in coloured ink · nothing held out",
        "Digits in coloured ink · held out: the validation set",
        "Solar cells · nothing held out",
        "Solar cells · held out: the validation set",
    ]
    figure = draw_grid(KIND["worst_group"], cells)
    places = [axis.get_subplotspec() for axis in figure.axes]
    assert [(p.rowspan.start, p.colspan.start) for p in places] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_map_only_of_arms_that_touched_units(tmp_path):
    rows = [*_units(2, seed=1), *_units(2, seed=2), *_units(0, tier="T2")]
    assert [cell.title for cell in KIND["unit_map"].cells(rows)] == [
        "Digits in coloured ink · held out: the validation set\ndemem T0, before",
        "Digits in coloured ink · held out: the validation set\ndemem T0, after",
    ]
    sources = {"results": ALL, "diversity": [], "units": rows, "rounds": []}
    written = [path.name for path in write_pngs(tmp_path, sources)]
    assert written == ["worst_group.png", "worst_against_average.png", "memorization_gap.png", "unit_map.png"]
    assert (tmp_path / "unit_map.png").exists()
    # Without one, that of an earlier comparison does not stay behind.
    write_pngs(tmp_path, {**sources, "units": _units(0)})
    assert not (tmp_path / "unit_map.png").exists()


def test_gap_is_of_erms_worst_group_and_leaves_out_what_was_not_measured():
    rows = _rows([("erm", "T0"), ("demem", "T0"), ("dfr", "T2")], 2)
    for row in rows:
        row["group_acc"], row["train_group_acc"] = [0.9, None, 0.5], [1.0, 1.0, 0.75]
    rows[-1]["train_group_acc"] = rows[-2]["train_group_acc"] = [1.0, 1.0, None]
    worst, found = memorization(rows, rows[:2])
    assert worst == 2
    assert found == {("erm", "T0"): (0.75, 0.5), ("demem", "T0"): (0.75, 0.5)}
    with pytest.raises(ValueError, match="no group with a test accuracy"):
        memorization(rows, [])
    cells = KIND["memorization_gap"].cells(_rows([("demem", "T0")]))
    assert cells == []


@pytest.mark.parametrize("seed", range(20))
def test_labels_keep_their_order_their_distance_and_the_limits(seed):
    generator = random.Random(seed)
    heights = sorted((generator.choice([0.0, 10.0, generator.uniform(0, 10)]) for _ in range(seed + 1)), reverse=True)
    moved = spread_apart(heights, 0.6, 0.0, 10.0)
    gap = min(0.6, 10 / max(1, len(heights) - 1))
    assert all(above - below >= gap - 1e-9 for above, below in itertools.pairwise(moved))
    assert min(moved) >= -1e-9
    assert max(moved) <= 10 + 1e-9
    if all(above - below >= gap for above, below in itertools.pairwise(heights)):
        assert moved == pytest.approx(heights)

"""Real runs, and what their reports say."""

import json
import os
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from demem.callbacks import ActivationDiversityMonitor, MemorizationRemover
from demem.cli import main
from demem.groups import is_confirmed, judge
from demem.module import Classifier
from demem.removal import RoundRecord
from demem.report import (
    GroupFacts,
    ReportData,
    ReportOptions,
    UnitFacts,
    average,
    load,
    outcome,
    render,
    save,
    unit_map,
    verdict_words,
    worst,
    write_whole,
)
from demem.run import Split

WORDS = ["", "the", "plot", "acting", "very", "story", "scene", "good", "bad", "paris", "london"]


def _labels(size, agreement, generator):
    y = torch.arange(size) % 2
    return y, torch.where(torch.rand(size, generator=generator) < agreement, y, 1 - y)


def pictures(size, agreement, seed):
    """Stripes that run across or up are the class, the colour the shortcut."""
    generator = torch.Generator().manual_seed(seed)
    y, colour = _labels(size, agreement, generator)
    stripes = (torch.arange(8) % 2 * 2.0 - 1).expand(8, 8)
    sign = torch.randint(0, 2, (size, 1, 1), generator=generator) - 0.5
    x = (torch.stack([stripes, stripes.T])[y] * sign)[:, None] + torch.randn(size, 3, 8, 8, generator=generator)
    x[torch.arange(size), colour] += 1.5
    return TensorDataset(x, y, 2 * y + colour)


def sentences(size, agreement, seed):
    """The fourth word is the class most of the time, the sixth the shortcut."""
    generator = torch.Generator().manual_seed(seed)
    y, city = _labels(size, agreement, generator)
    ids = torch.randint(1, 7, (size, 8), generator=generator)
    ids[:, 3] = 7 + torch.where(torch.rand(size, generator=generator) < 0.9, y, 1 - y)
    ids[:, 5] = 9 + city
    return TensorDataset(ids, y)


def rows(size, agreement, seed):
    generator = torch.Generator().manual_seed(seed)
    y, a = _labels(size, agreement, generator)
    x = torch.randn(size, 6, generator=generator)
    x[:, :2] += torch.stack([2 * y - 1, 6 * a - 3], 1)
    return TensorDataset(x, y)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(11, 8), nn.Linear(64, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(self.embedding(x).flatten(1))))


def conv():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)),
    )


KINDS = {
    "pictures": (pictures, conv, {}),
    "sentences": (
        sentences,
        Reader,
        {"decode": lambda ids: " ".join(WORDS[i] for i in ids.tolist()), "class_names": ["positive", "negative"]},
    ),
    "rows": (
        rows,
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)),
        {"feature_names": ["income", "postcode", "age", "term", "rate", "debts"]},
    ),
}


def fit(folder, make, network, options, epochs=3, callbacks=(), remover=None, loaders=None, **trainer):
    pl.seed_everything(0, verbose=False)
    remover = remover or MemorizationRemover(report=ReportOptions("report.html", **options))
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        enable_model_summary=False,
        callbacks=[*callbacks, remover],
        **settings | trainer,
    )
    if loaders is None:
        loaders = DataLoader(make(600, 0.93, 0), 32, shuffle=True), DataLoader(make(300, 0.5, 1), 64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*|.*number of training batches.*|.*LeafSpec.*")
        trainer.fit(Classifier(network(), optimizer="adam", lr=0.01), *loaders)
    return remover


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """(kind, remover, folder, page) of a run with a report."""
    folder = tmp_path_factory.mktemp(request.param)
    remover = fit(folder, *KINDS[request.param], callbacks=[ActivationDiversityMonitor(max_units=8)])
    return request.param, remover, folder, (folder / "report.html").read_text(encoding="utf-8")


class _Page(HTMLParser):
    """Tags that are not closed in order, and addresses that the page would fetch."""

    VOID = ("meta", "link", "img", "br", "input", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.fetched, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        for name in ("src", "href", "xlink:href"):
            address = values.get(name) or "#"
            if not address.startswith(("#", "data:")):
                self.fetched.append(address)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_page_is_whole_and_needs_nothing_else(run):
    _, _, _, text = run
    page = _Page(text)
    assert not page.wrong
    assert not page.open
    assert not page.fetched
    assert len(page.ids) == len(set(page.ids))
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_examples_are_shown_as_what_they_are(run):
    kind, _, folder, text = run
    data = load(folder / "report.json")
    assert {e.kind for e in data.examples} >= {"typical", "atypical", "memorised", "driver"}
    assert not data.notes
    for example in data.examples:
        content = {"pictures": example.picture, "sentences": example.text, "rows": example.row}[kind]
        assert content
    if kind == "pictures":
        assert text.count("data:image/png;base64,") >= 18
    if kind == "sentences":
        assert all(set(e.text.split()) <= set(WORDS) for e in data.examples)
    if kind == "rows":
        x = rows(600, 0.93, 0).tensors[0]
        for e in (e for e in data.examples if e.split == "train"):
            assert e.row["income"] == f"{float(x[e.position, 0]):.4g}"


def test_what_is_said_of_each_example_is_true(run):
    kind, _, folder, _ = run
    make = KINDS[kind][0]
    sets = {"train": make(600, 0.93, 0).tensors, "held_out": make(300, 0.5, 1).tensors}
    data = load(folder / "report.json")
    for e in data.examples:
        assert e.y == int(sets[e.split][1][e.position])
        assert (e.split == "train") == (e.kind == "memorised")
        if e.kind != "memorised":
            assert (e.score > 0) == (e.predicted == e.y)
        if e.kind == "memorised":
            assert e.predicted == e.y
        if kind == "pictures":
            assert e.group == int(sets[e.split][2][e.position])
    scores = [e.score for e in data.examples if e.kind == "memorised"]
    assert scores == sorted(scores, reverse=True)


def test_averages_are_those_of_the_rounds(run):
    _, remover, folder, _ = run
    found = load(folder / "report.json")
    kept = next(r for r in remover.rounds if r.chosen)
    assert average(found, after=False) == pytest.approx(remover.rounds[0].average)
    assert average(found, after=True) == pytest.approx(kept.average)


def test_accuracies_are_those_of_the_rounds(run):
    _, remover, folder, text = run
    data = load(folder / "report.json")
    assert data.rounds == remover.rounds
    inferred = [g for g in data.groups if not g.truth]
    assert sum(g.held_out for g in inferred) == 300
    assert [g.train for g in inferred] == [size for size in remover.groups.sizes if size]
    assert worst(inferred).held_out_before == pytest.approx(remover.rounds[0].worst)
    kept = next(r for r in remover.rounds if r.chosen)
    assert min(g.held_out_after for g in inferred if g.held_out >= 5) == pytest.approx(kept.worst)
    assert f"{100 * kept.worst:.1f}%" in text


def test_the_shortcut_is_found_and_told(run):
    kind, remover, _, text = run
    assert remover.groups.shortcut
    assert "Shortcut found" in text
    assert ("True groups" in text) == (kind == "pictures")  # only these batches carry them


def test_the_time_is_accounted_for(run):
    _, _, folder, _ = run
    data = load(folder / "report.json")
    assert 0 < data.report_seconds < data.fit_seconds
    assert 0 < data.callback_seconds < data.fit_seconds


def test_the_cure_can_be_undone(run):
    _, _, folder, text = run
    data = load(folder / "report.json")
    assert data.refitted
    assert data.undo == "report.before.pt"
    assert data.undo in text
    before = torch.load(folder / data.undo, weights_only=True)
    changes = {layer.layer: layer.change for layer in data.layers}
    assert {layer for layer, change in changes.items() if change > 0} == {name.rpartition(".")[0] for name in before}
    assert changes[list(changes)[-1]] > 0  # the head was refitted


def test_five_lines_say_what_happened(run):
    _, remover, folder, _ = run
    lines = remover.summary().splitlines()
    assert len(lines) == 5
    assert all(line.startswith("demem: ") for line in lines)
    assert f"{(remover.reporter.options.class_names or ['class 0'])[0]}: " in lines[1]
    kept = next(r for r in remover.rounds if r.chosen)
    assert f"{remover.rounds[0].worst:.1%} → {kept.worst:.1%}" in lines[3]
    assert f"average {remover.rounds[0].average:.1%} → {kept.average:.1%} on held-out data (cross-fitted" in lines[3]
    assert str(folder / "report.html") in lines[4]
    assert repr(remover).startswith("MemorizationRemover(Groups(a shortcut")
    assert str(kept) in repr(remover)


def test_the_report_can_be_rendered_again(run, capsys):
    _, _, folder, text = run
    before = (folder / "report.html").read_text(encoding="utf-8")
    main(["report", str(folder)])
    assert "report.html" in capsys.readouterr().out
    assert (folder / "report.html").read_text(encoding="utf-8") == before == text
    names = ["--class-names", "yes, no", "--title", "Told <again>", "--attribute-names", "with it,against it"]
    main(["report", str(folder / "report.json"), "--out", str(folder / "named.html"), *names])
    named = (folder / "named.html").read_text(encoding="utf-8")
    assert "<h1>Told &lt;again&gt;</h1>" in named
    assert "no · with it" in named


def test_of_several_reports_the_latest_is_named(tmp_path, capsys):
    for age, name in enumerate(("newest", "old", "older")):
        path = save(ReportData(name, "today", None), tmp_path / name / "report.json")
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    main(["report", str(tmp_path / "old")])
    assert capsys.readouterr().out == f"demem: the report is in {tmp_path / 'old' / 'report.html'}\n"
    main(["report", str(tmp_path)])
    (line,) = capsys.readouterr().out.splitlines()
    assert f"made from {tmp_path / 'newest' / 'report.json'}, the latest of 3 in {tmp_path} and below" in line
    assert "newest" in (tmp_path / "newest" / "report.html").read_text(encoding="utf-8")


def test_true_groups_without_names_are_called_so(run):
    kind, _, folder, text = run
    assert (len(re.findall(r"true group \d", text)) > 8) == (kind == "pictures")
    assert not re.search(r"true:? (</span> )?true", text)
    data = load(folder / "report.json")
    named = render(replace(data, group_names=["land on land", "land on water", "water on land", "water on water"]))
    assert not re.search(r"true group \d", named)
    assert ('<span class="soft">true</span> ' in named) == (kind == "pictures")
    assert ("<td>true: land on land</td>" in named) == (kind == "pictures")


def test_a_folder_without_a_report_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_data_of_another_kind_are_refused(tmp_path):
    for content in ("{}", "no JSON", "[1]", json.dumps({"version": 99})):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(ValueError, match=r"report\.json does not hold the data of a report"):
            load(tmp_path / "report.json")


def test_a_report_changes_nothing_in_the_run(tmp_path):
    plain = fit(tmp_path, *KINDS["rows"], remover=MemorizationRemover())
    random = torch.get_rng_state()
    told = fit(tmp_path, *KINDS["rows"])
    assert torch.equal(random, torch.get_rng_state())
    assert told.rounds == plain.rounds


def _broken(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "place",
    [
        "demem.callbacks.reporting.write_whole",
        "demem.callbacks.reporting.save",
        "demem.callbacks.reporting.observe_after",
    ],
)
def test_a_full_disk_costs_no_run(tmp_path, monkeypatch, place):
    monkeypatch.setattr(place, _broken)
    with pytest.warns(UserWarning, match="could not write its report, because OSError.*No space left"):
        remover = fit(tmp_path, *KINDS["rows"])
    assert next(r for r in remover.rounds if r.chosen).refitted
    assert remover.summary().splitlines()[4].startswith("demem: report   none")


def test_what_cannot_be_observed_leaves_the_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr("demem.callbacks.reporting.observe_before", _broken)
    with pytest.warns(UserWarning, match="could not write its report"):
        fit(tmp_path, *KINDS["rows"])
    data = load(tmp_path / "report.json")
    assert data.verdict.shortcut
    assert not data.units
    assert "Shortcut found" in (tmp_path / "report.html").read_text()


def test_a_failed_cure_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("demem.callbacks.remover.remove_and_refit", _broken)
    with pytest.warns(UserWarning, match="leaves the network as it was trained"):
        fit(tmp_path, *KINDS["rows"])
    assert "The cure failed" in (tmp_path / "report.html").read_text()


def test_an_example_that_cannot_be_shown_leaves_a_note(tmp_path):
    def decode(x):
        raise RuntimeError("no such word")

    fit(tmp_path, *KINDS["rows"][:2], {"decode": decode})
    data = load(tmp_path / "report.json")
    assert any("RuntimeError: no such word" in note for note in data.notes)
    assert "no such word" in (tmp_path / "report.html").read_text()


def test_show_comes_before_the_inputs(tmp_path):
    fit(tmp_path, *KINDS["rows"][:2], {"show": lambda split, position: f"{split} {position}" if position % 2 else None})
    for e in load(tmp_path / "report.json").examples:
        assert e.text == f"{e.split} {e.position}" if e.position % 2 else e.row


def test_a_place_where_nothing_can_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="MemorizationRemover: The report cannot be written to"):
        fit(tmp_path, *KINDS["rows"], remover=MemorizationRemover(report=tmp_path / "taken" / "report.html"))
    remover = fit(tmp_path, *KINDS["rows"], remover=MemorizationRemover(report=tmp_path / "new" / "report.html"))
    assert remover.reporter.path.is_file()


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_whole(path, "as it was")
    monkeypatch.setattr("demem.report.files.os.replace", _broken)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "half")
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def test_a_stream_has_a_report_without_its_examples(tmp_path):
    loaders = DataLoader(Stream(rows(600, 0.93, 0)), 32), DataLoader(rows(300, 0.5, 1), 64)
    remover = MemorizationRemover(rebalance=False, report="report.html")
    fit(tmp_path, *KINDS["rows"], remover=remover, loaders=loaders)
    data = load(tmp_path / "report.json")
    assert any("are a stream" in note for note in data.notes)
    assert all(e.row for e in data.examples if e.split == "held_out")
    assert len(data.groups) == 4


def test_what_is_kept_back_is_shown_from_the_training_set(tmp_path):
    x = pictures(600, 0.93, 0)
    shown = []
    remover = MemorizationRemover(report=ReportOptions(show=lambda split, position: shown.append((split, position))))
    fit(tmp_path, *KINDS["pictures"], remover=remover, loaders=(DataLoader(x, 32, shuffle=True),))
    data = load(tmp_path / "report.json")
    assert data.verdict.shortcut
    assert {split for split, _ in shown} == {"train"}
    held_out = {e.position for e in data.examples if e.split == "held_out"}
    assert held_out
    assert not held_out & {e.position for e in data.examples if e.split == "train"}
    assert all(e.y == int(x.tensors[1][e.position]) for e in data.examples)


def test_without_a_shortcut_and_validation_data_the_verdict_is_left(tmp_path):
    loaders = (DataLoader(rows(600, 0.5, 0), 32, shuffle=True),)
    remover = MemorizationRemover(report="report.html")
    fit(tmp_path, *KINDS["rows"], remover=remover, loaders=loaders)
    assert not remover.groups.shortcut
    assert "nan" not in remover.summary()
    text = (tmp_path / "report.html").read_text()
    assert "The network as trained was not read" in text
    assert "nan" not in text


def test_known_groups_are_called_given(tmp_path):
    remover = MemorizationRemover(use_groups=True, report=str(tmp_path / "own" / "told.html"))
    fit(tmp_path, *KINDS["pictures"], remover=remover)
    text = (tmp_path / "own" / "told.html").read_text()
    assert "Groups were given" in text
    assert "Worst given group" in text


class Look(MemorizationRemover):
    def choose(self, rounds, held_out, groups):
        return 0


def test_a_network_that_stays_as_trained_has_nothing_to_undo(tmp_path):
    fit(tmp_path, *KINDS["rows"], remover=Look(rebalance=False, report="report.html"))
    text = (tmp_path / "report.html").read_text()
    assert "There is nothing to undo" in text
    assert not (tmp_path / "report.before.pt").exists()
    data = load(tmp_path / "report.json")
    assert not data.refitted
    assert all(g.held_out_after == g.held_out_before for g in data.groups)
    assert data.layers == []


def test_a_mask_is_drawn_and_counted(tmp_path):
    class Masks(MemorizationRemover):
        def choose(self, rounds, held_out, groups):
            return len(rounds) - 1

    fit(tmp_path, *KINDS["rows"], remover=Masks(shares=(0.25,), report="report.html"))
    data, text = load(tmp_path / "report.json"), (tmp_path / "report.html").read_text()
    assert [u.touched for u in data.units].count(True) == data.touched[0].units == 2
    assert data.touched[0].total == 8
    assert "masked: 2" in text
    assert "2 of the 8 units that the head reads (25%) were masked" in text


def test_without_a_report_nothing_is_read_or_written(tmp_path, monkeypatch):
    read = []
    original = Split.read
    monkeypatch.setattr(Split, "read", lambda self, *a, **k: read.append(a) or original(self, *a, **k))
    fit(tmp_path, *KINDS["rows"], remover=MemorizationRemover())
    without, before = len(read), list(tmp_path.glob("**/report*"))
    fit(tmp_path, *KINDS["rows"], remover=MemorizationRemover(report="report.html"))
    assert len(read) - without == without + 3
    assert not before


def test_the_sentence_of_a_confirmed_shortcut_is_the_judges():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(1000) % 2
    sign = 2.0 * y - 1
    attribute = torch.where(torch.rand(1000, generator=generator) < 0.05, -sign, sign)
    early, deep = 3 * attribute + torch.rand(1000, generator=generator), 2 * sign
    deep = deep + torch.randn(1000, generator=generator)
    verdict = judge(torch.stack([-early, early], 1), torch.stack([-deep, deep], 1), y)
    assert verdict.kind == "shortcut"
    assert is_confirmed(verdict.why)


def test_each_verdict_has_its_words(run):
    _, _, folder, _ = run
    data = load(folder / "report.json")
    said = set()
    for kind in ("shortcut", "label noise", "hard examples", "nothing", "undecided"):
        verdict = replace(data.verdict, kind=kind, shortcut=kind == "shortcut")
        words = verdict_words(verdict)
        page = render(replace(data, verdict=verdict))
        assert words.headline in page
        assert words.meaning in page
        said.add(words.headline)
    assert len(said) == 5


def test_names_with_markup_are_harmless(run, tmp_path):
    _, _, folder, _ = run
    evil = "<script>alert(1)</script>"
    data = replace(load(folder / "report.json"), class_names=[evil, "b"], title=evil, notes=[evil], network=evil)
    again = render(load(save(data, tmp_path / "report.json")))
    assert evil not in again
    assert "&lt;script&gt;alert(1)" in again


def _two_groups(worst, average):
    """Data of a run whose worst group and average change by so many points."""
    sizes, before = (90, 10), (0.9, 0.4)
    after = ((average / 100 - 0.1 * worst / 100) / 0.9 + before[0], before[1] + worst / 100)
    groups = [
        GroupFacts(False, i, 0, i, i == 1, 100, size, 1.0, b, 1.0, a, 1.0)
        for i, (size, b, a) in enumerate(zip(sizes, before, after, strict=True))
    ]
    rounds = [RoundRecord(False, 0.0, before[1], False), RoundRecord(True, 0.0, after[1], True)]
    return ReportData("Net", "today", None, rounds=rounds, groups=groups)


@pytest.mark.parametrize(
    ("worst_change", "average_change", "marked", "warned"),
    [(30, 5, False, False), (30, -1, False, False), (30, -5, True, False), (30, -20, True, True)],
)
def test_what_a_cure_costs_on_average_is_said_beside_its_gain(worst_change, average_change, marked, warned):
    data = _two_groups(worst_change, average_change)
    page = render(data)
    said = f"gained {average_change}" if average_change > 0 else f"lost {-average_change}"
    assert (
        f"The worst group gained {worst_change}.0 points, and the average over the held-out examples {said}.0." in page
    )
    assert ("That is a high price" in page) is warned
    tile = re.search(r'<div class="label">Average, held out</div>\s*<div class="value( wrong)?">(.*?)</div>', page)
    assert bool(tile.group(1)) is marked
    assert re.sub("<.*?>", "", tile.group(2)) == f"85.0% → {85 + average_change}.0%"


def test_a_network_as_trained_has_an_average_and_no_outcome():
    data = _two_groups(30, 5)
    data = replace(data, rounds=[replace(data.rounds[0], chosen=True)])
    assert outcome(data) == ""
    assert "Average, held out" in render(data)
    assert average(replace(data, groups=[]), after=False) is None


def test_numbers_of_units_that_lie_close_do_not_cover_each_other():
    units = [UnitFacts("fc", 100 + i, 0.5 + 0.001 * i, -0.3, False, [0]) for i in range(4)]
    units += [UnitFacts("fc", i, 0.1 * i, 0.2, False) for i in range(5)]
    figure = unit_map(units)
    figure.canvas.draw()
    boxes = [t.get_window_extent() for t in figure.axes[0].texts if t.get_text().isdigit()]
    assert len(boxes) == 4
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])

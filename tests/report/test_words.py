"""The lines at the end of a fit say what they mean."""

import pytest
import torch

from demem.groups import Groups
from demem.removal import RoundRecord
from demem.report import GroupFacts, ReportData, VerdictFacts, actions, outcome, render, summarise
from demem.run import describe_rounds

Y = torch.arange(40) % 2
MINORITY = torch.arange(40) < 6


def _groups(
    shortcut=True, known=False, why="the probe is sure of its mistakes (17 mistakes; z = 8.4 for their labels)"
):
    index = 2 * Y + torch.where(MINORITY & (shortcut or known), 1 - Y, Y)
    kind = "shortcut" if shortcut else "hard examples"
    return Groups(index, index, Y, Y, 2, "layer1", 0.05, 0.9, shortcut, known, kind=kind, why=why)


def _rounds(worst=(0.4, 0.8), average=(0.9, 0.9), chosen=1, **options):
    return [
        RoundRecord(i > 0, 0.0, worst[i], i == chosen, average=average[i], **(options if i == chosen else {}))
        for i in range(2)
    ]


WORDS = [(True, False, "inferred group"), (False, False, "class"), (False, True, "given group")]


@pytest.mark.parametrize(("shortcut", "known", "word"), WORDS)
@pytest.mark.parametrize("chosen", [0, 1])
def test_groups_that_are_the_classes_are_called_so(shortcut, known, word, chosen):
    groups, rounds = _groups(shortcut, known), _rounds(chosen=chosen)
    said = summarise(groups, rounds, 0, True).splitlines()[3]
    assert f"worst {word} 40.0%" in said
    line = describe_rounds(groups, rounds, 0)
    assert (f"accuracy on the worst {word}: 0.40 → 0.80" in line) == (chosen == 1)


@pytest.mark.parametrize(("shortcut", "known", "word"), WORDS)
def test_the_report_calls_them_the_same(shortcut, known, word):
    verdict = VerdictFacts("shortcut" if shortcut else "nothing", "", "layer1", 0.05, 0.9, 0, known, shortcut, 2)
    groups = [GroupFacts(False, 3 * y, y, y, False, 90, 50, 1.0, 0.9, 1.0, 0.95, 1.0) for y in (0, 1)]
    data = ReportData("Net", "today", verdict, rounds=_rounds(), groups=groups)
    page = render(data)
    assert f"Worst {word}</div>" in page
    assert f"<td>worst {word}</td>" in page
    plural = "classes" if word == "class" else f"{word}s"
    assert f"all {plural} in equal numbers" in " ".join(actions(data))
    assert outcome(data).startswith(f"The worst {word} gained 40.0 points")
    others = {"inferred group", "class", "given group"} - {word}
    assert not any(f"orst {other}" in page for other in others)
    assert ("<td>class 0</td>" in page) == (word == "class")  # and not "inferred: class 0"


def test_the_terminal_has_words_and_the_details_have_the_figures():
    groups = _groups(why="the probe is sure of its mistakes and a second look sides with the labels (17; z = 8.4)")
    said = summarise(groups, _rounds(), 0, True)
    assert "the probe is sure of its mistakes and a second look sides with the labels\n" in said
    assert "z =" not in said
    verdict = VerdictFacts("shortcut", groups.why, "layer1", 0.05, 0.9, 0, False, True, 2)
    box, _, details = render(ReportData("Net", "today", verdict)).partition("<details>")
    assert "The probe is sure of its mistakes" in box or "does not confirm it: the probe is sure of its mistakes" in box
    assert "z =" not in box
    assert "z = 8.4" in details


def test_a_shortcut_that_is_not_confirmed_is_told_without_contradiction():
    few = "the probe makes few mistakes and is sure of many"
    groups = _groups(why=f"{few}; the probe is unsure of its mistakes (9 mistakes)")
    line = summarise(groups, _rounds(), 0, True).splitlines()[0]
    assert line.endswith(f"Shortcut found (likely): {few}; a second look does not confirm it")


@pytest.mark.parametrize("known", [False, True])
def test_sizes_of_groups_have_names(known):
    line = summarise(_groups(known=known), _rounds(), 0, True).splitlines()[1]
    whose = "given" if known else "inferred"
    assert f"class 0: 17 typical and 3 atypical, class 1: 17 typical and 3 atypical ({whose} groups of" in line


def test_classes_have_their_names_in_the_terminal_as_in_the_report():
    named, too_few = (
        summarise(_groups(), _rounds(), 0, True, class_names=names).splitlines()[1]
        for names in (["cat", "dog"], ["cat"])
    )
    assert "cat: 17 typical and 3 atypical, dog: 17 typical and 3 atypical (" in named
    assert "cat: 17 typical and 3 atypical, class 1: 17 typical and 3 atypical (" in too_few


def test_sizes_of_many_classes_are_summed():
    y = torch.arange(60) % 6
    index = 6 * y + torch.where(torch.arange(60) < 6, (y + 1) % 6, y)
    groups = Groups(index, index, y, y, 6, "layer1", 0.05, 0.9, True, kind="shortcut")
    assert "6 classes: 54 typical and 6 atypical (" in summarise(groups, [], 0, True)


def _done_and_result(rounds, groups=None):
    return summarise(groups or _groups(), rounds, 0, True).splitlines()[2:4]


def test_it_is_said_why_the_network_stays_as_it_was_trained():
    rounds, why = _rounds(chosen=0, why="a refit would cost more"), "stays as it was trained: a refit would cost more"
    assert _done_and_result(rounds)[0].endswith(why)
    assert describe_rounds(_groups(), rounds, 0).endswith(f"{why}.")
    data = ReportData("Net", "today", None, rounds=rounds)
    assert actions(data)[-1].endswith(f"{why}.")
    assert _done_and_result([])[0].endswith("it has not been refitted, or that failed with a warning")
    assert _done_and_result(_rounds(chosen=0))[0].endswith("stays as it was trained")  # an older checkpoint


@pytest.mark.parametrize(
    ("worst", "average", "falls"),
    [
        ((0.4, 0.8), (0.9, 0.89), "the average falls"),
        ((0.8, 0.7), (0.9, 0.9), "the worst inferred group falls"),
        ((0.8, 0.7), (0.9, 0.8), "the worst inferred group and the average fall"),
        ((0.4, 0.8), (0.9, 0.89999), None),  # not to be seen
        ((0.4, 0.4), (0.9, 0.9), None),
        ((0.4, 0.4), (None, None), None),
    ],
)
def test_it_is_said_why_a_refit_is_kept_although_a_number_falls(worst, average, falls):
    rounds = _rounds(worst, average, why="it gains more")
    lines = _done_and_result(rounds)[0], describe_rounds(_groups(), rounds, 0)
    for line in lines:
        assert ("although" in line) == (falls is not None)
        assert falls is None or f"; this is kept although {falls}: it gains more" in line


@pytest.mark.parametrize(("after", "said"), [(0.87, "; it costs 3.0 points of the average"), (0.89, ""), (0.95, "")])
def test_what_a_cure_costs_on_average_is_said_in_the_terminal(after, said):
    line = _done_and_result(_rounds(average=(0.9, after)))[1]
    assert f"average 90.0% → {after:.1%}" in line
    assert line.endswith(f"as it was trained){said}") or line.endswith(f"balanced groups){said}")

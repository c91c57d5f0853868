import base64
import shutil

import pytest

from benchmarks.__main__ import main
from benchmarks.page import short
from benchmarks.results import append_jsonl
from tests.benchmarks.test_figures import _rows, _units

METHODS = [("erm", "T0"), ("demem", "T0"), ("cb_llr", "T0"), ("dfr", "T2")]


def _panel(differences, erm=0.6):
    rows = _rows(METHODS, len(differences))
    for row in rows:
        base = erm + 0.01 * row["seed"]
        row["worst_group_acc"] = base + (differences[row["seed"]] if row["method"] == "demem" else 0)
    return rows


@pytest.mark.parametrize(
    ("differences", "kind", "words"),
    [
        ([0.1, 0.12, 0.11, 0.1, 0.12], "gain", "better than ERM: worst group +11.0 points, average +0.0 (95% interval"),
        ([-0.1, -0.12, -0.11, -0.1, -0.12], "loss", "worse than ERM: worst group -11.0 points"),
        ([-0.1, 0.12, -0.11, 0.1, 0.0], "open", "no clear difference from ERM"),
        ([0.1, 0.12], "open", "worst group +11.0 points, average +0.0; 2 seeds only, which does not hold yet"),
        ([0.0] * 5, "open", "no difference between any two seeds"),
    ],
)
def test_verdict_on_a_panel(differences, kind, words):
    found = short(_panel(differences))
    assert found["kind"] == kind
    assert words in found["words"]
    assert found["best"][0] == "class-balanced last-layer retraining (CB-LLR)"
    assert found["best_labelled"][0] == "deep feature reweighting (DFR) T2"


def test_verdict_without_ours_or_erm():
    assert short(_rows([("cb_llr", "T0")]))["words"] == "There are no rows of demem without group labels."
    assert short(_rows([("demem", "T0")]))["words"] == "There are no rows of ERM without group labels."


@pytest.fixture
def page(tmp_path):
    """The page of a comparison with everything that it can show, by the command that a user calls."""
    for source in ("none", "val"):
        for row in _rows([*METHODS, ("<script>alert(1)</script>", "T0")], 3, source):
            append_jsonl(tmp_path / "results.jsonl", row)
    for row in _units(2):
        append_jsonl(tmp_path / "units.jsonl", row)
    for epoch in range(3):
        identity = {"data": "digits", "method": "demem", "tier": "T0", "held_out": "val", "seed": 0}
        diversity = {"epoch": epoch, "entropy": 2.0 + epoch, "mutual_information": 0.1}
        append_jsonl(tmp_path / "diversity.jsonl", {**identity, **diversity})
        noted = {"refitted": True, "share": epoch / 3, "worst": 0.5, "test_worst": 0.4, "chosen": epoch == 1}
        append_jsonl(tmp_path / "rounds.jsonl", {**identity, **noted})
    assert main(["table", str(tmp_path / "results.jsonl"), "--out", str(tmp_path / "out")]) == 0
    return tmp_path / "out" / "index.html"


def test_page_needs_no_network_and_says_what_to_look_at(page):
    text = page.read_text(encoding="utf-8")
    for address in ("http://", "https://", "src="):
        assert address not in text.replace("http://www.w3.org", ""), address
    for words in ("What to look at", "T2", "group labels of the held-out data, inside the method", "nothing held out"):
        assert words in text
    assert "<script>alert" not in text
    for heading in ("Memorization gap", "Diversity of activations", "Units that were touched", "Masking in rounds"):
        assert heading in text


def test_page_says_why_there_is_no_map_of_units(tmp_path):
    append_jsonl(tmp_path / "results.jsonl", _rows([("erm", "T0")], 1)[0])
    for row in _units(0):
        append_jsonl(tmp_path / "units.jsonl", row)
    assert main(["table", str(tmp_path / "results.jsonl"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "index.html").read_text()
    assert "No unit was touched in the recorded runs" in text
    assert "Units that were touched" not in text


@pytest.fixture
def browser(tmp_path):
    pytest.importorskip("selenium", reason="selenium is not installed")
    found = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if found is None or driver is None:
        pytest.skip("no Chromium with its driver: apt-get install -y chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = found
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in (*flags.split(), "disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.mark.slow
def test_page_in_a_browser(page, browser):
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    run = browser.execute_script
    sizes = run("return [...document.querySelectorAll('figure svg')].map(s => [s.clientWidth, s.clientHeight])")
    assert len(sizes) == 2 * 3 + 2 + 2 + 1
    assert min(min(size) for size in sizes) > 100
    ids = run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))

    # A click on a head sorts by it as numbers, another one turns the order round, and empty cells come last.
    read = """const table = document.querySelectorAll('table.sortable')[0];
        return [...table.tBodies[0].rows].map(row => row.cells[%d].textContent)"""
    click = "document.querySelectorAll('table.sortable th button')[%d].click()"
    run("document.querySelector('details').open = true")
    run(click % 2)
    worst = [float(text.split()[0]) for text in run(read % 2)]
    assert worst == sorted(worst)
    run(click % 2)
    assert [float(text.split()[0]) for text in run(read % 2)] == worst[::-1]
    run(click % 3)  # − ERM, which ERM has not
    assert run(read % 3)[-1] == ""
    sorted_by = run("return [...document.querySelectorAll('table.sortable th[aria-sort]')].map(h => h.textContent)")
    assert sorted_by == ["− ERM"]

    # Nothing is wider than a telephone; dark is dark.
    narrow = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", narrow)
    assert run("return document.documentElement.scrollWidth") <= 390
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    colour = run("return getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")
    assert max(map(int, colour)) < 60
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 20_000
    assert browser.get_log("browser") == []

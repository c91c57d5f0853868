"""The report in a real headless browser, where one is installed."""

import base64
import os
import shutil
from pathlib import Path

import pytest
from test_report import KINDS, fit

from demem.callbacks import ActivationDiversityMonitor

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if BROWSER is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver on this machine: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    fit(folder, *KINDS["pictures"], callbacks=[ActivationDiversityMonitor(max_units=8)])
    return (folder / "report.html").as_uri()


@pytest.fixture
def page(browser, address):
    _resize(browser, 1200, "light")
    browser.get(address)
    return browser


def _resize(browser, width, scheme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_it_loads_without_an_error_and_fetches_nothing(page):
    assert page.get_log("browser") == []
    fetched = page.execute_script("return performance.getEntriesByType('resource').map(r => r.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []


def test_pictures_and_figures_are_there(page):
    sizes = page.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(sizes) >= 18
    assert all(complete and natural == 8 and shown >= 50 for complete, natural, shown in sizes)
    boxes = page.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(boxes) == 2  # the unit map and diversity
    assert all(height > 100 for height in boxes)
    words = page.execute_script("return document.querySelector('#units svg').textContent")
    for quadrant in ("helps everybody", "helps the atypical only", "hurts everybody", "holds the shortcut"):
        assert quadrant in words


def _column(page, table, column):
    script = (
        "return [...document.querySelector(arguments[0]).tBodies[0].rows].map(r => r.cells[arguments[1]].textContent)"
    )
    return page.execute_script(script, table, column)


def _click(page, table, column):
    page.execute_script("document.querySelectorAll(arguments[0] + ' th button')[arguments[1]].click()", table, column)


def test_tables_sort(page):
    before = _column(page, "#all", 3)
    _click(page, "#all", 3)
    ascending = _column(page, "#all", 3)
    numbers = [float(v) for v in ascending if v]
    assert numbers == sorted(numbers)
    assert ascending[len(numbers) :] == [""] * (len(ascending) - len(numbers))  # what was not measured comes last
    assert sorted(ascending) == sorted(before)
    _click(page, "#all", 3)
    assert [float(v) for v in _column(page, "#all", 3) if v] == numbers[::-1]
    _click(page, "#all", 0)
    names = _column(page, "#all", 0)
    assert names == sorted(names, key=str.casefold)
    assert page.execute_script("return document.querySelectorAll('#all th[aria-sort]').length") == 1


@pytest.mark.parametrize("width", [1200, 390, 320])
def test_nothing_is_wider_than_the_screen(page, width):
    _resize(page, width, "light")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_in_light_and_dark(page, scheme):
    _resize(page, 1200, scheme)
    pairs = page.execute_script("""
        const all = 'p, li, td, h1, h2, h3, .chip, .right, .wrong, .count, .about, svg text';
        return [...document.querySelectorAll(all)].map(element => {
                let back = element;
                while (back && ['rgba(0, 0, 0, 0)', 'transparent'].includes(getComputedStyle(back).backgroundColor))
                    back = back.parentElement;
                const style = getComputedStyle(element), svg = element instanceof SVGElement;
                return [svg ? style.fill : style.color, getComputedStyle(back).backgroundColor, element.textContent];
            })""")
    assert len(pairs) > 100
    for front, back, words in pairs:
        assert _contrast(front, back) >= 4.5, (front, back, words)
    page_colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (_luminance(page_colour) < 0.1) == (scheme == "dark")


def _luminance(colour):
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2)."""
    parts = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one, other):
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_it_prints(page):
    printed = base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF-")
    assert len(printed) > 20_000
    folder = os.environ.get("DEMEM_SCREENSHOTS")  # to look at
    if folder:
        Path(folder, "report.pdf").write_bytes(printed)

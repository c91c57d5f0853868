"""``python -m benchmarks speed scale``: time and peak memory against rows, units, classes and groups.

Synthetic features; nothing is read or trained.  Each point is measured once, with the growth of the process's resident
memory while it runs (Linux; elsewhere none is given).  A line of ``scale.jsonl`` for each point: part, axis, rows,
units, classes, s, cpu_s, mib.  Printed at the end, and drawn into ``scale.png``: for each curve the exponent of a power
law through its larger half, for CPU seconds and for memory; 1 is linear.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.options import Parser
from benchmarks.results import append_jsonl
from demem.groups import closer_look, find_shortcut
from demem.linear import LinearHead, few_of_each_group
from demem.measures import Reservoir
from demem.removal import Examples, remove_in_rounds

Point = tuple[int, int, int]  # rows, units, classes (or groups)
BASE = 64  # units of the factors that features are made of


def main(argv: list[str]) -> int:
    parser = Parser("speed scale", __doc__)
    parser.add_argument("--out", type=Path, default=Path("results/speed"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    console, rows = Console(width=110), []
    for part in options.only:
        prepare, axes = PARTS[part]
        for axis, points in axes.items():
            for point in points:
                size: Point = tuple(max(8, n // 100) for n in point) if options.quick else point  # type: ignore[assignment]
                row = {"part": part, "axis": axis, **dict(zip(("rows", "units", "classes"), size, strict=True))}
                row |= measure(prepare(*size)) | {"threads": options.threads}
                append_jsonl(options.out / "scale.jsonl", row)
                rows.append(row)
                console.print(row)
    console.print(table(rows))
    console.print(f"curves: {draw(rows, options.out / 'scale.png')}")
    return 0


def measure(task: Callable[[], Any]) -> dict[str, float | None]:
    """Seconds, CPU seconds and growth of the resident memory (MiB) of a task."""
    before = _memory("VmRSS", reset=True)
    start = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no units are masked
        task()
    spent = time.perf_counter() - start[0], time.process_time() - start[1]
    after = _memory("VmHWM")
    grown = None if before is None or after is None else round(max(0.0, after - before), 1)
    return {"s": round(spent[0], 4), "cpu_s": round(spent[1], 4), "mib": grown}


def _memory(field: str, reset: bool = False) -> float | None:
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), None)


def features(rows: int, units: int, classes: int) -> tuple[Tensor, Tensor]:
    """Correlated non-negative features ``(S, N)`` and classes, a tenth of them wrong."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(rows) % classes
    centre, mix = torch.randn(classes, BASE, generator=g), torch.randn(BASE, units, generator=g)
    x = torch.empty(rows, units)
    for part in torch.arange(rows).split(4096):
        hidden = centre[y[part]] + 2 * torch.randn(len(part), BASE, generator=g)
        x[part] = (hidden @ mix + 2 * torch.randn(len(part), units, generator=g)).relu_()
    wrong = torch.rand(rows, generator=g) < 0.1
    wrong[: 4 * classes] = False  # every class keeps some
    return x, torch.where(wrong, torch.randint(classes, (rows,), generator=g), y)


def refit(rows: int, units: int, classes: int) -> Callable[[], Any]:
    """All rounds of the remover; as many held-out examples as ``rows``, at most 20,000 training ones."""
    x, y = features(rows, units, classes)
    held_out, some = Examples(x, y, y), slice(0, 20_000)
    train = Examples(x[some], y[some], y[some])
    head = LinearHead(torch.zeros(classes, units), torch.zeros(classes))
    return lambda: remove_in_rounds(train, held_out, head, num_classes=classes)


def detection(rows: int, units: int, classes: int) -> Callable[[], Any]:
    """The probe of one layer on all rows, and the closer look at 2,000 of them."""
    x, y = features(rows, units, classes)

    def task() -> None:
        probe = find_shortcut({"layer": x}, y, classes)
        some = slice(0, 2_000)
        closer_look(probe.logits[some], [x[some]], y[some], classes)

    return task


def reservoir(rows: int, units: int, classes: int) -> Callable[[], Any]:
    """The diversity monitor's sample of 1,000 rows, from batches of 64 (``classes`` is not used)."""
    batch = torch.randn(64, units)
    sample = Reservoir(1_000)

    def task() -> None:
        for positions in torch.arange(rows).split(64):
            sample.add(positions, batch[: len(positions)])

    return task


def drawing(rows: int, units: int, classes: int) -> Callable[[], Any]:
    """A few of each group (``classes`` is their number; ``units`` is not used)."""
    group = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(0))
    return lambda: few_of_each_group(group, 500, torch.Generator().manual_seed(0))


PARTS: dict[str, tuple[Callable[[int, int, int], Callable[[], Any]], dict[str, list[Point]]]] = {
    "refit": (
        refit,
        {
            "rows": [(n, 512, 2) for n in (3_125, 12_500, 50_000)],
            "units": [(5_000, n, 2) for n in (512, 1_024, 2_048)],
            "classes": [(10_000, 512, n) for n in (10, 100, 1_000)],
            "largest": [(50_000, 2_048, 1_000)],
        },
    ),
    "detection": (
        detection,
        {
            "rows": [(n, 512, 2) for n in (2_500, 10_000, 40_000)],
            "units": [(5_000, n, 2) for n in (512, 1_024, 2_048)],
            "classes": [(5_000, 128, n) for n in (10, 100, 1_000)],
        },
    ),
    "reservoir": (
        reservoir,
        {
            "rows": [(n, 512, 1) for n in (80_000, 320_000, 1_300_000)],
            "units": [(20_000, n, 1) for n in (4_096, 16_384, 65_536)],
        },
    ),
    "drawing": (
        drawing,
        {
            "rows": [(n, 1, 10_000) for n in (80_000, 320_000, 1_300_000)],
            "groups": [(1_300_000, 1, n) for n in (100, 1_000, 10_000, 100_000)],
        },
    ),
}


def curves(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The points of each curve, in their order."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["part"], row["axis"]), []).append(row)
    return {key: points for key, points in found.items() if len(points) > 1}


def size_of(row: dict[str, Any]) -> int:
    return int(row[{"groups": "classes"}.get(row["axis"], row["axis"])])


def exponent(points: list[dict[str, Any]], what: str) -> float | None:
    """Slope in log-log of the last two points of a curve; ``None`` where a value is missing or zero.

    >>> exponent([{"axis": "rows", "rows": n, "s": n * n} for n in (10, 20, 40)], "s")
    2.0
    """
    first, last = points[-2:]
    if not first[what] or not last[what] or size_of(first) == size_of(last):
        return None
    return math.log(last[what] / first[what]) / math.log(size_of(last) / size_of(first))


def table(rows: list[dict[str, Any]]) -> Table:
    """Sizes, CPU seconds and memory of each curve, and its exponents."""
    shown = Table("part", "against", "from", "to", "CPU s", "exponent", "MiB", "exponent", title="time and memory")
    for (part, axis), points in curves(rows).items():
        first, last = points[0], points[-1]
        cells = [part, axis, f"{size_of(first):,}", f"{size_of(last):,}"]
        for what in ("cpu_s", "mib"):
            slope = exponent(points, what)
            cells += [f"{first[what]} … {last[what]}", "–" if slope is None else f"{slope:.2f}"]
        shown.add_row(*cells)
    return shown


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """Both figures of every curve, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    labels = {"cpu_s": "CPU seconds", "mib": "growth of memory, MiB"}
    for ax, (what, label) in zip(axes, labels.items(), strict=True):
        ax.set(xlabel="rows, units, classes or groups", ylabel=label)
        for (part, axis), points in curves(rows).items():
            measured = [p for p in points if p[what]]  # no growth, or no way to measure it: nothing to draw
            if measured:
                slope = exponent(points, what)
                name = f"{part}, {axis}" + ("" if slope is None else f" ({slope:.2f})")
                ax.plot([size_of(p) for p in measured], [p[what] for p in measured], "o-", label=name)
        if ax.lines:  # an axis without a positive value cannot be logarithmic
            ax.set(xscale="log", yscale="log")
            ax.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path

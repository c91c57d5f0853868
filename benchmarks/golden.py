"""``python -m benchmarks golden FILE``: write down what the package computes, or compare with what was written down.

A change that is to keep behaviour is made between two calls: the first one writes FILE, later ones run the same things
again and list every value that differs.  Rows depend on the machine and on the versions of its libraries in their last
digits, so FILE is made on the machine where it is compared and is no part of the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.options import Parser

PLAN = {"digits": (5, ("val", "iid")), "dominoes": (1, ("val",)), "waterbirds": (1, ("val",))}
"""Data sets with the number of their seeds and the held-out sources."""


def main(argv: list[str]) -> int:
    parser = Parser("golden", __doc__)
    parser.add_argument("file", type=Path, help="JSON; written where it lacks a value, compared where it has one")
    parser.add_argument("--data", default="digits", help=f"some of {', '.join(PLAN)} (default: digits)")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args(argv)
    console = Console()
    known: dict[str, Any] = json.loads(options.file.read_text()) if options.file.exists() else {}
    differing = 0
    for name, value in _values(options):
        value = json.loads(json.dumps(value))  # tuples and float32 as they will be read again
        if name not in known:
            known[name] = value
            options.file.parent.mkdir(parents=True, exist_ok=True)
            options.file.write_text(json.dumps(known, indent=1))
            console.print(f"{name}: written")
        elif known[name] == value:
            console.print(f"{name}: the same")
        else:
            differing += 1
            console.print(f"{name}: differs\n  was {known[name]}\n  is  {value}", style="red", markup=False)
    return min(differing, 1)


def _values(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    from benchmarks.baselines import METHODS
    from benchmarks.compare import quiet
    from benchmarks.experiment import TASKS, Experiment, Settings, judge

    quiet()
    settings = Settings(options.data_root, None, options.cache)
    if "digits" in options.data.split(","):
        yield from _callbacks(Experiment(TASKS["digits"], settings, 0, epochs=4))
    for task in options.data.split(","):
        seeds, sources = PLAN[task]
        for seed in range(seeds):
            for source in sources:
                for method in (m for m in METHODS if m.name == "demem" and source in m.held_out):
                    experiment = Experiment(TASKS[task], settings, seed, source)
                    outcome = method.run(experiment)
                    row = judge(outcome, experiment.data())
                    yield f"{task} {source} {seed} {method.label}", {**row, "config": outcome.config}


def _callbacks(experiment: Any) -> Iterator[tuple[str, Any]]:
    """What the other callbacks say of a short fit."""
    from demem.callbacks import ActivationDiversityMonitor, MemorizationTracer, WorstGroupMonitor

    with tempfile.TemporaryDirectory() as folder:
        monitor, diversity = WorstGroupMonitor(train=True), ActivationDiversityMonitor()
        tracer = MemorizationTracer(dirpath=folder)
        experiment.fit(callbacks=[monitor, diversity, tracer])
        yield "monitor's history", monitor.history
        yield "diversity's history", diversity.history
        yield "tracer's history", tracer.history
        for name in ("units.csv", "memorised_examples.csv"):
            yield f"tracer's {name}", hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest()

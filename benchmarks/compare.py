"""``python -m benchmarks compare``: train every arm on every data set and seed, write rows, table and figures."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.results import append_jsonl, read_jsonl

DEFAULT_METHODS = "erm,class_balanced,demem"
EXTRAS = ("diversity", "units", "rounds")


def main(argv: list[str]) -> int:
    return _run(_parser().parse_args(argv), Console())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks compare", description=__doc__)
    parser.add_argument(
        "--data", default="digits", help="data sets, comma-separated, or 'all' that need no GPU (default: digits)"
    )
    parser.add_argument("--data-root", type=Path, help="folder with waterbirds_v1.0, MNIST, FashionMNIST")
    parser.add_argument("--weights", type=Path, help="MobileNetV2 safetensors file (default: below --data-root)")
    parser.add_argument(
        "--cache", type=Path, help="folder for Waterbirds' frozen-layer outputs, 0.7 GB (default: user cache)"
    )
    parser.add_argument(
        "--methods", default=DEFAULT_METHODS, help=f"arms, comma-separated, or 'all' (default: {DEFAULT_METHODS})"
    )
    parser.add_argument("--seeds", default="5", help="how many (5: seeds 0 to 4), or a list such as 0,3,7 (default: 5)")
    parser.add_argument("--epochs", type=int, help="default: the data set's own")
    parser.add_argument("--held-out", default="val", choices=("val", "iid", "both"), help="default: val")
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: results/")
    parser.add_argument("--resume", action="store_true", help="keep the finished rows in --out and add the others")
    return parser


def _run(options: argparse.Namespace, console: Console) -> int:
    # Heavy imports after the arguments are read, so that --help and a misspelt option answer at once.
    import torch

    from benchmarks.baselines import METHODS
    from benchmarks.experiment import TASKS, Experiment, Settings, judge, mobilenet_weights
    from benchmarks.report import write_report

    data = ",".join(t.name for t in TASKS.values() if not t.gpu) if options.data == "all" else options.data
    tasks = [TASKS[name] for name in _names(data, list(TASKS), "--data", "data set")]
    known = list(dict.fromkeys(m.name for m in METHODS))
    chosen = _names(options.methods, known, "--methods", "method")
    methods = [m for m in METHODS if m.name in chosen]
    seeds = parse_seeds(options.seeds)
    sources = ["val", "iid"] if options.held_out == "both" else [options.held_out]
    if options.epochs is not None and options.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {options.epochs}.")
    settings = Settings(options.data_root, options.weights, options.cache)
    for task in tasks:
        for file in task.files:
            if not (settings.root(task.name) / file).exists():
                raise ValueError(
                    f"--data {task.name} reads {file} below --data-root, and {options.data_root} has none."
                )
        if task.pretrained and not mobilenet_weights(settings).is_file():
            raise ValueError(
                f"--data {task.name} needs MobileNetV2 weights; there are none at {mobilenet_weights(settings)}."
            )
    out = _writable(options.out)
    results = out / "results.jsonl"
    if results.exists() and not options.resume:
        kept = results.with_name(f"results-{time.strftime('%Y%m%d-%H%M%S')}.jsonl")
        results.rename(kept)
        for name in EXTRAS:
            (out / f"{name}.jsonl").unlink(missing_ok=True)
        console.print(f"Earlier rows moved to {kept}; --resume would have added to them.")

    finished = {_key(row) for row in read_jsonl(results)}
    plan = [
        (task, seed, source, method)
        for task in tasks
        for seed in seeds
        for source in sources
        for method in methods
        if source in method.held_out
        and (task.name, method.name, method.tier, source, seed, options.epochs or task.epochs) not in finished
    ]
    if not plan and not finished:
        raise ValueError(f"None of {', '.join(chosen)} uses --held-out {options.held_out}.")
    for row in read_jsonl(results):  # what an expensive arm chose on its first seed holds after a resume too
        if "tuned" in row.get("config", {}):
            settings.choices.setdefault((row["data"], row["method"], row["held_out"]), row["config"]["tuned"])

    quiet()
    threads = torch.get_num_threads()
    last: tuple[str, int] | None = None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("rows", total=len(plan))
        for task, seed, source, method in plan:
            if (task.name, seed) != last:
                settings.runs.clear()
                torch.set_num_threads(task.threads or threads)
                last = (task.name, seed)
            name = f"{task.name} · seed {seed} · {source} · {method.label}"
            progress.update(bar, description=name)

            def on_epoch(done: int, of: int, name: str = name) -> None:
                progress.update(bar, description=f"{name} · epoch {done}/{of}")

            def on_caching(file: str, done: int, of: int) -> None:
                progress.update(bar, description=f"computing frozen layers once: {file} {done}/{of}")

            settings.on_epoch, settings.on_caching = on_epoch, on_caching
            experiment = Experiment(task, settings, seed, source, options.epochs, watched=seed == seeds[0])
            data = experiment.data()
            before = set(settings.runs)
            start = time.perf_counter()
            outcome = method.run(experiment)
            seconds = time.perf_counter() - start
            # A shared ERM run is part of what each arm on top of it costs.
            shared = settings.runs.get((task.name, seed, source, experiment.epochs))
            if method.uses_erm and shared is not None and set(settings.runs) == before:
                seconds += shared.seconds
            identity = {"data": task.name, "method": method.name, "tier": method.tier, "held_out": source, "seed": seed}
            for kind, rows in outcome.extras.items():
                for row in rows:
                    append_jsonl(out / f"{kind}.jsonl", {**identity, **row})
            row = {
                **identity,
                **judge(outcome, data),
                "selection": method.selection,
                "epochs": experiment.epochs,
                "seconds": round(seconds, 2),
                "config": outcome.config,
            }
            append_jsonl(results, row)
            progress.advance(bar)

    write_report(out, console)
    return 0


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(k) for k in ("data", "method", "tier", "held_out", "seed", "epochs"))


def _names(given: str, known: list[str], option: str, what: str) -> list[str]:
    names = known if given == "all" else [name.strip() for name in given.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"{option}: unknown {what} {', '.join(unknown) or '(none given)'}. There are: {', '.join(known)}."
        )
    return names


def parse_seeds(given: str) -> list[int]:
    try:
        numbers = [int(part) for part in given.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--seeds takes a number or a list such as 0,3,7, got {given!r}.") from None
    seeds = numbers if "," in given else list(range(numbers[0])) if numbers else []
    if not seeds or min(seeds) < 0:
        raise ValueError(f"--seeds takes a number from 1 up or a list of seeds from 0 up, got {given!r}.")
    return seeds


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror or error}.") from error
    return folder


def quiet() -> None:
    """Only our own progress display; Lightning's remarks on workers, loggers and GPUs are of no use here."""
    os.environ.setdefault("POSSIBLE_USER_WARNINGS", "off")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec, LeafSpec\\)`.*",
        ".*log_every_n_steps.*",
    ):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")

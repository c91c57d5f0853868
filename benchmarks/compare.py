"""``python -m benchmarks compare``: train every arm on every data set and seed, write rows, table and figures."""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.options import Parser
from benchmarks.results import HELD_OUT, append_jsonl, read_jsonl

if TYPE_CHECKING:  # torch is imported after the arguments are read: --help and a misspelt option answer at once
    from benchmarks.experiment import Experiment, Method, Outcome, Settings, Shared, Task

DEFAULT_METHODS = "erm,class_balanced,demem"
EXTRAS = ("diversity", "units", "rounds")
IDENTITY = ("data", "method", "tier", "held_out", "seed")


class Job(NamedTuple):
    """What becomes one row."""

    task: Task
    seed: int
    held_out: str
    method: Method

    @property
    def identity(self) -> dict[str, Any]:
        """The first columns of the row, which name it."""
        names = self.task.name, self.method.name, self.method.tier, self.held_out, self.seed
        return dict(zip(IDENTITY, names, strict=True))

    def __str__(self) -> str:
        return f"{self.task.name} · seed {self.seed} · {self.held_out} · {self.method.label}"


@dataclass(frozen=True)
class Plan:
    """What the options ask for; ``epochs`` is ``None`` for each data set's own number."""

    tasks: list[Task]
    methods: list[Method]
    seeds: list[int]
    held_out: list[str]
    epochs: int | None = None

    def jobs(self) -> Iterator[Job]:
        for task in self.tasks:
            for seed in self.seeds:
                for held_out in self.held_out:
                    for method in self.methods:
                        if held_out in method.held_out:
                            yield Job(task, seed, held_out, method)

    def missing(self, rows: list[dict[str, Any]]) -> list[Job]:
        """The jobs that have no row yet."""
        done = {tuple(row.get(key) for key in (*IDENTITY, "epochs")) for row in rows}
        return [job for job in self.jobs() if (*job.identity.values(), self.epochs or job.task.epochs) not in done]


def main(argv: list[str]) -> int:
    options, console = _parser().parse_args(argv), Console()
    out = _writable(options.out)
    with _alone(out):  # before torch is imported, which takes as long as a short comparison
        return _compare(options, out, console)


def _compare(options: argparse.Namespace, out: Path, console: Console) -> int:
    from benchmarks.experiment import Settings
    from benchmarks.report import write_report

    settings = Settings(options.data_root, options.weights, options.cache)
    plan = make_plan(options)
    for task in plan.tasks:
        check_files(task, settings)
    if not options.resume:
        _put_aside(out, console)
    rows = read_jsonl(out / "results.jsonl")
    _drop_extras_without_a_row(out, rows)
    jobs = plan.missing(rows)
    if not jobs and not rows:
        names = ", ".join(dict.fromkeys(method.name for method in plan.methods))
        raise ValueError(f"None of {names} uses --held-out {options.held_out}.")
    _run(jobs, plan, settings, rows, out, console)
    write_report(out, console)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser("compare", __doc__)
    parser.add_argument(
        "--data",
        default="digits",
        help="data sets, comma-separated; 'all' that need no GPU; my_module:make_task for your own (default: digits)",
    )
    parser.add_argument("--data-root", type=Path, help="folder with waterbirds_v1.0, MNIST, FashionMNIST, rt-polarity")
    parser.add_argument("--weights", type=Path, help="MobileNetV2 safetensors file (default: below --data-root)")
    parser.add_argument(
        "--backbone",
        choices=("mobilenetv2", "efficientnet_lite0"),
        default="mobilenetv2",
        help="network of waterbirds (default: mobilenetv2)",
    )
    parser.add_argument(
        "--cache", type=Path, help="folder for outputs of frozen layers, 0.2–0.8 GB per data set (default: user cache)"
    )
    parser.add_argument(
        "--methods",
        default=DEFAULT_METHODS,
        help=f"arms, comma-separated; 'all'; my_module:METHODS for your own (default: {DEFAULT_METHODS})",
    )
    parser.add_argument("--seeds", default="5", help="how many (5: seeds 0 to 4), or a list such as 0,3,7 (default: 5)")
    parser.add_argument("--epochs", type=int, help="default: the data set's own")
    parser.add_argument(
        "--held-out",
        default="val",
        help="what arms may train on beside the training set: none, iid (a slice of it), val (the validation set); "
        "comma-separated, 'both' (val,iid) or 'all' (default: val)",
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="default: results/")
    parser.add_argument("--resume", action="store_true", help="keep the finished rows in --out and add the others")
    return parser


# Plan


def make_plan(options: argparse.Namespace) -> Plan:
    """The data sets, arms, seeds and held-out sources that the options name.

    Raises:
        ValueError: an option names something that there is not.
    """
    from benchmarks.baselines import METHODS
    from benchmarks.experiment import BACKBONES, TASKS
    from benchmarks.own import load_methods, load_task

    without_gpu = [task.name for task in TASKS.values() if not task.gpu]
    names, own = _names(options.data, list(TASKS), "--data", "data set", {"all": without_gpu})
    chosen_birds = BACKBONES[options.backbone]
    if chosen_birds != "waterbirds" and "waterbirds" not in names:
        raise ValueError(f"--backbone chooses the network of waterbirds, and --data names {', '.join(names + own)}.")
    tasks = [TASKS[n] for n in dict.fromkeys(chosen_birds if name == "waterbirds" else name for name in names)]
    for name in own:
        tasks.append(load_task(name, [*TASKS.values(), *tasks]))
    known = list(dict.fromkeys(method.name for method in METHODS))
    names, own = _names(options.methods, known, "--methods", "method", {"all": known})
    methods = [method for method in METHODS if method.name in names]
    for name in own:
        methods += load_methods(name, [*METHODS, *methods])
    seeds = parse_seeds(options.seeds)
    if options.epochs is not None and options.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {options.epochs}.")
    several = {"all": list(HELD_OUT), "both": ["val", "iid"]}
    held_out, _ = _names(options.held_out, list(HELD_OUT), "--held-out", "held-out source", several)
    return Plan(tasks, methods, seeds, held_out, options.epochs)


def _names(
    given: str, known: list[str], option: str, what: str, several: dict[str, list[str]]
) -> tuple[list[str], list[str]]:
    """The known names in a comma-separated list, and those of the form ``module:attribute``.

    Args:
        given: the list.
        known: names that there are.
        option, what: for the error.
        several: names that stand for others.
    """
    parts = [part.strip() for part in given.split(",") if part.strip()]
    own = [part for part in parts if ":" in part]
    names = [name for part in parts if part not in own for name in several.get(part, [part])]
    unknown = [name for name in names if name not in known]
    if unknown or not parts:
        raise ValueError(
            f"{option}: unknown {what} {', '.join(unknown) or '(none given)'}. There are: {', '.join(known)}."
        )
    return list(dict.fromkeys(names)), list(dict.fromkeys(own))


def parse_seeds(given: str) -> list[int]:
    try:
        numbers = [int(part) for part in given.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--seeds takes a number or a list such as 0,3,7, got {given!r}.") from None
    seeds = numbers if "," in given else list(range(numbers[0])) if numbers else []
    if not seeds or min(seeds) < 0:
        raise ValueError(f"--seeds takes a number from 1 up or a list of seeds from 0 up, got {given!r}.")
    return seeds


def check_files(task: Task, settings: Settings) -> None:
    for file in task.files:
        if not (settings.root(task.name) / file).exists():
            raise ValueError(f"--data {task.name} reads {file} below --data-root, and {settings.data_root} has none.")
    if task.check is not None:
        task.check(settings)


# Run


def _run(
    jobs: list[Job], plan: Plan, settings: Settings, rows: list[dict[str, Any]], out: Path, console: Console
) -> None:
    """Every job, one after the other; its row is on disk before the next one begins."""
    import torch

    from benchmarks.experiment import Shared

    quiet()
    threads = torch.get_num_threads()
    # A decay of 1 shrinks weights to denormal numbers, with which a processor is several times as slow.
    torch.set_flush_denormal(True)
    shared, last = Shared(_choices(rows)), None
    with _progress(console, len(jobs)) as progress:
        for job in jobs:
            if last is None or job.task.name != last[0]:
                _print_sources(job.task, settings, console)
            if (job.task.name, job.seed) != last:
                shared.start_seed()
                torch.set_num_threads(job.task.threads or threads)
                last = (job.task.name, job.seed)
            row, extras = run_job(job, plan, progress.told(settings, str(job)), shared)
            _write(out, row, extras)
            progress.advance()
            if not console.is_terminal:  # the bar is not shown in a pipe or a file
                console.print(f"{progress.done}/{len(jobs)} {job}", markup=False, highlight=False, soft_wrap=True)


def _print_sources(task: Task, settings: Settings, console: Console) -> None:
    for line in [] if task.sources is None else task.sources(settings):
        console.print(f"{task.name}: {line}", markup=False, highlight=False, soft_wrap=True)


def run_job(
    job: Job, plan: Plan, settings: Settings, shared: Shared
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Train and judge one arm: its row, and what the figures need by kind of figure."""
    from benchmarks.experiment import Experiment, judge

    task, seed, held_out, method = job
    experiment = Experiment(task, settings, seed, held_out, plan.epochs, seed == plan.seeds[0], shared)
    data = experiment.data()
    outcome, seconds = _outcome(method, experiment)
    row = {
        **job.identity,
        **judge(outcome, data),
        "selection": method.selection,
        "epochs": experiment.epochs,
        "seconds": round(seconds, 2),
        "config": outcome.config,
    }
    return row, outcome.extras


def _outcome(method: Method, experiment: Experiment) -> tuple[Outcome, float]:
    """What the arm hands back, and the seconds that this took."""
    from benchmarks.experiment import Outcome

    shared, name = experiment.shared, (method.name, method.tier)
    same_on_both = {"none", "val"} <= set(method.held_out) and experiment.held_out != "iid"
    if same_on_both and name in shared.outcomes:
        return shared.outcomes[name]
    # A shared ERM run is part of what each arm on top of it costs.
    earlier = shared.runs.get(experiment.erm_key) if method.uses_erm else None
    start = time.perf_counter()
    outcome = method.run(experiment)
    if not isinstance(outcome, Outcome):
        raise ValueError(
            f"The arm {method.label} must return a benchmarks.experiment.Outcome, got {type(outcome).__name__}."
        )
    seconds = time.perf_counter() - start + (0.0 if earlier is None else earlier.seconds)
    if same_on_both:
        shared.outcomes[name] = outcome, seconds
    return outcome, seconds


def _choices(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What an expensive arm chose on its first seed, which holds after a resume too: the choice ``arm`` is ``tuned`` in
    the configuration of its row, the choice ``arm_part`` is ``tuned_part``."""
    from benchmarks.experiment import selected_on

    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        for key, chosen in row.get("config", {}).items():
            if key == "tuned" or key.startswith("tuned_"):
                arm = row["method"] + key.removeprefix("tuned")
                found.setdefault((row["data"], arm, selected_on(row["held_out"])), chosen)
    return found


class _Bar:
    """The progress bar: which row is being made, and how far it is."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.task, self.done = progress, progress.add_task("rows", total=total), 0

    def told(self, settings: Settings, name: str) -> Settings:
        """The settings, with this bar told about the progress of the row ``name``."""
        self._show(name)
        return replace(
            settings,
            on_epoch=lambda done, of: self._show(f"{name} · epoch {done}/{of}"),
            on_caching=lambda file, done, of: self._show(f"computing frozen layers once: {file} {done}/{of}"),
        )

    def advance(self) -> None:
        self.progress.advance(self.task)
        self.done += 1

    def _show(self, text: str) -> None:
        self.progress.update(self.task, description=text)


@contextmanager
def _progress(console: Console, total: int) -> Iterator[_Bar]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress, total)


def quiet() -> None:
    """Only our own progress display; Lightning's remarks on workers, loggers and GPUs are of no use here."""
    os.environ.setdefault("POSSIBLE_USER_WARNINGS", "off")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*`isinstance\\(treespec, LeafSpec\\)`.*",
        ".*log_every_n_steps.*",
        ".*module\\(s\\) in eval mode.*",  # arms that start from a trained network
    ):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")


# Write


def _write(out: Path, row: dict[str, Any], extras: dict[str, list[dict[str, Any]]]) -> None:
    identity = {key: row[key] for key in IDENTITY}
    for kind, records in extras.items():
        for record in records:
            append_jsonl(out / f"{kind}.jsonl", {**identity, **record})
    append_jsonl(out / "results.jsonl", row)


def _drop_extras_without_a_row(out: Path, rows: list[dict[str, Any]]) -> None:
    """What a comparison wrote that was killed before the row itself: the row is made again, and its extras with it."""
    from demem.report import write_whole

    done = {tuple(row.get(key) for key in IDENTITY) for row in rows}
    for path in (out / f"{name}.jsonl" for name in EXTRAS):
        records = read_jsonl(path)
        kept = [record for record in records if tuple(record.get(key) for key in IDENTITY) in done]
        if len(kept) < len(records):
            write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))


def _put_aside(out: Path, console: Console) -> None:
    """Rename the results of an earlier run, so that rows are not mixed."""
    results = out / "results.jsonl"
    if not results.exists():
        return
    kept = results.with_name(f"results-{time.strftime('%Y%m%d-%H%M%S')}.jsonl")
    results.rename(kept)
    for name in EXTRAS:
        (out / f"{name}.jsonl").unlink(missing_ok=True)
    console.print(f"Earlier rows moved to {kept}; --resume would have added to them.")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder, or refuse it while another comparison does; a process that dies lets go of it.

    Raises:
        ValueError: another comparison writes to the folder.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"--out {out} is in use: another comparison is running there. Name another.") from error
        try:
            yield
        finally:
            if [path.name for path in out.iterdir()] == [".lock"]:  # refused before anything was written
                (out / ".lock").unlink()
                out.rmdir()


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror or error}.") from error
    return folder

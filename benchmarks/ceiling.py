"""``python -m benchmarks ceiling``: what the T2 arms reach with four fifths of the *test* set as held-out data.

The test set is cut into five parts; each is judged once, by an arm that had the other four, with their groups, as its
held-out data.  No method may do this.  It shows what is left to gain from more, and perfectly matching, held-out data
where the trained layers are what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.baselines import METHODS
from benchmarks.compare import parse_seeds, quiet
from benchmarks.experiment import TASKS, Experiment, Run, Settings, Shared, Task, add_task_options
from benchmarks.options import Parser
from benchmarks.results import append_jsonl, read_jsonl
from benchmarks.rows import spread
from demem.data import GroupedDataModule
from demem.metrics import group_accuracy_compute, group_accuracy_update

FOLDS = 5


class _Fold(Experiment):
    """An experiment whose held-out set is the test set without the part that is judged."""

    def __init__(
        self, task: Task, settings: Settings, seed: int, fold: int, epochs: int | None, shared: Shared | None = None
    ) -> None:
        super().__init__(replace(task, data=_swapped(task.data, fold)), settings, seed, epochs=epochs, shared=shared)

    def erm(self, held_out: str | None = None) -> Run:
        run = super().erm(held_out)  # trained on the first fold; held-out data plays no part in it
        return Run(run.module, self.data(), run.seconds)


def _swapped(make: Callable[..., GroupedDataModule], fold: int) -> Callable[..., GroupedDataModule]:
    def swapped(settings: Settings, **options: Any) -> GroupedDataModule:
        data = make(settings, **options)
        data.setup()
        test = data.test_dataset
        if test is None:
            raise ValueError("There is no test set.")
        part = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)) % FOLDS
        data.val_dataset = test.select((part != fold).nonzero()[:, 0])
        data.test_dataset = test.select((part == fold).nonzero()[:, 0])
        return data

    return swapped


def main(argv: list[str]) -> int:
    parser = Parser("ceiling", __doc__)
    add_task_options(parser)
    parser.add_argument("--seeds", default="5", help="as in compare (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("results/ceiling"), help="finished rows there are kept")
    options = parser.parse_args(argv)
    task, path = TASKS[options.data], options.out / "ceiling.jsonl"
    settings = Settings(options.data_root, options.weights, options.cache)
    arms = [method for method in METHODS if method.tier == "T2" and method.name in ("dfr", "demem")]
    seeds, epochs = parse_seeds(options.seeds), options.epochs or task.epochs

    def rows() -> list[dict[str, Any]]:
        return [row for row in read_jsonl(path) if (row["data"], row["epochs"]) == (task.name, epochs)]

    done = {(row["seed"], row["fold"], row["method"]) for row in rows()}
    quiet()
    if task.threads:
        torch.set_num_threads(task.threads)
    for seed in seeds:
        shared = Shared()
        for fold in range(FOLDS):
            for arm in arms:
                if (seed, fold, arm.name) in done:
                    continue
                experiment = _Fold(task, settings, seed, fold, epochs, shared)
                outcome, data = arm.run(experiment), experiment.data()
                judged = data.test_dataset
                correct, total = group_accuracy_update(outcome.logits["test"], judged.y, judged.group, data.num_groups)
                row = {"data": task.name, "epochs": epochs, "method": arm.name, "tier": arm.tier}
                append_jsonl(
                    path, {**row, "seed": seed, "fold": fold, "correct": correct.tolist(), "total": total.tolist()}
                )
    _table(rows())
    return 0


def _table(rows: list[dict[str, Any]]) -> None:
    table = Table("method", "tier", "seeds", "worst group", "mean over groups", "by group", title=rows[0]["data"])
    for method, tier in dict.fromkeys((row["method"], row["tier"]) for row in rows):
        mine = [row for row in rows if row["method"] == method]
        seeds = [[row for row in mine if row["seed"] == seed] for seed in sorted({row["seed"] for row in mine})]
        # One accuracy a seed, over all parts together; seeds that were cut off do not count yet.
        accuracy = torch.stack(
            [
                group_accuracy_compute(
                    *(torch.tensor([row[key] for row in parts]).sum(0) for key in ("correct", "total"))
                )
                for parts in seeds
                if len(parts) == FOLDS
            ]
        )
        by_group = "  ".join(f"{100 * value:.1f}" for value in accuracy.mean(0).tolist())
        worst, mean = (spread(values.tolist()) for values in (accuracy.min(1).values, accuracy.mean(1)))
        table.add_row(method, tier, str(len(accuracy)), worst, mean, by_group)
    Console().print(table)

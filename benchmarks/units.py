"""``python -m benchmarks units``: does it help to make units forget the inferred attribute, and does it matter which?

The network is trained as demem trains it (inferred groups drawn equally often) and judged as trained, with its own head
and no held-out data: the source ``none``.  In the last part of training the units that know the inferred attribute best
within the class are penalised for it (:mod:`demem.removal.forget`), or random ones, or all, or none.

For development: judged on the official *validation* set, which takes part in nothing; test sets are not read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.compare import parse_seeds, quiet
from benchmarks.experiment import TASKS, Experiment, Settings, add_task_options
from benchmarks.options import Parser
from benchmarks.results import append_jsonl, read_jsonl
from benchmarks.rows import spread
from demem.batch import apply_model
from demem.data import GroupedDataset
from demem.groups import ShortcutProbe, find_shortcut
from demem.linear import balanced_weights
from demem.metrics import group_accuracy_compute, group_accuracy_update
from demem.removal import SMOOTHING, Choose, Forgetting, Forgotten, FrozenProbe, at_random, most_informed
from demem.run import reweight
from demem.sites import ActivationReader, Site, default_sites, find_sites

MAX_ERRORS = (0.25, 0.15)  # as demem's: of a probe before training, and after the first epoch
LAYERS = {  # every activation function's output but the one that the head reads
    "digits": ["2", "5"],
    "colored_mnist": ["2", "5"],
    "dominoes": ["act1", "layer1.*.act2", "layer2.*.act2", "layer3.*.act2"],
    "dominoes99": ["act1", "layer1.*.act2", "layer2.*.act2", "layer3.*.act2"],
}


class Train(pl.Callback):
    """Probe, balance the inferred groups, and penalise units from an epoch on.

    Args:
        patterns: of the layers whose units are penalised.
        choose: which units; ``None`` penalises nothing.
        balance: draw the inferred groups equally often.
        start: fraction of the epochs without the penalty.
        strength: of the penalty.
        every, choices: steps between choices of units, and how many choices.
        seed: of the draw of training examples.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        choose: Choose | None,
        balance: bool = True,
        start: float = 0.75,
        strength: float = 3.0,
        every: int = 5,
        choices: int | None = None,
        seed: int = 0,
    ) -> None:
        self.every, self.choices = every, choices
        self.patterns, self.choose, self.balance = patterns, choose, balance
        self.start, self.strength, self.seed = start, strength, seed
        self.found: dict[str, Any] = {}
        self.records: list[Forgotten] = []
        self.forgetting: Forgetting | None = None
        self._probe: FrozenProbe | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch
        if epoch < 2 and self._probe is None:
            self._infer_groups(trainer, pl_module.model, epoch)
        begins = epoch >= math.ceil(self.start * (trainer.max_epochs or 0))
        if begins and self.choose and self._probe is not None and self.forgetting is None:
            sites = find_sites(pl_module.model, list(self.patterns))
            self.forgetting = Forgetting(
                sites, 2, choose=self.choose, strength=self.strength, every=self.every, choices=self.choices
            )
            self.forgetting.__enter__()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.forgetting is not None and self._probe is not None:
            self.forgetting.observe(batch[1], self._probe(batch[0]))

    def on_train_batch_end(self, *_: Any) -> None:
        if self.forgetting is not None:
            self.forgetting.step()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.forgetting is not None:
            self.records.append(self.forgetting.record())

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.forgetting is not None:
            self.forgetting.__exit__()

    def _infer_groups(self, trainer: pl.Trainer, model: torch.nn.Module, epoch: int) -> None:
        plain = trainer.datamodule.train_eval_dataset  # type: ignore[attr-defined]
        sites = default_sites(model)[:-1]
        sites = [Site(f"{sites[0].name}:input", sites[0].module, "input"), *sites]
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        rows: dict[str, list[Tensor]] = {}
        with torch.no_grad(), ActivationReader(sites, "mean") as reader:
            for x, _ in _inputs(plain):
                model(x)
                for name, values in reader.pop().items():
                    rows.setdefault(name, []).append(values.float())
        for module, mode in modes:
            module.training = mode
        probe = find_shortcut({name: torch.cat(parts) for name, parts in rows.items()}, plain.y, 2)
        accepted = probe.error <= MAX_ERRORS[epoch] / 2 and probe.found
        self.found = {"epoch": epoch, "site": probe.site, "error": probe.error, "sure": probe.sure, "used": accepted}
        if accepted:
            self._use(trainer, model, probe, plain, sites)

    def _use(
        self,
        trainer: pl.Trainer,
        model: torch.nn.Module,
        probe: ShortcutProbe,
        plain: GroupedDataset,
        sites: list[Site],
    ) -> None:
        site = next(s for s in sites if s.name == probe.site)
        self._probe = FrozenProbe(model, site, lambda rows: probe.head(rows).argmax(1))
        group = probe.groups(plain.y)
        agree = [float((group == g)[plain.group == g].float().mean()) for g in sorted(set(plain.group.tolist()))]
        self.found["right"] = agree
        if self.balance:
            weights = balanced_weights(group, SMOOTHING)
            if reweight(trainer.train_dataloader, torch.arange(len(group)), weights, trainer, self.seed) is None:
                raise RuntimeError("The training loader does not shuffle, so it cannot be balanced.")


def _inputs(data: GroupedDataset, size: int = 512) -> Any:
    for part in torch.arange(len(data)).split(size):
        rows = torch.stack([data[int(i)][0] for i in part])
        yield rows, data.y[part]


def redrawn(share: float, seed: int) -> Choose:
    """Other random units at each choice: the control for a choice that moves on."""
    generator = torch.Generator().manual_seed(seed)

    def choose(scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        noise = {name: torch.rand(len(values), generator=generator) for name, values in scores.items()}
        return most_informed(share)(noise)

    return choose


ARMS: dict[str, Callable[[int], dict[str, Any]]] = {
    "erm": lambda seed: {"choose": None, "balance": False},
    "none": lambda seed: {"choose": None},
    "top": lambda seed: {"choose": most_informed(0.2)},
    "random": lambda seed: {"choose": at_random(0.2, seed)},
    "random_redrawn": lambda seed: {"choose": redrawn(0.2, seed)},
    "all": lambda seed: {"choose": most_informed(1.0)},
    "top_kept": lambda seed: {"choose": most_informed(0.2), "every": 25, "choices": 1},
    "top_from_start": lambda seed: {"choose": most_informed(0.2), "start": 0.0},
    "random_from_start": lambda seed: {"choose": at_random(0.2, seed), "start": 0.0},
    "erm_top": lambda seed: {"choose": most_informed(0.2), "balance": False},
    "erm_random": lambda seed: {"choose": at_random(0.2, seed), "balance": False},
}


def run(experiment: Experiment, arm: str, patterns: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """Train one arm; accuracies by group on validation and training data."""
    train = Train(patterns, **{"seed": experiment.seed, **ARMS[arm](experiment.seed), **options})
    start = time.perf_counter(), time.process_time()
    data = experiment.data()
    fitted = experiment.fit(data=data, callbacks=[train], validate=False)
    seconds = {"s": time.perf_counter() - start[0], "cpu_s": time.process_time() - start[1]}
    judged = Experiment(experiment.task, experiment.settings, experiment.seed, "val").data().val_dataset
    accuracy = {
        "val": _group_accuracy(fitted.module, judged),
        "train": _group_accuracy(fitted.module, data.train_eval_dataset),
    }
    last = train.records[-1] if train.records else None
    return {
        "worst": min(accuracy["val"]),
        "mean": mean(accuracy["val"]),
        "group_acc": accuracy["val"],
        "train_group_acc": accuracy["train"],
        "gap": min(accuracy["train"]) - min(accuracy["val"]),
        "probe": train.found,
        "touched": [record.share for record in train.records],
        "touched_in_all": _ever(train.records),
        "nats": [None if math.isnan(r.information) else r.information for r in train.records],
        "units": [[u.site, u.unit, round(u.score, 4), u.steps] for u in last.units] if last else [],
        **seconds,
    }


def _ever(records: Sequence[Forgotten]) -> float:
    units = {(u.site, u.unit) for record in records for u in record.units}
    return len(units) / sum(records[-1].sizes.values()) if records else 0.0


def _group_accuracy(module: torch.nn.Module, data: Any) -> list[float]:
    module.eval()
    with torch.no_grad():
        logits = torch.cat([apply_model(module, x) for x, _ in _inputs(data)])
    groups = int(data.group.max()) + 1
    return group_accuracy_compute(*group_accuracy_update(logits, data.y, data.group, groups)).tolist()


def main(argv: list[str]) -> int:
    parser = Parser("units", __doc__)
    add_task_options(parser)
    parser.add_argument("--seeds", default="10,11,12,13,14,15,16,17", help="as in compare; default: 10 to 17")
    parser.add_argument("--arms", default="none,top,random,all", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--held-out", choices=["val", "iid"], default="iid", help="iid leaves a slice out of training")
    parser.add_argument("--layers", help="patterns, separated by commas; default: those of the data set")
    parser.add_argument("--strength", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=Path("results/units"), help="finished rows there are kept")
    options = parser.parse_args(argv)
    task, path = TASKS[options.data], options.out / "units.jsonl"
    layers = options.layers.split(",") if options.layers else LAYERS[options.data]
    arms, epochs = options.arms.split(","), options.epochs or task.epochs
    unknown = sorted(set(arms) - set(ARMS))
    if unknown:
        raise ValueError(f"--arms {','.join(unknown)}: there are {', '.join(ARMS)}.")
    key = {"data": task.name, "epochs": epochs, "held_out": options.held_out}
    key |= {"layers": layers, "strength": options.strength}
    quiet()
    torch.set_num_threads(task.threads or torch.get_num_threads())

    def rows() -> list[dict[str, Any]]:
        plain = {k: v for k, v in key.items() if k not in ("layers", "strength")}  # what arms without a penalty need
        return [
            row
            for row in read_jsonl(path)
            if all(row.get(k) == v for k, v in (plain if row["arm"] in ("none", "erm") else key).items())
        ]

    done = {(row["seed"], row["arm"]) for row in rows()}
    settings = Settings(options.data_root, options.weights, options.cache)
    for seed in parse_seeds(options.seeds):
        experiment = Experiment(task, settings, seed, options.held_out, epochs)
        for arm in arms:
            if (seed, arm) not in done:
                row = run(experiment, arm, layers, {"strength": options.strength})
                append_jsonl(path, {**key, "seed": seed, "arm": arm, **row})
    _table(rows(), f"{task.name}, {options.held_out}, strength {options.strength:g}")
    return 0


def _table(rows: list[dict[str, Any]], title: str) -> None:
    columns = ("arm", "seeds", "worst", "mean", "Δ worst", "Δ mean", "gap", "units in all", "cpu s")
    table = Table(*columns, title=title + "; changes against none: mean ± standard error")
    base = {row["seed"]: row for row in rows if row["arm"] == "none"}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        paired = [row for row in mine if row["seed"] in base]
        change = [_change([r[k] - base[r["seed"]][k] for r in paired]) for k in ("worst", "mean")]
        values = [spread([row[k] for row in mine]) for k in ("worst", "mean")]
        gap, ever, cpu = (mean(row[k] for row in mine) for k in ("gap", "touched_in_all", "cpu_s"))
        table.add_row(arm, str(len(mine)), *values, *change, f"{100 * gap:.1f}", f"{ever:.2f}", f"{cpu:.1f}")
    Console().print(table)


def _change(values: list[float]) -> str:
    error = 100 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{100 * mean(values):+.1f} ± {error:.1f}" if values else ""

"""``python -m benchmarks detector``: how well are the minority examples of the training set found?

The minority are the training examples whose true group is not the largest of their class.  Data without a shortcut,
such as ``digits_balanced``, have none: there the verdict counts, and recall and average precision are undefined.  No
method sees a group:

- ``demem``: :func:`demem.groups.detect` on all training examples and the network before training.  Its set is the
  inferred minority, which is empty unless the verdict is a shortcut; its score is the log-odds of the cross-fitted
  probe against the label;
- ``callback``: the groups that :class:`demem.callbacks.MemorizationRemover` trains with: the same on its own examples,
  and where the verdict left it open, from a second look after the first epoch;
- ``loss``: cross-entropy of the network after plain training.  The loss alone draws no line, so that its set is given
  the *true* number of minority examples: those with the largest loss;
- ``jtt``: the errors after one epoch, JTT's fixed choice; the score is the cross-entropy then;
- ``xrm``: XRM's twins.  The set is their cross-mistakes; the score is the cross-entropy of the network that was not
  trained on the example.

Everything is of the whole training set, nothing held out.  Average precision needs no line, and for a score that knows
nothing it is the share of the minority.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.baselines.jtt import FIXED, early_logits
from benchmarks.baselines.xrm_dro import find_twins, read_both
from benchmarks.compare import check_files, parse_seeds, quiet
from benchmarks.experiment import TASKS, Experiment, Settings, Shared
from benchmarks.options import Parser, kept_rows, known_names
from benchmarks.results import append_jsonl, read_jsonl
from benchmarks.rows import spread
from demem.callbacks import MemorizationRemover
from demem.groups import Detection, Groups, ShortcutProbe, detect, largest_groups
from demem.module import Classifier

HELD_OUT = "none"
LARGER = 1.5  # times the next group of the class; else that one is no minority
Row = dict[str, Any]
Found = tuple[Tensor | None, Tensor, Row]
"""A set, bool ``(S,)`` (``None``: the examples with the highest scores), scores ``(S,)``, and what else is recorded."""


def log_odds_against(logits: Tensor, y: Tensor) -> Tensor:
    """Log-odds ``(S,)`` that the class is another one than the label, from logits ``(S, C)``.

    Unlike a probability, it does not round to the same number where the predictor is sure.
    """
    own = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -torch.inf).logsumexp(1) - logits[own]


def minority_of(y: Tensor, group: Tensor, num_classes: int) -> Tensor:
    """Bool ``(S,)``: the examples whose group is not the largest of their class.

    A class in which the largest group is less than 1.5 times the next one has no minority.
    """
    there = torch.zeros(num_classes, dtype=torch.bool)
    for c in y.unique().tolist():
        sizes = torch.bincount(group[y == c]).sort(descending=True).values
        there[c] = len(sizes) > 1 and float(sizes[0]) >= LARGER * float(sizes[1])
    return there[y] & (group != largest_groups(y, group, num_classes)[y])


def measure(minority: Tensor, chosen: Tensor | None, score: Tensor) -> Row:
    """Precision and recall of a set, and average precision of a score, fractions.

    Args:
        minority: bool ``(S,)``, the truth.
        chosen: bool ``(S,)``; ``None`` for as many examples as the minority has, those with the highest scores.
        score: ``(S,)``, high where an example may be of the minority.

    Returns:
        ``None`` is what is undefined: precision of an empty set; recall and average precision without a minority.
    """
    from sklearn.metrics import average_precision_score

    if chosen is None:
        chosen = torch.zeros_like(minority)
        chosen[score.argsort(descending=True, stable=True)[: int(minority.sum())]] = True
    right, size, there = (int(rows.sum()) for rows in (chosen & minority, chosen, minority))
    return {
        "chosen": size,
        "precision": right / size if size else None,
        "recall": right / there if there else None,
        "average_precision": float(average_precision_score(minority, score.double())) if there else None,
    }


def _detect(experiment: Experiment, module: Classifier) -> Detection:
    loader = experiment.data().train_eval_dataloader()
    return detect(module, loader, max_examples=len(loader.dataset))  # type: ignore[arg-type]


def _told(groups: Groups, probe: ShortcutProbe) -> Found:
    told = {name: getattr(groups, name) for name in ("kind", "why", "site", "error", "sure", "epoch")}
    same = (groups.num_classes + 1) * groups.y
    return groups.index != same, log_odds_against(probe.logits.cpu(), groups.y), told


def _demem(experiment: Experiment) -> Found:
    found = _detect(experiment, experiment.module())
    return _told(found.groups, found.probe)


class _Looked(Exception):
    """The callback has its groups; the rest of the training is not needed."""


class _Looks(MemorizationRemover):
    """Keeps its probes, and ends the run after the second look, or the first one if that left nothing open."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.probes: list[ShortcutProbe] = []
        super().on_train_start(trainer, pl_module)

    def detect(self, features: Mapping[str, Tensor], y: Tensor, num_classes: int) -> ShortcutProbe:
        self.probes.append(super().detect(features, y, num_classes))
        return self.probes[-1]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.groups is not None and (trainer.current_epoch > 0 or not self.groups.open):
            raise _Looked


def _callback(experiment: Experiment) -> Found:
    looks, data = _Looks(seed=experiment.seed), experiment.data()
    with contextlib.suppress(_Looked):
        experiment.fit(data=data, callbacks=[looks])
    groups = looks.groups
    assert groups is not None
    assert torch.equal(groups.y, data.train_eval_dataset.y)  # type: ignore[union-attr]
    return _told(groups, next(p for p in reversed(looks.probes) if (p.site, p.error) == (groups.site, groups.error)))


def _loss(experiment: Experiment) -> Found:
    run = experiment.erm()
    return None, log_odds_against(run.logits["train"], run.features.y["train"]), {}


def _jtt(experiment: Experiment) -> Found:
    logits, y = early_logits(experiment, FIXED[0])
    return logits.argmax(1) != y, log_odds_against(logits, y), {"identification_epochs": FIXED[0]}


def _xrm(experiment: Experiment) -> Found:
    twins, found = find_twins(experiment)
    data = experiment.data()
    both, y = read_both(twins.model, data.train_eval_dataloader()), data.train_eval_dataset.y  # type: ignore[union-attr]
    unseen = torch.where(twins.half[:, None], both[:, 1], both[:, 0])  # the first network learns ``half``
    return (both.argmax(2) != y[:, None]).any(1), log_odds_against(unseen, y), found


METHODS: dict[str, Callable[[Experiment], Found]] = {
    "demem": _demem,
    "callback": _callback,
    "loss": _loss,
    "jtt": _jtt,
    "xrm": _xrm,
}


def run(experiment: Experiment, method: str) -> Row:
    """One method on one data set and seed, judged against the true groups.

    Cross-entropy and the log-odds against the label order examples alike, as one is softplus of the other.
    """
    start = time.perf_counter()
    chosen, score, told = METHODS[method](experiment)
    data = experiment.data()
    rows = data.train_eval_dataset
    assert rows is not None  # set up by the experiment
    minority = minority_of(rows.y, rows.group, data.num_classes)
    sizes = {"examples": len(minority), "minority": int(minority.sum())}
    return {**sizes, **measure(minority, chosen, score), **told, "seconds": round(time.perf_counter() - start, 1)}


def main(argv: list[str]) -> int:
    parser = Parser("detector", __doc__)
    parser.add_argument("--data", default="digits", help=f"comma-separated, of {', '.join(TASKS)} (default: digits)")
    parser.add_argument("--data-root", type=Path, help="folder with waterbirds_v1.0, MNIST, FashionMNIST, rt-polarity")
    parser.add_argument("--weights", type=Path, help="MobileNetV2 safetensors file (default: below --data-root)")
    parser.add_argument("--cache", type=Path, help="folder for outputs of frozen layers (default: user cache)")
    parser.add_argument("--epochs", type=int, help="of plain training and of XRM's twins (default: the data set's own)")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--seeds", default="5", help="a number or a list, as in compare (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("results/detector"), help="finished rows there are kept")
    parser.add_argument("--rows", type=Path, help="only print the tables of this file, .jsonl or .jsonl.gz")
    options = parser.parse_args(argv)
    if options.rows:
        _tables(kept_rows(options.rows))
        return 0
    names, seeds = known_names("data", options.data, TASKS), parse_seeds(options.seeds)
    methods = known_names("methods", options.methods, METHODS)
    settings, path = Settings(options.data_root, options.weights, options.cache), options.out / "detector.jsonl"
    for name in names:
        check_files(TASKS[name], settings)
    quiet()
    threads, shown = torch.get_num_threads(), []
    for name in names:
        task = TASKS[name]
        epochs = options.epochs or task.epochs
        torch.set_num_threads(task.threads or threads)

        def rows(name: str = name, epochs: int = epochs) -> list[Row]:
            return [row for row in read_jsonl(path) if (row["data"], row["epochs"]) == (name, epochs)]

        shared = Shared()
        for row in rows():  # a rate of XRM's twins that an earlier run chose
            if "tuned_twins" in row:
                shared.choices[name, "xrm_dro_twins", "val"] = row["tuned_twins"]
        for seed in seeds:
            shared.start_seed()
            done = {row["method"] for row in rows() if row["seed"] == seed}
            experiment = Experiment(task, settings, seed, HELD_OUT, epochs, shared=shared)
            for method in (m for m in methods if m not in done):
                key = {"data": name, "epochs": epochs, "seed": seed, "method": method}
                append_jsonl(path, {**key, **run(experiment, method)})
                print(f"{name} seed {seed} {method}")
        shown += [row for row in rows() if row["seed"] in seeds and row["method"] in methods]
    _tables(shown)
    return 0


def _tables(rows: list[Row]) -> None:
    console = Console()
    columns = ("data", "minority", "method", "seeds", "precision", "recall", "AP")
    table = Table(*columns, title="Minority of the training set: percent, mean ± std over seeds")
    verdicts = Table("data", "method", "verdict", "runs", "why, first of them", title="What demem says")
    for data in dict.fromkeys(row["data"] for row in rows):
        of_data = [row for row in rows if row["data"] == data]
        share = _spread([row["minority"] / row["examples"] for row in of_data])
        for method in (m for m in METHODS if any(row["method"] == m for row in of_data)):
            mine = [row for row in of_data if row["method"] == method]
            values = [_spread([row[key] for row in mine]) for key in ("precision", "recall", "average_precision")]
            table.add_row(data, share, method, str(len(mine)), *values)
        for method in ("demem", "callback"):
            judged = [row for row in of_data if row["method"] == method]
            for kind, count in Counter(row["kind"] for row in judged).most_common():
                why = next(row["why"] for row in judged if row["kind"] == kind)
                verdicts.add_row(data, method, kind, f"{count} of {len(judged)}", why)
    console.print(table)
    if verdicts.row_count:
        console.print(verdicts)


def _spread(values: list[float | None]) -> str:
    """Mean ± standard deviation in percent of what is defined, and how much of it that is."""
    there = [value for value in values if value is not None]
    if not there:
        return "undefined"
    return spread(there) + ("" if len(there) == len(values) else f" ({len(there)} of {len(values)})")

"""``python -m benchmarks situations``: does demem harm a network without a shortcut, and help one with it?

Each situation is a made or real data set without a shortcut, or with one, whose training and validation labels are
wrong for a share of the examples (drawn evenly; test labels are clean).  Plain training and the remover with its
defaults are judged on the same seeds: the worst class where there is no shortcut, else the worst true group, and the
average.  The first target is never to lose: at most 1 point on the mean of the seeds and 2 points in a run.

Those that need no folder: ``digits`` (two classes), ``digits_ten``, ``tokens`` and ``tabular``, and with a shortcut
``digits_ink`` and ``tabular_shortcut``.  Fashion-MNIST below ``--data-root`` adds the others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.baselines import METHODS
from benchmarks.compare import check_files, parse_seeds, quiet
from benchmarks.experiment import TASKS, Experiment, Outcome, Settings, Task, judge
from benchmarks.options import Parser, kept_rows, known_names
from benchmarks.results import HELD_OUT, append_jsonl, read_jsonl
from demem.data import GroupedDataModule, GroupedTensors, load_mnist, make_dominoes, make_spurious_digits
from demem.module import Classifier

Row = dict[str, Any]
Sets = tuple[GroupedTensors, GroupedTensors, GroupedTensors]  # training, validation, test; labels clean
NOISE = (0, 2, 5, 10, 15)  # percent


@dataclass(frozen=True)
class Situation:
    """Data without wrong labels, and the network that learns them.

    Attributes:
        make: gives training, validation and test set from the settings and a seed; the group is the class where there
            is no shortcut.
        module: gives a fresh network, as that of a :class:`benchmarks.experiment.Task`.
        epochs: of training.
        shortcut: whether there is one.
        files: what must be below ``--data-root``.
    """

    make: Callable[[Settings, int], Sets]
    module: Callable[..., Classifier]
    epochs: int
    shortcut: bool = False
    files: tuple[str, ...] = ()

    def task(self, name: str, noise: int) -> Task:
        """A task of the comparison, with this percentage of wrong labels."""

        def data(settings: Settings, seed: int, **kwargs: Any) -> GroupedDataModule:
            train, val, test = self.make(settings, seed)
            classes, groups = int(test.y.max()) + 1, int(test.group.max()) + 1
            # Seeds apart from those of the slice, which would else hold just the examples with wrong labels.
            wrong = [mislabelled(r, noise / 100, classes, 10_000 + 2 * seed + i) for i, r in enumerate((train, val))]
            return GroupedDataModule(*wrong, test, num_classes=classes, num_groups=groups, seed=seed, **kwargs)

        return Task(f"{name}_{noise}", self.epochs, data, self.module, self.files, threads=1)


def mislabelled(rows: GroupedTensors, share: float, num_classes: int, seed: int) -> GroupedTensors:
    """The same examples, of which ``share`` have another class's label; groups stay the true ones."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(rows), generator=generator)[: round(share * len(rows))]
    y = rows.y.clone()
    y[wrong] = (y[wrong] + torch.randint(1, num_classes, wrong.shape, generator=generator)) % num_classes
    return GroupedTensors(rows.views, y, rows.group, rows.positions)


# The data


def _split(x: Tensor, y: Tensor, sizes: tuple[int, int, int], seed: int) -> Sets:
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).split([*sizes, len(y) - sum(sizes)])
    train, val, test = (GroupedTensors(x[rows], y[rows], y[rows]) for rows in order[:3])
    return train, val, test


def _digits(settings: Settings, seed: int, classes: int) -> Sets:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.from_numpy((digits.images / 16).astype(np.float32))[:, None].expand(-1, 3, -1, -1)
    y = torch.from_numpy(digits.target.astype(np.int64))
    return _split(x, y if classes == 10 else (y >= 5).long(), (990, 270, 537), seed)


def _ink(settings: Settings, seed: int) -> Sets:
    return make_spurious_digits(0.95, seed)


def _fashion(settings: Settings, seed: int, sizes: dict[int, int]) -> Sets:
    """``sizes``: training examples of each class; validation has the same shares, the test set is Fashion-MNIST's."""
    root, generator = settings.root("situations"), torch.Generator().manual_seed(seed)
    sets = []
    for split in ("train", "val", "test"):
        images, labels = load_mnist(root, split != "test", fashion=True)
        rows, classes = [], []
        for i, (label, size) in enumerate(sizes.items()):
            members = torch.from_numpy(np.flatnonzero(labels == label))
            if split != "test":  # the same order for both, so that they are disjoint
                order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed * 10 + label))
                part = {"train": slice(0, size), "val": slice(size, size + max(2, size // 4))}[split]
                members = members[order[part]]
            rows.append(members)
            classes.append(torch.full((len(members),), i))
        y = torch.cat(classes)
        order = torch.randperm(len(y), generator=generator)
        x = torch.from_numpy(images[torch.cat(rows).numpy()])[:, None].expand(-1, 3, -1, -1)
        sets.append(GroupedTensors(x[order], y[order], y[order]))
    return sets[0], sets[1], sets[2]


def _dominoes(settings: Settings, seed: int) -> Sets:
    return make_dominoes(settings.root("situations"), 0.95, train_size=3000, seed=seed)


def _tokens(settings: Settings, seed: int) -> Sets:
    """Texts of 24 of 400 words that follow Zipf's law; six are of the class, where 40 words of each class prevail."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (4500,), generator=generator)
    common = torch.multinomial(1 / torch.arange(1, 321.0), 4500 * 24, True, generator=generator).view(4500, 24)
    own = torch.where(torch.rand(4500, 6, generator=generator) < 0.75, y[:, None], 1 - y[:, None])
    common[:, :6] = 320 + 40 * own + torch.randint(40, own.shape, generator=generator)
    x = common.gather(1, torch.rand(common.shape, generator=generator).argsort(1))
    return _split(x.float(), y, (2000, 500, 2000), seed)


def _tabular(settings: Settings, seed: int) -> Sets:
    from sklearn.datasets import make_classification

    x, y = make_classification(4500, 20, n_informative=6, n_redundant=4, class_sep=1.5, random_state=seed)
    return _split(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y), (2000, 500, 2000), seed)


def _tabular_shortcut(settings: Settings, seed: int) -> Sets:
    """The same with a last column that goes with the class for 95% of the training examples, else for half."""
    sets = []
    for i, (rows, agreement) in enumerate(zip(_tabular(settings, seed), (0.95, 0.5, 0.5), strict=True)):
        generator = torch.Generator().manual_seed(3 * seed + i)
        attribute = torch.where(torch.rand(len(rows), generator=generator) < agreement, rows.y, 1 - rows.y)
        column = 6.0 * attribute - 3 + torch.randn(len(rows), generator=generator)
        sets.append(GroupedTensors(torch.cat([rows.views[0], column[:, None]], 1), rows.y, 2 * rows.y + attribute))
    return sets[0], sets[1], sets[2]


class _Texts(nn.Module):
    """A transformer block over word embeddings, and the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(400, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(self.embedding(x.long())).mean(1))
        return logits


def _texts(settings: Settings, **options: Any) -> Classifier:
    return Classifier(_Texts(), **{**_ADAM, **options})


def _mlp(columns: int) -> Callable[..., Classifier]:
    def make(settings: Settings, **options: Any) -> Classifier:
        layers = nn.Linear(columns, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        return Classifier(nn.Sequential(*layers), **{**_ADAM, **options})

    return make


def _fashion_situation(sizes: dict[int, int]) -> Situation:
    module = partial(_CNN, num_classes=len(sizes))
    return Situation(partial(_fashion, sizes=sizes), module, 10, files=_FASHION)


_CNN, _RESNET = TASKS["digits"].module, TASKS["dominoes"].module
_FASHION = ("FashionMNIST/raw",)
_ADAM = {"optimizer": "adam", "lr": 1e-3}
SITUATIONS = {
    "digits": Situation(partial(_digits, classes=2), _CNN, 20),
    "digits_ten": Situation(partial(_digits, classes=10), partial(_CNN, num_classes=10), 20),
    "tokens": Situation(_tokens, _texts, 10),
    "tabular": Situation(_tabular, _mlp(20), 15),
    "easy_pair": _fashion_situation({1: 1000, 8: 1000}),
    "overlapping_pair": _fashion_situation({4: 1000, 6: 1000}),
    "imbalance": _fashion_situation({1: 3000, 8: 30}),
    "ten_classes": _fashion_situation(dict.fromkeys(range(10), 400)),
    "long_tail": _fashion_situation({c: round(1000 * 0.01 ** (c / 9)) for c in range(10)}),
    "digits_ink": Situation(_ink, _CNN, 20, shortcut=True),
    "tabular_shortcut": Situation(_tabular_shortcut, _mlp(21), 15, shortcut=True),
    "dominoes": Situation(_dominoes, _RESNET, 10, shortcut=True, files=("MNIST/raw", *_FASHION)),
}
"""The situations by name."""


# The runs


def run(experiment: Experiment) -> Row:
    """Plain training and the remover on one data set, held-out source and seed."""
    start = time.perf_counter()
    method = next(m for m in METHODS if (m.name, m.tier) == ("demem", "T0") and experiment.held_out in m.held_out)
    outcome = method.run(experiment)
    # Validated as the remover's run is, which moves the random state: a network that is left alone is the same.
    plain = Outcome(experiment.fit(validate=True).logits)
    judged = {"erm": judge(plain, experiment.data()), "demem": judge(outcome, experiment.data())}
    accuracies = {f"{arm}_{name}": of[f"{name}_acc"] for arm, of in judged.items() for name in ("worst_group", "avg")}
    return {**accuracies, **outcome.config, "seconds": round(time.perf_counter() - start, 1)}


def main(argv: list[str]) -> int:
    without = ",".join(name for name, situation in SITUATIONS.items() if not situation.files)
    parser = Parser("situations", __doc__)
    parser.add_argument("--data", default=without, help=f"of {', '.join(SITUATIONS)}, or all (default: {without})")
    parser.add_argument("--data-root", type=Path, help="folder with FashionMNIST (and MNIST, for dominoes)")
    parser.add_argument(
        "--noise", default=",".join(map(str, NOISE)), help="percent of wrong labels (default: %(default)s)"
    )
    parser.add_argument("--held-out", default="iid", help=f"comma-separated, of {', '.join(HELD_OUT)} (default: iid)")
    parser.add_argument("--seeds", default="5", help="a number or a list, as in compare (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("results/situations"), help="finished rows there are kept")
    parser.add_argument("--rows", type=Path, help="only print the tables of this file, .jsonl or .jsonl.gz")
    options = parser.parse_args(argv)
    if options.rows:
        _tables(kept_rows(options.rows))
        return 0
    names = list(SITUATIONS) if options.data == "all" else known_names("data", options.data, SITUATIONS)
    sources = known_names("held-out", options.held_out, HELD_OUT)
    noise = [int(part) for part in options.noise.split(",")]
    if not all(0 <= share <= 50 for share in noise):
        raise ValueError(f"--noise takes percentages from 0 to 50, got {options.noise}.")
    settings, path = Settings(options.data_root), options.out / "situations.jsonl"
    for name in names:
        if SITUATIONS[name].files:
            settings.root(name)  # says so if there is none
        check_files(SITUATIONS[name].task(name, 0), settings)
    quiet()
    torch.set_num_threads(1)
    keys = [
        {"data": name, "noise": share, "held_out": source, "seed": seed}
        for name in names
        for seed in parse_seeds(options.seeds)
        for share in noise
        for source in sources
    ]
    done = [{key: row[key] for key in keys[0]} for row in read_jsonl(path)]
    for key in (key for key in keys if key not in done):
        task = SITUATIONS[key["data"]].task(key["data"], key["noise"])
        experiment = Experiment(task, settings, key["seed"], key["held_out"])
        append_jsonl(path, {**key, "shortcut": SITUATIONS[key["data"]].shortcut, **run(experiment)})
        print(" ".join(str(value) for value in key.values()))
    _tables([row for row in read_jsonl(path) if {key: row[key] for key in keys[0]} in keys])
    return 0


# The tables


def _tables(rows: list[Row]) -> None:
    console = Console()
    for there, title in ((False, "No shortcut: worst class"), (True, "A shortcut: worst group")):
        mine = [row for row in rows if row["shortcut"] is there]
        if mine:
            console.print(_table(mine, f"{title} and average in percent, demem minus plain training: mean (worst run)"))
    console.print(*_sentences(rows), sep="\n")


def _table(rows: list[Row], title: str) -> Table:
    table = Table("data", "wrong", "held out", "runs", "plain", "demem", "worst", "average", "verdicts", title=title)
    cells = dict.fromkeys((row["data"], row["noise"], row["held_out"]) for row in rows)
    for data, noise, source in cells:
        mine = [row for row in rows if (row["data"], row["noise"], row["held_out"]) == (data, noise, source)]
        kinds = Counter(row["probe"]["kind"] for row in mine).most_common()
        table.add_row(
            data,
            f"{noise}%",
            source,
            str(len(mine)),
            *(f"{100 * mean(row[f'{arm}_worst_group'] for row in mine):.1f}" for arm in ("erm", "demem")),
            *(_change(mine, what) for what in ("worst_group", "avg")),
            ", ".join(f"{kind} {count}" for kind, count in kinds),
        )
    return table


def _gains(rows: list[Row], what: str) -> list[float]:
    return [100 * (row[f"demem_{what}"] - row[f"erm_{what}"]) for row in rows]


def _change(rows: list[Row], what: str) -> str:
    gains = _gains(rows, what)
    return f"{mean(gains):+.1f} ({min(gains):+.1f})"


def _sentences(rows: list[Row]) -> list[str]:
    """What the targets ask for, in words."""
    without = [row for row in rows if not row["shortcut"]]
    if not without:
        return []
    false = sum(row["probe"]["shortcut"] for row in without)
    lost = sum(min(_gains([row], "worst_group") + _gains([row], "avg")) < -2 for row in without)
    return [
        f"Of {len(without)} runs without a shortcut, {false} found one, and {lost} lost more than 2 points "
        "in worst class or average."
    ]

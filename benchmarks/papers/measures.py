"""``python -m benchmarks papers measures``: the experiments of Bansal et al. 2022, and the measures over epochs.

Every trained network appends a row to ``runs.jsonl`` as soon as it is measured; a second start goes on from there.
``papers.jsonl``, the tables and the figures are made from those rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.results import append_jsonl, read_jsonl
from demem.linear import few_of_each_group
from demem.measures import TiesWarning, collect_activations, mean_mi, measure_diversity, mutual_information
from demem.metrics import group_accuracy_compute, group_accuracy_update

DIRECTIONS = {"heuristic": {"mean_h": 1, "mean_mi": -1}, "example-level": {"mean_h": -1, "mean_mi": 1}}
MEASURES = ("mean_h", "median_h", "mean_mi", "median_mi", "mean_binned_mi", "mean_quantile_mi")


@dataclass(frozen=True)
class Series:
    """One of the paper's series: networks that differ in how much there is to memorise.

    Attributes:
        kind: which memorization the levels add.
        levels: of the third feature's agreement, the colour's flips, or the shuffled share.
        sites: where activations are read.
        bins: of the entropy.
        paper_tau: Kendall τ in the paper's table 2.
        train: (level, seed, options) to network, activations' inputs, row.
    """

    name: str
    kind: str
    levels: tuple[float, ...]
    sites: tuple[str, ...]
    bins: int
    paper_tau: dict[str, float]
    train: Callable[[float, int, argparse.Namespace], tuple[nn.Module, Tensor, dict[str, Any]]]
    needs_data: bool = True


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks papers measures", description=__doc__)
    parser.add_argument("--data-root", type=Path, help="folder with MNIST and waterbirds_v1.0; circles need none")
    parser.add_argument("--out", type=Path, default=Path("results/papers_measures"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[*(s.name for s in SERIES), "waterbirds_epochs"])
    parser.add_argument("--epochs", type=int, default=20, help="of the MNIST networks (shuffled: three times as many)")
    parser.add_argument("--train-size", type=int, default=50_000, help="training images of Colored MNIST")
    parser.add_argument("--shuffled-train-size", type=int, default=20_000, help="training images of Shuffled MNIST")
    parser.add_argument("--circles-epochs", type=int, default=200, help="on 1,000 points (shuffled: 20 × on 100)")
    parser.add_argument("--mi-units", type=int, default=192, help="units in the KSG matrix, drawn with the seed")
    parser.add_argument("--mi-samples", type=int, default=2_500)
    parser.add_argument("--waterbirds-epochs", type=int, default=10)
    parser.add_argument("--per-group", type=int, default=400, help="Waterbirds images of a group and split, at most")
    parser.add_argument("--cache", type=Path, help="folder for Waterbirds' frozen-layer outputs")
    parser.add_argument("--weights", type=Path, help="MobileNetV2 weights (default: below --data-root)")
    options = parser.parse_args(argv)

    rows = options.out / "runs.jsonl"
    known = {(r["experiment"], r["level"], r["seed"]) for r in read_jsonl(rows)}
    for series in SERIES:
        if options.only and series.name not in options.only:
            continue
        if series.needs_data and options.data_root is None:
            print(f"{series.name}: skipped, it reads MNIST: pass --data-root.")
            continue
        for seed in range(options.seeds):
            for level in series.levels:
                if (series.name, level, seed) not in known:
                    row = run(series, level, seed, options)
                    append_jsonl(rows, row)
                    print(json.dumps(row), flush=True)
    if (not options.only or "waterbirds_epochs" in options.only) and options.data_root is not None:
        if not (options.data_root / "waterbirds_v1.0").is_dir():
            print("waterbirds_epochs: skipped, there is no waterbirds_v1.0 below --data-root.")
        else:
            for seed in range(options.seeds):
                if ("waterbirds_epochs", None, seed) not in known:
                    append_jsonl(rows, waterbirds_epochs(seed, options))
    report(options.out)
    return 0


def run(series: Series, level: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one network and measure it on unlabelled examples."""
    start = time.perf_counter()
    model, inputs, row = series.train(level, seed, options)
    x = collect_activations(model, inputs.split(2000), series.sites, max_samples=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TiesWarning)  # the circles are read after their ReLU, as in the paper
        d = measure_diversity(x, series.bins, max_units=options.mi_units, max_mi_samples=options.mi_samples, seed=0)
    chosen = {name: x[name][: options.mi_samples, units] for name, units in d.mi_units.items()}
    h, off = torch.cat(list(d.entropy.values())), ~torch.eye(len(d.mutual_information), dtype=torch.bool)
    if seed == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        torch.save(
            {"entropy": d.entropy, "mi": d.mutual_information, "units": d.mi_units, "samples": d.num_samples},
            options.out / f"{series.name}_{level}.pt",
        )
    return {
        "experiment": series.name,
        "level": level,
        "seed": seed,
        **row,
        "mean_h": d.mean_entropy,
        "median_h": float(h.median()),
        "mean_mi": d.mean_mi,
        "median_mi": float(d.mutual_information[off].median()),
        "mean_binned_mi": float(mean_mi(mutual_information(chosen, series.bins))),
        "mean_quantile_mi": float(
            mean_mi(mutual_information(chosen, 16, "quantile", correction="miller_madow"), False)
        ),
        "site_h": {name: float(v.mean()) for name, v in d.entropy.items()},
        "mi_units": len(d.mutual_information),
        "samples": len(inputs),
        "mi_samples": d.num_samples,
        "seconds": round(time.perf_counter() - start, 2),
    }


# The paper's data and networks


def circles(size: int, agreement: float, generator: Any) -> tuple[Tensor, Tensor]:
    """Two circles, and a third feature ±1 that agrees with the label for a share of the points."""
    from sklearn.datasets import make_circles

    x, y = make_circles(size, noise=0.2, factor=0.4, random_state=generator)
    agrees = generator.random_sample(size) < agreement
    third = torch.from_numpy((2 * y - 1) * (2 * agrees - 1))
    return torch.cat([torch.from_numpy(x), third[:, None]], 1).float(), torch.from_numpy(y)


def train_circles_artefact(level: float, seed: int, options: argparse.Namespace) -> Any:
    import numpy as np

    generator = np.random.RandomState(seed)
    x, y = circles(1000, level, generator)
    model = mlp([3, 16, 16, 2], seed)
    accuracy, epochs = fit(model, x, y, epochs=options.circles_epochs, batch=100, seed=seed, lr=1e-2)
    same, plain = circles(2000, level, generator), circles(2000, 0.5, generator)
    row = {"train_acc": accuracy, "extrinsic": accuracy_of(model, *plain), "iid_acc": accuracy_of(model, *same)}
    return model, same[0], {**row, "epochs": epochs}


def train_circles_shuffle(level: float, seed: int, options: argparse.Namespace) -> Any:
    import numpy as np

    generator = np.random.RandomState(seed)
    x, y = (t for t in circles(100, 0.5, generator))
    noisy = shuffled(y, level, seed)
    model = mlp([2, 16, 16, 2], seed)
    accuracy, epochs = fit(model, x[:, :2], noisy, epochs=20 * options.circles_epochs, batch=100, seed=seed, lr=1e-2)
    xt, yt = circles(2000, 0.5, generator)
    row = {"train_acc": accuracy, "extrinsic": accuracy_of(model, xt[:, :2], yt), "epochs": epochs}
    return model, xt[:, :2], row


def train_colored_mnist(level: float, seed: int, options: argparse.Namespace, penalty: float = 0.002) -> Any:
    x, y = mnist(options)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    part, held = order[: options.train_size], order[-10_000:]
    train = colour(x[part], y[part], level, generator)
    model = mlp([392, 256, 256, 256, 2], seed)
    accuracy, epochs = fit(model, *train, epochs=options.epochs, batch=512, seed=seed, penalty=penalty)
    state = generator.get_state()
    shifted = colour(x[held], y[held], 0.5, generator)
    generator.set_state(state)
    same = colour(x[held], y[held], level, generator)
    row = {"train_acc": accuracy, "extrinsic": accuracy_of(model, *shifted), "iid_acc": accuracy_of(model, *same)}
    return model, same[0], {**row, "epochs": epochs, "penalty": penalty, "train_size": len(part)}


def train_shuffled_mnist(level: float, seed: int, options: argparse.Namespace) -> Any:
    x, y = mnist(options)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    part, held = order[: options.shuffled_train_size], order[-10_000:]
    model = mlp([784, 256, 256, 256, 10], seed)
    accuracy, epochs = fit(
        model, x[part].flatten(1), shuffled(y[part], level, seed, 10), epochs=3 * options.epochs, batch=512, seed=seed
    )
    row = {"train_acc": accuracy, "extrinsic": accuracy_of(model, x[held].flatten(1), y[held])}
    return model, x[held].flatten(1), {**row, "epochs": epochs, "train_size": len(part)}


def mnist(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import MNIST

    data = MNIST(str(options.data_root), train=True)
    return data.data.float() / 255, data.targets


def colour(x: Tensor, y: Tensor, flips: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """2×14×14 images whose colour is the noisy label, flipped for a share of them (Arjovsky et al. 2019)."""
    label = (y < 5) ^ (torch.rand(len(y), generator=generator) < 0.25)
    red = label ^ (torch.rand(len(y), generator=generator) < flips)
    images = x[:, None, ::2, ::2].repeat(1, 2, 1, 1)
    images[torch.arange(len(y)), 1 - red.long()] = 0
    return images.flatten(1), label.long()


def shuffled(y: Tensor, share: float, seed: int, classes: int = 2) -> Tensor:
    """Labels, a share of them redrawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    redrawn = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    y = y.clone()
    y[redrawn] = torch.randint(classes, (len(redrawn),), generator=generator)
    return y


def mlp(widths: list[int], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    batch: int,
    seed: int,
    lr: float = 1e-3,
    penalty: float = 0.0,
    stop: float = 0.999,
) -> tuple[float, int]:
    """Adam until the training accuracy of an epoch reaches ``stop``; returns it and the number of epochs."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    accuracy, epoch = 0.0, 0
    while epoch < epochs and accuracy < stop:
        correct, epoch = 0, epoch + 1
        for part in torch.randperm(len(x), generator=generator).split(batch):
            logits = model(x[part])
            loss = F.cross_entropy(logits, y[part])
            correct += int((logits.argmax(1) == y[part]).sum())
            if penalty:
                loss = loss + penalty * torch.stack([p.square().sum() for p in model.parameters()]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy = correct / len(x)
    return accuracy, epoch


@torch.no_grad()
def accuracy_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


SERIES = (
    Series(
        "circles_artefact",
        "heuristic",
        (0.5, 0.65, 0.75, 0.9, 1.0),
        ("1", "3"),
        20,
        {},
        train_circles_artefact,
        False,
    ),
    Series(
        "circles_shuffle",
        "example-level",
        (0.0, 0.25, 0.5, 0.75, 1.0),
        ("1", "3"),
        20,
        {},
        train_circles_shuffle,
        False,
    ),
    Series(
        "colored_mnist",
        "heuristic",
        (0.5, 0.375, 0.25, 0.125, 0.0),
        ("0", "2", "4"),
        100,
        {"mean_h": 1.0, "mean_mi": 1.0},
        train_colored_mnist,
    ),
    # The penalty keeps the network from fitting single examples; without it both kinds of memorization compete.
    Series(
        "colored_mnist_no_penalty",
        "heuristic",
        (0.5, 0.375, 0.25, 0.125, 0.0),
        ("0", "2", "4"),
        100,
        {},
        partial(train_colored_mnist, penalty=0.0),
    ),
    Series(
        "shuffled_mnist",
        "example-level",
        (0.0, 0.25, 0.5, 0.75, 1.0),
        ("0", "2", "4"),
        100,
        {"mean_h": 1.0, "mean_mi": 0.88},
        train_shuffled_mnist,
    ),
)


# What the paper did not do: the epochs of one run


def waterbirds_epochs(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """ERM on Waterbirds with both measures on validation images after each epoch, beside the memorization gap."""
    import pytorch_lightning as pl

    from benchmarks.experiment import TASKS, Experiment, Settings
    from demem.callbacks import ActivationDiversityMonitor

    class Groups(pl.Callback):
        """Accuracy by group on training, validation and test data after each epoch."""

        def __init__(self) -> None:
            self.rows: list[dict[str, list[float]]] = []

        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            data = trainer.datamodule
            splits = {"train": data.train_eval_dataset, "val": data.val_dataset, "test": data.test_dataset}
            row = {}
            for split, dataset in splits.items():
                few = (
                    few_of_each_group(dataset.group, options.per_group, torch.Generator().manual_seed(0)).sort().values
                )
                correct, total = 0, 0
                for part in few.split(256):
                    x, y, group = dataset.rows(part)
                    counts = group_accuracy_update(pl_module(x), y, group, data.num_groups)
                    correct, total = correct + counts[0], total + counts[1]
                row[split] = group_accuracy_compute(correct, total).tolist()
            self.rows.append(row)

    start = time.perf_counter()
    monitor, groups = ActivationDiversityMonitor(max_examples=2000), Groups()
    experiment = Experiment(TASKS["waterbirds"], Settings(options.data_root, options.weights, options.cache), seed)
    experiment.fit(callbacks=[monitor, groups], epochs=options.waterbirds_epochs)
    return {
        "experiment": "waterbirds_epochs",
        "level": None,
        "seed": seed,
        "epochs": [
            {**measured, **{f"{split}_group_acc": acc for split, acc in row.items()}}
            for measured, row in zip(monitor.history, groups.rows, strict=True)
        ],
        "seconds": round(time.perf_counter() - start, 1),
    }


def epoch_findings(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Per run: τ of each measure with the memorization gap, and the test accuracy of the epoch that it picks."""
    names = [n for n in runs[0]["epochs"][0] if n.startswith("diversity/")]
    for name in names:
        taus, gains, picks = [], {"min": [], "max": []}, {"min": [], "max": []}
        for r in runs:
            epochs = r["epochs"]
            values = [e[name] for e in epochs]
            gap = [e["train_group_acc"] for e in epochs]
            gaps = [min(train) - min(e["test_group_acc"]) for train, e in zip(gap, epochs, strict=True)]
            taus.append(tau(values, gaps))
            last = min(epochs[-1]["test_group_acc"])
            for way, best in (("min", min), ("max", max)):
                at = values.index(best(values))
                picks[way].append(at + 1)
                gains[way].append(min(epochs[at]["test_group_acc"]) - last)
        yield {
            "experiment": "waterbirds_epochs",
            "measure": name,
            "kendall_tau": None if None in taus else sum(taus) / len(taus),
            "paper_tau": None,
            "seeds": len(runs),
            "tau_by_seed": taus,
            **{f"pick_{way}_epochs": picks[way] for way in picks},
            **{f"pick_{way}_worst_group_gain": sum(g) / len(g) for way, g in gains.items()},
        }


# Tables and figures


def report(out: Path) -> None:
    """Write ``papers.jsonl``, ``papers.md`` and the figures from ``runs.jsonl``."""
    runs = read_jsonl(out / "runs.jsonl")
    summary: list[dict[str, Any]] = []
    for series in SERIES:
        mine = [r for r in runs if r["experiment"] == series.name]
        by_level = {level: [r for r in mine if r["level"] == level] for level in series.levels}
        if not all(by_level.values()):
            continue

        def mean(name: str, rows: list[dict[str, Any]]) -> float:
            return sum(r[name] for r in rows) / len(rows)

        extrinsic = [mean("extrinsic", rows) for rows in by_level.values()]
        for measure in MEASURES:
            sign = DIRECTIONS[series.kind]["mean_h" if measure.endswith("_h") else "mean_mi"]
            seeds = sorted({r["seed"] for r in mine})
            single = []
            for seed in seeds:
                rows = [r for r in mine if r["seed"] == seed]
                if len(rows) == len(series.levels):
                    single.append(tau([sign * r[measure] for r in rows], [r["extrinsic"] for r in rows]))
            values = [mean(measure, rows) for rows in by_level.values()]
            summary.append(
                {
                    "experiment": series.name,
                    "measure": measure,
                    "kendall_tau": tau([sign * v for v in values], extrinsic),
                    "paper_tau": series.paper_tau.get(measure),
                    "seeds": len(seeds),
                    "tau_by_seed": single,
                    "levels": list(by_level),
                    "values": values,
                    "extrinsic": extrinsic,
                    "expected": f"{series.kind}: {'+' if sign > 0 else '-'} with held-out accuracy",
                }
            )
    epochs = [r for r in runs if r["experiment"] == "waterbirds_epochs"]
    if epochs:
        summary += epoch_findings(epochs)
    if not summary:
        return
    path = out / "papers.jsonl"
    names = {row["experiment"] for row in summary}
    others = [row for row in read_jsonl(path) if row.get("experiment") not in names]
    path.unlink(missing_ok=True)
    for row in [*others, *summary]:
        append_jsonl(path, row)
    text = table(summary)
    (out / "papers_measures.md").write_text(text)
    print(text)
    figures(out, runs)


def tau(values: list[float], other: list[float]) -> float | None:
    """Kendall's τ-b; ``None`` where one side is constant."""
    from scipy.stats import kendalltau

    value = float(kendalltau(values, other).statistic)
    return None if math.isnan(value) else value


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def table(summary: list[dict[str, Any]]) -> str:
    lines = [
        "τ is positive where the measure moves as the paper says: with heuristic memorization (less held-out accuracy)",
        "entropy falls and mutual information rises, with example-level memorization the reverse.",
        "",
        "| experiment | measure | τ of the means | τ by seed | paper's τ | seeds | values by level |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        by_seed = " ".join(map(number, row["tau_by_seed"]))
        paper = number(row["paper_tau"])
        values = " ".join(f"{v:.3f}" for v in row.get("values", []))
        if "pick_min_worst_group_gain" in row:
            gains = (row["pick_min_worst_group_gain"], row["pick_max_worst_group_gain"])
            values = "worst group against the last epoch: smallest {:+.3f}, largest {:+.3f}".format(*gains)
        lines.append(
            f"| {row['experiment']} | {row['measure']} | {number(row['kendall_tau'])} | {by_seed} "
            f"| {paper} | {row['seeds']} | {values} |"
        )
    return "\n".join(lines) + "\n"


def figures(out: Path, runs: list[dict[str, Any]]) -> None:
    from demem.measures import Diversity
    from demem.measures.plots import plot_diversity, plot_history

    for series in SERIES:
        saved = {level: out / f"{series.name}_{level}.pt" for level in series.levels}
        if all(path.is_file() for path in saved.values()):
            loaded = {str(level): torch.load(path) for level, path in saved.items()}
            shown = {n: Diversity(s["entropy"], s["mi"], s["units"], s["samples"]) for n, s in loaded.items()}
            figure, _ = plot_diversity(shown)
            figure.suptitle(series.name.replace("_", " "))
            figure.savefig(out / f"{series.name}.png", dpi=120)
    epochs = [r["epochs"] for r in runs if r["experiment"] == "waterbirds_epochs"]
    if epochs:
        curves = {}
        for name in ("diversity/entropy", "diversity/mi"):
            curves[name] = [sum(e[i][name] for e in epochs) / len(epochs) for i in range(len(epochs[0]))]
        curves["memorization gap (fraction)"] = [
            sum(min(e[i]["train_group_acc"]) - min(e[i]["test_group_acc"]) for e in epochs) / len(epochs)
            for i in range(len(epochs[0]))
        ]
        figure, _ = plot_history(curves, x=range(1, len(epochs[0]) + 1))
        figure.savefig(out / "waterbirds_epochs.png", dpi=120)

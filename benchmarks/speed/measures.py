"""``python -m benchmarks speed measures``: the estimators beside scikit-learn and beside their floor.

Ours and the reference take turns, so that whatever else the machine does meets both; the ratio is the median over the
rounds.  The reference is timed on a sample of pairs or units and scaled.  Each row of ``speed.jsonl``: what, ours_s,
reference, reference_s, ratio, ratio_low, ratio_high, floor_s, floor, max_abs_error; and the CPU seconds of both, with
the ratio that they give if our threads have a core each (on a busy machine the clock says more about the others).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.options import Parser
from benchmarks.results import append_jsonl
from demem.measures import activation_codes, entropy, ksg_mutual_information, mutual_information

Pairs = list[tuple[int, int]]


def main(argv: list[str]) -> int:
    parser = Parser("speed measures", __doc__)
    parser.add_argument("--out", type=Path, default=Path("results/speed"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--epochs", type=int, default=8, help="of training for the monitor, every second one watched")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for name in options.only:
        for row in BENCHMARKS[name](options):
            row = {**row, "threads": options.threads, "rounds": options.rounds}
            append_jsonl(options.out / "speed.jsonl", row)
            print(json.dumps(row), flush=True)
    return 0


def binned(options: argparse.Namespace) -> list[dict[str, Any]]:
    """768 units × 2,500 samples; scikit-learn's mutual_info_score looped over the pairs."""
    from sklearn.metrics import mutual_info_score

    x = units(2500, 768)
    rows = []
    for bins in (30, 100):
        codes = activation_codes(x, bins, "global").numpy()
        found: dict[str, Tensor] = {}
        ours, theirs, errors = take_turns(
            lambda bins=bins, found=found: found.update(m=mutual_information(x, bins)),
            lambda i, j, codes=codes: mutual_info_score(codes[i], codes[j]),
            lambda i, j, found=found: float(found["m"][i, j]),
            sample_of_pairs(768, 200),
            options.rounds,
        )
        all_pairs = 768 * 769 / 2
        counts = all_pairs * 2500
        torch.set_num_threads(1)
        each = best_of(lambda: torch.bincount(TABLE, minlength=1000)) / len(TABLE)
        torch.set_num_threads(options.threads)
        rows.append(
            result(
                f"binned MI, 768 units × 2,500 samples × {bins} bins",
                ours,
                "sklearn.metrics.mutual_info_score",
                theirs.times(all_pairs),
                counts * each / options.threads,
                f"{counts:.2e} counts, one a sample and pair, at {each * 1e9:.2f} ns (torch.bincount, small table)",
                errors,
            )
        )
    return rows


def ksg(options: argparse.Namespace) -> list[dict[str, Any]]:
    """384 units × 2,500 samples; scikit-learn's continuous estimator looped over the pairs."""
    from sklearn.feature_selection._mutual_info import _compute_mi_cc

    x = units(2500, 384)
    columns = x.double().numpy().T.copy()
    found: dict[str, Tensor] = {}
    ours, theirs, errors = take_turns(
        lambda: found.update(m=ksg_mutual_information(x)),
        lambda i, j: _compute_mi_cc(columns[i], columns[j], 3),
        lambda i, j: float(found["m"][i, j]),
        sample_of_pairs(384, 60),
        options.rounds,
    )
    pairs = 384 * 385 / 2
    # Four searches of log2 S halving steps for the marginal counts (a look-up, a comparison, an addition each), and for
    # the joint neighbours k + 1 distances (three operations) at least.
    operations = pairs * 2500 * (4 * 3 * np.log2(2500) + 3 * 4)
    small = np.random.default_rng(0).normal(size=10_000)
    each = best_of(lambda: np.add(small, small, out=small)) / len(small)
    return [
        result(
            "KSG MI, 384 units × 2,500 samples, k = 3",
            ours,
            "sklearn.feature_selection._mutual_info._compute_mi_cc",
            theirs.times(pairs),
            operations * each / options.threads,
            f"{operations:.2e} elementary operations at {each * 1e9:.2f} ns (numpy, in cache)",
            errors,
        )
    ]


def entropies(options: argparse.Namespace) -> list[dict[str, Any]]:
    """4,608 units × 10,000 samples; numpy.histogram looped over the units."""
    torch.manual_seed(0)
    x = torch.randn(10_000, 4608)
    low, high = float(x.min()), float(x.max())

    def reference(i: int, _: int) -> float:
        p = np.histogram(x[:, i].double().numpy(), 100, (low, high))[0] / len(x)
        p = p[p > 0]
        return float(-(p * np.log(p)).sum())

    found: dict[str, Tensor] = {}
    ours, theirs, errors = take_turns(
        lambda: found.update(h=entropy(x)),
        reference,
        lambda i, _: float(found["h"][i]),
        [(i, i) for i in range(0, 4608, 46)],
        options.rounds,
    )
    read = best_of(lambda: x.sum())
    return [
        result(
            "entropy, 4,608 units × 10,000 samples × 100 bins",
            ours,
            "numpy.histogram",
            theirs.times(4608),
            2 * read,
            f"two readings of {x.numel() * 4 / 1e6:.0f} MB (range, counts) at {read:.4f} s each (torch.sum)",
            errors,
        )
    ]


def monitor(options: argparse.Namespace) -> list[dict[str, Any]]:
    """ActivationDiversityMonitor at its defaults on every second epoch of one fit with the sizes of Waterbirds.

    Random numbers stand in for the 96×10×10 outputs of the frozen layers: the time is that of the real ones.  CPU time
    of the process, all threads together, so that other work on the machine counts less.  An epoch is 75 training steps,
    timed on 15, and the validation, timed whole and alternately with and without the monitor.
    """
    import pytorch_lightning as pl
    import timm
    from torch.utils.data import DataLoader, TensorDataset

    from benchmarks.backbones import Tail
    from demem.callbacks import ActivationDiversityMonitor
    from demem.module import Classifier

    class Clock(pl.Callback):
        """CPU seconds of each epoch's training steps and of its validation."""

        def __init__(self) -> None:
            self.start = 0.0
            self.training: list[float] = []
            self.validation: list[float] = []

        def lap(self) -> float:
            now = time.process_time()
            self.start, spent = now, now - self.start
            return spent

        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.lap()

        def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.training.append(self.lap())

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.validation.append(self.lap())

    def loader(size: int, shuffle: bool) -> DataLoader[Any]:
        data = TensorDataset(torch.randn(size, 96, 10, 10), torch.randint(2, (size,)))
        return DataLoader(data, 64, shuffle=shuffle)

    steps = 15
    model = timm.create_model("mobilenetv2_100", pretrained=False, num_classes=2, pad_type="same")
    clock, watch = Clock(), ActivationDiversityMonitor(every_n_epochs=2)
    trainer = pl.Trainer(
        max_epochs=options.epochs + 2,  # the first two are left out
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_train_batches=steps,
        callbacks=[watch, clock],
    )
    trainer.fit(Classifier(Tail(model), lr=1e-4, freeze_batchnorm=True), loader(4795, True), loader(1199, False))
    validation = clock.validation[2:]
    training = statistics.median(clock.training[2:]) * 75 / steps
    watched, plain = ([training + v for v in validation[first::2]] for first in (0, 1))
    ratios = sorted(a / b for a, b in zip(watched, plain, strict=False))
    return [
        {
            "what": "ActivationDiversityMonitor, defaults, an epoch of Waterbirds' sizes (CPU s)",
            "ours_s": statistics.median(watched),
            "reference": "the same epoch without it",
            "reference_s": statistics.median(plain),
            "ratio": statistics.median(ratios),
            "ratio_low": ratios[0],
            "ratio_high": ratios[-1],
            "floor_s": statistics.median(plain),
            "floor": "no cost at all",
            "max_abs_error": None,
            "sites": list(watch.latest.entropy) if watch.latest else [],
            "validation_s": [statistics.median(validation[0::2]), statistics.median(validation[1::2])],
        }
    ]


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "binned": binned,
    "ksg": ksg,
    "entropy": entropies,
    "monitor": monitor,
}
TABLE = (torch.arange(100_000) * 7919 % 1000).to(torch.int32)


def units(samples: int, count: int) -> Tensor:
    """Gaussian units that have something in common."""
    torch.manual_seed(0)
    return torch.randn(samples, count) @ (torch.eye(count) + 0.05 * torch.randn(count, count))


def sample_of_pairs(count: int, size: int) -> Pairs:
    chosen = torch.randint(count, (size, 2), generator=torch.Generator().manual_seed(0)).tolist()
    return [(min(i, j), max(i, j)) for i, j in chosen]


@dataclass
class Seconds:
    """Wall-clock and CPU seconds of each round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, task: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        value = task()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        return value

    def times(self, factor: float) -> Seconds:
        return Seconds([t * factor for t in self.wall], [t * factor for t in self.cpu])


def take_turns(
    ours: Callable[[], Any],
    reference: Callable[[int, int], float],
    value: Callable[[int, int], float],
    pairs: Pairs,
    rounds: int,
) -> tuple[Seconds, Seconds, float]:
    """Ours, and the reference per pair, in each round: the reference before and after ours, half of the pairs each."""
    mine, theirs, worst = Seconds(), Seconds(), 0.0
    half = len(pairs) // 2
    reference(*pairs[0])
    for _ in range(rounds):
        halves = Seconds()
        values = halves.add(lambda: [reference(i, j) for i, j in pairs[:half]])
        mine.add(ours)
        values += halves.add(lambda: [reference(i, j) for i, j in pairs[half:]])
        theirs.wall.append(sum(halves.wall) / len(pairs))
        theirs.cpu.append(sum(halves.cpu) / len(pairs))
        worst = max(worst, *(abs(v - value(i, j)) for v, (i, j) in zip(values, pairs, strict=True)))
    return mine, theirs, worst


def best_of(task: Callable[[], Any], times: int = 20) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def result(
    what: str, ours: Seconds, reference: str, theirs: Seconds, floor_s: float, floor: str, error: float
) -> dict[str, Any]:
    ratios = sorted(b / a for a, b in zip(ours.wall, theirs.wall, strict=True))
    cpu, reference_cpu = statistics.median(ours.cpu), statistics.median(theirs.cpu)
    return {
        "what": what,
        "ours_s": statistics.median(ours.wall),
        "reference": reference,
        "reference_s": statistics.median(theirs.wall),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "floor_s": floor_s,
        "floor": floor,
        "max_abs_error": error,
        "ours_cpu_s": cpu,
        "reference_cpu_s": reference_cpu,
        "ratio_with_free_cores": reference_cpu / cpu * torch.get_num_threads(),
    }

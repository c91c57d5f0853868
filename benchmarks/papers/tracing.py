"""``python -m benchmarks papers tracing``: do a few units hold the memorization of minority examples?

For every data set and seed an ERM network is trained, units are ranked by several scores on its TRAINING examples (with
the true groups), the top k are changed, and each group's accuracy is measured before and after on the same examples, of
the training set and separately of the test set (You et al. 2025).  Beside them are two controls: random units, and
units of the same layers matched in magnitude.  Also: how concentrated the effect on minority examples is, and how well
memorised training examples are ranked without group labels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from benchmarks.experiment import TASKS, Experiment, Settings, Task
from benchmarks.options import Parser
from benchmarks.papers.tracing_report import write_report
from benchmarks.results import append_jsonl, read_jsonl
from demem.batch import Batch
from demem.linear import few_of_each_group
from demem.module import Classifier
from demem.removal import intervene
from demem.sites import Site, find_head, find_sites
from demem.tracing import (
    activation_difference_score,
    atypical_by_margin,
    average_precision,
    class_mean,
    example_losses,
    gradient_score,
    linear_impact,
    linear_score,
    magnitude_score,
    margins,
    matched_units,
    memorization_score,
    predict,
    random_units,
    read_features,
    taylor_impact,
    top_units,
    two_step_score,
)

SHARES = (0.0, 0.001, 0.005, 0.01, 0.03, 0.05)  # 0: a single unit
CHANGED = (0.01, 0.03)
PER_GROUP = 200
CONTROLS = ("random", "matched")
REPEATS = 2
ALSO_CHANGED = ("magnitude", "gradient", "taylor", "random")  # by other means than zero


def _digits_vit(settings: Settings, **options: Any) -> Classifier:
    """A small ViT from scratch on 8×8 digits: 4×4 patches, 4 blocks of width 64."""
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
    options = {"lr": 5e-4, "optimizer": "adam", "weight_decay": 0.0, **options}
    return Classifier("vit_tiny_patch16_224", in_chans=3, model_kwargs=shape, **options)


ALL_TASKS = {**TASKS, "digits_vit": Task("digits_vit", 60, TASKS["digits"].data, _digits_vit, threads=1)}


class _Snapshots(pl.Callback):
    """The weights after some epochs, to rewind to and to trace over time."""

    def __init__(self, epochs: Sequence[int]) -> None:
        self.epochs = set(epochs)
        self.states: dict[int, dict[str, Tensor]] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = trainer.current_epoch + 1
        if done in self.epochs:
            self.states[done] = {k: v.detach().cpu().clone() for k, v in pl_module.state_dict().items()}


@dataclass
class Split:
    """Examples of one split for measuring: at most so many of each group."""

    batches: list[Batch]
    y: Tensor
    group: Tensor


def main(argv: list[str]) -> int:
    """Run what is not yet in ``--out``; then write the table and figures."""
    parser = Parser("papers tracing", __doc__)
    parser.add_argument(
        "--data", help="data sets, comma-separated (default: waterbirds, digits, digits_vit as far as there is data)"
    )
    parser.add_argument("--data-root", type=Path, help="folder with waterbirds_v1.0")
    parser.add_argument("--weights", type=Path, help="MobileNetV2 safetensors file (default: below --data-root)")
    parser.add_argument("--cache", type=Path, help="where the cached trunk features of Waterbirds are kept")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("results/papers_tracing"))
    options = parser.parse_args(argv)
    default = (["waterbirds"] if options.data_root else []) + ["digits", "digits_vit"]
    names = options.data.split(",") if options.data else default
    unknown = [name for name in names if name not in ALL_TASKS]
    if unknown:
        parser.error(f"unknown data {unknown}; there are {sorted(ALL_TASKS)}")
    settings = Settings(data_root=options.data_root, weights=options.weights, cache=options.cache)
    path = options.out / "tracing.jsonl"
    for name in names:
        for seed in range(options.seeds):
            done = {(r["data"], r["seed"]) for r in read_jsonl(path) if r["part"] == "done"}
            if (name, seed) not in done:
                _run(ALL_TASKS[name], seed, settings, options.out, path)
    write_report(options.out)
    print(f"Table and figures in {options.out}.")
    return 0


def _run(task: Task, seed: int, settings: Settings, out: Path, path: Path) -> None:
    began = time.perf_counter()
    have = {_key(r) for r in read_jsonl(path) if r["data"] == task.name and r["seed"] == seed}
    experiment = Experiment(task, settings, seed)
    module, data, states = _trained(experiment, out)
    model: nn.Module = module.model
    model.eval()
    last = max(states)
    prefix = {e: {k.removeprefix("model."): v for k, v in s.items()} for e, s in states.items()}
    sites = _sites(model)
    sizes = {s.name: s.require_num_units() for s in sites}
    total = sum(sizes.values())
    splits = {
        "train": _sample(data.train_eval_dataset, seed),
        "test": _sample(data.test_dataset, seed),
    }
    minority = _minority(data)
    print(f"{task.name} seed {seed}: {total} units, trained in {time.perf_counter() - began:.0f} s", flush=True)

    def put(row: dict[str, Any]) -> None:
        row = {"data": task.name, "seed": seed, **row}
        if _key(row) not in have:
            append_jsonl(path, row)

    train = splits["train"]
    for epoch, state in prefix.items():
        model.load_state_dict(state)
        for row in _concentration(model, sites, train, minority):
            put({"part": "concentration", "epoch": epoch, **row})
    model.load_state_dict(prefix[last])
    put({"part": "ranking", **_ranking(model, data, minority)})

    generator = torch.Generator().manual_seed(seed)
    scores = _scores(model, sites, train, minority, generator)
    before = {name: _accuracies(model, split) for name, split in splits.items()}
    earlier = [e for e in prefix if e <= last - 5] or [e for e in prefix if e < last]
    reference = prefix[max(earlier)] if earlier else None
    for score, share, kind in _plan(list(scores), total):
        if ("change", "", score, share, kind) in have or (kind == "rewind" and reference is None):
            continue
        k = max(1, round(share * total))
        repeats = REPEATS if score in CONTROLS else 1
        deltas: dict[str, list[list[float]]] = {name: [] for name in splits}
        for _ in range(repeats):
            if score == "random":
                units = random_units(scores["magnitude"], k, generator)
            elif score == "matched":
                units = _matched(top_units(scores["taylor"], k), scores["magnitude"], generator)
            else:
                units = top_units(scores[score], k)
            with intervene(model, sites, units, kind, reference_state=reference, generator=generator):
                for name, split in splits.items():
                    after = _accuracies(model, split)
                    deltas[name].append([b - a for b, a in zip(before[name], after, strict=True)])
        row: dict[str, Any] = {"part": "change", "score": score, "share": share, "kind": kind, "k": k}
        for name in splits:
            row[name] = {
                "before": before[name],
                "delta": [mean(column) for column in zip(*deltas[name], strict=True)],
            }
        put({**row, "minority": minority, "repeats": repeats})
    put({"part": "done", "seconds": round(time.perf_counter() - began, 1)})
    print(f"  done after {time.perf_counter() - began:.0f} s", flush=True)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    part = row["part"]
    return (part, f"{row.get('epoch', '')}{row.get('of', '')}", row.get("score"), row.get("share"), row.get("kind"))


def _plan(scores: Sequence[str], total: int) -> Iterator[tuple[str, float, str]]:
    for score in [*scores, *CONTROLS]:
        for share in SHARES:
            if share == 0 or share * total >= 1.5:  # in a small network the smallest shares are all one unit
                yield score, share, "zero"
        for share in CHANGED if score in ALSO_CHANGED else ():
            for kind in ("noise", "reinitialise", "rewind"):
                yield score, share, kind


def _trained(experiment: Experiment, out: Path) -> tuple[Classifier, Any, dict[int, dict[str, Tensor]]]:
    """The ERM network of this seed, from disk if it was trained before."""
    path = out / "checkpoints" / f"{experiment.task.name}-{experiment.seed}.pt"
    epochs = experiment.epochs
    if path.exists():
        module, data = experiment.module(), experiment.data()
        states = torch.load(path, weights_only=True)
        module.load_state_dict(states[max(states)])
        return module, data, states
    snapshots = _Snapshots([1, max(1, epochs // 2), max(1, epochs - 5), epochs])
    run = experiment.fit(callbacks=[snapshots], validate=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(snapshots.states, partial)
    partial.replace(path)
    return run.module, run.data, snapshots.states


def _sites(model: nn.Module) -> list[Site]:
    """Convolution filters of a CNN; hidden units of the MLPs and attention heads of a transformer."""
    if any("attn" in name for name, _ in model.named_modules()):
        return find_sites(model, ["**.mlp.fc1", "**.attn:heads"])
    return [site for site in find_sites(model, "**") if isinstance(site.module, nn.Conv2d)]


def _minority(data: Any) -> list[int]:
    """Groups with less than an equal share of their class."""
    counts = torch.as_tensor(data.train_group_counts).double().view(data.num_classes, -1)
    return (counts < counts.mean(1, keepdim=True)).flatten().nonzero()[:, 0].tolist()


def _sample(dataset: Any, seed: int, per_group: int = PER_GROUP) -> Split:
    positions = few_of_each_group(dataset.group, per_group, torch.Generator().manual_seed(seed)).sort().values
    batches = _batches(dataset.select(positions))
    return Split(batches, torch.cat([b.y for b in batches]), dataset.group[positions])


def _batches(dataset: Any, size: int = 256) -> list[Batch]:
    return [Batch(*dataset.rows(part)) for part in torch.arange(len(dataset)).split(size)]


def _accuracies(model: nn.Module, split: Split) -> list[float]:
    logits, y, _ = predict(model, split.batches)
    right = (logits.argmax(1) == y).double()
    return [float(right[split.group == g].mean()) for g in torch.unique(split.group).tolist()]


def _is(group: Tensor, groups: Sequence[int]) -> Tensor:
    return torch.isin(group, torch.tensor(list(groups)))


def _scores(
    model: nn.Module, sites: Sequence[Site], train: Split, minority: Sequence[int], generator: torch.Generator
) -> dict[str, dict[str, Tensor]]:
    """Scores in the sense of the paper: high = the unit fits minority TRAINING examples."""
    few = _is(train.group, minority)
    impact = taylor_impact(model, sites, train.batches)
    on_few = {n: class_mean(v, train.y, few) for n, v in impact.items()}
    on_many = {n: class_mean(v, train.y, ~few) for n, v in impact.items()}
    return {
        "magnitude": magnitude_score(model, sites),
        "gradient": gradient_score(model, sites, train.batches, atypical=few),
        "gradient_majority": gradient_score(model, sites, train.batches, atypical=~few),
        "activation_difference": activation_difference_score(model, sites, train.batches, atypical=few),
        "taylor": on_few,
        "taylor_contrast": {n: on_few[n] - on_many[n] for n in on_few},
        "two_step": two_step_score(model, sites, train.batches, atypical=few, shortlist=0.05, direction="helps"),
    }


def _matched(units: dict[str, Tensor], magnitude: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Other units of the same sites, alike in magnitude; as many as are left where more than half is taken."""
    allowed = {n: u[: len(magnitude[n]) // 2] for n, u in units.items() if len(magnitude[n]) > 1}
    return matched_units(allowed, magnitude, generator)


def _concentration(
    model: nn.Module, sites: Sequence[Site], train: Split, minority: Sequence[int]
) -> list[dict[str, Any]]:
    """Share of the units' summed positive effect on a set of examples that the top 1, 5 and 10% of units hold."""
    few = _is(train.group, minority)
    impact = taylor_impact(model, sites, train.batches)
    rows = []
    for name, mask in (("minority", few), ("majority", ~few)):
        effect = {n: class_mean(v, train.y, mask).clamp_min(0) for n, v in impact.items()}
        everything = torch.cat(list(effect.values())).sort(descending=True).values
        whole = float(everything.sum())
        if whole <= 0:
            continue
        shares = {
            f"top_{p}": float(everything[: max(1, round(len(everything) * p / 100))].sum()) / whole for p in (1, 5, 10)
        }
        by_site = {n: float(v.sum()) / whole for n, v in effect.items()}
        rows.append({"of": name, **shares, "by_site": by_site})
    return rows


def _ranking(model: nn.Module, data: Any, minority: Sequence[int]) -> dict[str, Any]:
    """Average precision for the true minority among all training examples of each class; no group label is used."""
    name, head = find_head(model)
    site = find_sites(model, f"{name}:input")
    weight = head.weight.detach()
    held, logits, y = read_features(model, site, _batches(data.val_dataset))
    z = held[site[0].name]
    atypical = atypical_by_margin(margins(logits, y), y, 0.2)
    memorising = linear_score(z, weight, y, atypical, logits=logits) > 0
    train = data.train_eval_dataset
    rows, logits, y = read_features(model, site, _batches(train))
    impact = linear_impact(rows[site[0].name], weight, y, logits=logits, centre=z.mean(0))
    few = _is(train.group, minority)
    score, loss = memorization_score(impact, memorising), example_losses(logits, y)
    classes = [c for c in torch.unique(y).tolist() if bool(few[y == c].any())]
    return {
        "average_precision": [average_precision(score[y == c], few[y == c]) for c in classes],
        "loss_average_precision": [average_precision(loss[y == c], few[y == c]) for c in classes],
        "base_rate": [float(few[y == c].double().mean()) for c in classes],
        "memorising_share": float(memorising.double().mean()),
    }

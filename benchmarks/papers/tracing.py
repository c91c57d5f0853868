"""``python -m benchmarks papers tracing``: do a few units hold the memorization of minority examples?

For every data set and seed an ERM network is trained, units are ranked by several scores on its TRAINING examples (with
the true groups), the top k are changed, and each group's accuracy is measured before and after on the same examples, of
the training set and separately of the test set (You et al. 2025).  Beside them are two controls: random units, and
units of the same layers matched in magnitude.  Also: how concentrated the effect on minority examples is, and how well
memorised training examples are ranked without group labels.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from benchmarks.experiment import TASKS, Experiment, Settings, Task
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

T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


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
    parser = argparse.ArgumentParser(prog="python -m benchmarks papers tracing", description=__doc__)
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


# The report


def write_report(out: Path) -> None:
    """``tracing.md`` and figures from the rows in ``out``."""
    rows = read_jsonl(out / "tracing.jsonl")
    lines = ["# Units that memorise: what happens when they are changed", "", LEGEND]
    for data in dict.fromkeys(r["data"] for r in rows):
        mine = [r for r in rows if r["data"] == data]
        changes = [r for r in mine if r["part"] == "change"]
        if not changes:
            continue
        seeds = len({r["seed"] for r in changes})
        accuracy = _before(changes)
        lines += [f"## {data} ({seeds} seeds)", "", f"Accuracy before: {accuracy}.", ""]
        for kind in ("zero", "noise", "reinitialise", "rewind"):
            lines += _table(changes, kind)
        lines += _claims(changes, mine)
        lines += _concentration_table([r for r in mine if r["part"] == "concentration"])
        lines += _ranking_table([r for r in mine if r["part"] == "ranking"])
        _figures(changes, mine, data, out)
    (out / "tracing.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


LEGEND = """\
Accuracy lost, in points, by minority and majority groups (mean over the groups of the kind) when the top units by a
score are changed; mean over seeds with a 95% interval over seeds, not corrected for the number of comparisons. Same
examples before and after (at most 200 a group); *train* and *test* are separate measurements. The first seven scores
are computed on training examples with true groups; `gradient_majority` is the same score for the other groups;
`random` and `matched` (in magnitude to `taylor`, same layers) are the controls, mean of several draws.
"""


def _gap(row: dict[str, Any], split: str) -> tuple[float, float]:
    """Accuracy lost by minority and by majority groups, in points."""
    delta, few = row[split]["delta"], set(row["minority"])
    lost = [[100 * d for g, d in enumerate(delta) if (g in few) == flag] for flag in (True, False)]
    return mean(lost[0]), mean(lost[1])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% interval (Student's t); the half-width is infinite for a single value."""
    n = len(values)
    return mean(values), T_95.get(n, 1.96) * stdev(values) / math.sqrt(n) if n > 1 else math.inf


def _show(values: Sequence[float]) -> str:
    centre, half = interval(values)
    return f"{centre:.1f} ± {half:.1f}" if math.isfinite(half) else f"{centre:.1f}"


def _before(changes: Sequence[dict[str, Any]]) -> str:
    first = {r["seed"]: r for r in changes}.values()
    parts = []
    for split in ("train", "test"):
        groups = zip(*(r[split]["before"] for r in first), strict=True)
        parts.append(f"{split} " + " / ".join(f"{100 * mean(g):.1f}" for g in groups))
    return ", ".join(parts) + f" (groups in order; minority: {next(iter(first))['minority']})"


def _table(changes: Sequence[dict[str, Any]], kind: str) -> list[str]:
    rows = [r for r in changes if r["kind"] == kind]
    if not rows:
        return []
    lines = [
        f"### {kind}",
        "",
        "| score | units | train minority | train majority | test minority | test majority |",
        "|---|---|---|---|---|---|",
    ]
    for score in dict.fromkeys(r["score"] for r in rows):
        for share in sorted({r["share"] for r in rows}):
            group = [r for r in rows if r["score"] == score and r["share"] == share]
            if not group:
                continue
            cells = []
            for split in ("train", "test"):
                few, many = zip(*(_gap(r, split) for r in group), strict=True)
                cells += [_show(few), _show(many)]
            lines.append(f"| {score} | {group[0]['k']} ({_percent(share)}) | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _percent(share: float) -> str:
    return f"{100 * share:g}%" if share else "one unit"


def _claims(changes: Sequence[dict[str, Any]], mine: Sequence[dict[str, Any]]) -> list[str]:
    """The paper's claims, judged on paired differences over the seeds: holds, does not hold, or not decided."""
    lines = ["### The paper's claims here", ""]
    fitted = mean(mean(r["train"]["before"][g] for g in r["minority"]) for r in changes)
    if fitted < 0.9:
        lines += [f"Training accuracy of the minority groups is {100 * fitted:.0f}%: little is memorised here.", ""]

    def difference(score: str, split: str, share: float, against: str | None = None) -> list[float]:
        values = {}
        for name in (score, against):
            for r in changes:
                if r["score"] == name and r["kind"] == "zero" and r["share"] == share:
                    few, many = _gap(r, split)
                    values[name, r["seed"]] = few - many if against is None else few
        if against is None:
            return [v for (name, _), v in values.items() if name == score]
        both = sorted(s for n, s in values if n == score and (against, s) in values)
        return [values[score, s] - values[against, s] for s in both]

    def judge(text: str, values: Sequence[float]) -> None:
        if len(values) < 2:
            return
        centre, half = interval(values)
        verdict = "holds" if centre > half else "does not hold" if centre < -half else "not decided"
        lines.append(f"- {text}: {centre:+.1f} ± {half:.1f} points, **{verdict}**.")

    for score in ("magnitude", "gradient", "taylor", "taylor_contrast", "two_step"):
        for share in (0.001, *CHANGED):  # the smallest one where larger ones leave no network standing
            judge(
                f"Zeroing the top {100 * share:g}% by {score} costs minority training examples more than majority ones",
                difference(score, "train", share),
            )
            judge(
                f"… and costs minority training examples more than random units ({100 * share:g}%)",
                difference(score, "train", share, "random"),
            )
    judge(
        "Zeroing the top 1% by taylor costs minority training examples more than units matched in magnitude",
        difference("taylor", "train", 0.01, "matched"),
    )
    judge(
        "… and costs minority TEST examples more than majority ones (1%)",
        difference("taylor", "test", 0.01),
    )
    last = _last_concentration(mine)
    judge(
        "The effect on minority examples is more concentrated (share held by the top 1% of units, in points) than on "
        "majority examples",
        [100 * (few["top_1"] - many["top_1"]) for few, many in last],
    )
    return [*lines, ""]


def _last_concentration(mine: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    rows = [r for r in mine if r["part"] == "concentration"]
    if not rows:
        return []
    last = max(r["epoch"] for r in rows)
    by = {(r["seed"], r["of"]): r for r in rows if r["epoch"] == last}
    return [(by[s, "minority"], by[s, "majority"]) for s, of in by if of == "minority" and (s, "majority") in by]


def _concentration_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "### Concentration",
        "",
        "Share (%) of all units' summed positive first-order effect on the loss that the top units hold.",
        "",
        "| epoch | examples | top 1% | top 5% | top 10% |",
        "|---|---|---|---|---|",
    ]
    for epoch in sorted({r["epoch"] for r in rows}):
        for of in ("minority", "majority"):
            group = [r for r in rows if r["epoch"] == epoch and r["of"] == of]
            if group:
                cells = [_show([100 * r[f"top_{p}"] for r in group]) for p in (1, 5, 10)]
                lines.append(f"| {epoch} | {of} | " + " | ".join(cells) + " |")
    last = max(r["epoch"] for r in rows)
    few = [r for r in rows if r["epoch"] == last and r["of"] == "minority"]
    many = [r for r in rows if r["epoch"] == last and r["of"] == "majority"]
    lines += ["", "By site at the end (% of the effect on minority / majority examples): "]
    sites = {s: (mean(r["by_site"][s] for r in few), mean(r["by_site"][s] for r in many)) for s in few[0]["by_site"]}
    ordered = sorted(sites.items(), key=lambda item: -item[1][0])[:8]
    lines.append(", ".join(f"`{s}` {100 * a:.1f} / {100 * b:.1f}" for s, (a, b) in ordered) + ".")
    return [*lines, ""]


def _ranking_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [
        "### Memorised training examples",
        "",
        "Average precision for the true minority among each class's training examples (no group label used).",
        "",
        "| class | base rate | by loss | by kept − memorising units |",
        "|---|---|---|---|",
    ]
    for c in range(len(rows[0]["base_rate"])):
        base, loss, score = (
            [r[n][c] for r in rows] for n in ("base_rate", "loss_average_precision", "average_precision")
        )
        cells = [f"{mean(base):.3f}"] + [f"{interval(v)[0]:.3f} ± {interval(v)[1]:.3f}" for v in (loss, score)]
        lines.append(f"| {c} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _figures(changes: Sequence[dict[str, Any]], mine: Sequence[dict[str, Any]], data: str, out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for i, split in enumerate(("train", "test")):
        axes = figure.add_subplot(1, 2, i + 1)
        for j, score in enumerate(dict.fromkeys(r["score"] for r in changes)):
            points = []
            for share in SHARES:
                gaps = [
                    _gap(r, split)
                    for r in changes
                    if r["score"] == score and r["kind"] == "zero" and r["share"] == share
                ]
                if gaps:
                    points.append((100 * (share or 1e-4), mean(g[0] for g in gaps), mean(g[1] for g in gaps)))
            if points:
                x, few, many = zip(*points, strict=True)
                axes.plot(x, few, color=f"C{j}", marker="o", ms=3, label=score)
                axes.plot(x, many, color=f"C{j}", ls=":", marker=".", ms=3)
        axes.set_xscale("log")
        axes.set_xlabel("units zeroed (%)")
        axes.set_ylabel("accuracy lost (points)")
        axes.set_title(f"{data}, {split}: minority (solid), majority (dotted)")
        axes.axhline(0, color="grey", lw=0.5)
        if i == 0:
            axes.legend(fontsize=7)
    figure.savefig(out / f"tracing_{data}.png", dpi=130)
    rows = [r for r in mine if r["part"] == "concentration"]
    if rows:
        figure = Figure(figsize=(5, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for j, p in enumerate((1, 5, 10)):
            for of, style in (("minority", "-"), ("majority", ":")):
                epochs = sorted({r["epoch"] for r in rows})
                values = [
                    [100 * r[f"top_{p}"] for r in rows if r["epoch"] == e and r["of"] == of] or [math.nan]
                    for e in epochs
                ]
                axes.plot(
                    epochs, [mean(v) for v in values], style, color=f"C{j}", marker="o", ms=3, label=f"top {p}%, {of}"
                )
        axes.set_xlabel("epoch")
        axes.set_ylabel("share of the units' effect (%)")
        axes.set_title(f"{data}: how concentrated")
        axes.legend(fontsize=7)
        figure.savefig(out / f"concentration_{data}.png", dpi=130)

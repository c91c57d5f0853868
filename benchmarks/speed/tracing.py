"""``python -m benchmarks speed tracing``: exact ablation, Taylor scores and critical units, beside plain loops.

ResNet-18 at 64 px, 128 examples that it was trained on for a few steps, all channels of all convolutions (4,800).  Ours
and the reference take turns, so that whatever else the machine does meets both; ratios are medians over the rounds.  A
reference that takes minutes is timed on a sample of the units and scaled.  Each row of ``speed.jsonl``: what, ours_s,
reference, reference_s, ratio (reference over ours), ratio_low, ratio_high, and what else there is to say.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.options import Parser
from benchmarks.results import append_jsonl
from demem.batch import Batch
from demem.sites import Site, find_sites
from demem.tracing import ablation_impact, critical_units, impact_score, select_rows, taylor_impact, two_step_score


def main(argv: list[str]) -> int:
    parser = Parser("speed tracing", __doc__)
    parser.add_argument("--out", type=Path, default=Path("results/speed"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--units", type=int, help="units of each site that ours is timed on, and scaled (default: all of them)"
    )
    parser.add_argument("--reference-units", type=int, default=2, help="units of each site for the plain loop")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    model, sites, batch = subject()
    for name in options.only:
        for row in BENCHMARKS[name](options, model, sites, batch):
            row = {"what": name, **row, "threads": options.threads, "rounds": options.rounds}
            append_jsonl(options.out / "speed.jsonl", row)
            print(json.dumps(row), flush=True)
    return 0


def subject() -> tuple[nn.Module, list[Site], Batch]:
    """The network, its convolutions and the traced examples."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    x, y = torch.randn(128, 3, 64, 64), torch.randint(0, 10, (128,))
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(12):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    return model, [s for s in find_sites(model, "**") if isinstance(s.module, nn.Conv2d)], Batch(x, y)


def ablation(options: argparse.Namespace, model: nn.Module, sites: list[Site], batch: Batch) -> list[dict[str, Any]]:
    """All sites one after the other, in turns with the plain loop and with captum on the same layer."""
    generator = torch.Generator().manual_seed(0)
    total = sum(s.require_num_units() for s in sites)
    per_round: dict[str, list[float]] = {"ours": [], "loop": [], "captum": []}
    error = largest = 0.0
    rows = []
    for round_ in range(options.rounds):
        seconds = dict.fromkeys(per_round, 0.0)
        for site in sites:
            count = site.require_num_units()
            order = torch.randperm(count, generator=generator)
            ours_on = order[: options.units or count]
            reference_on = order[: options.reference_units]
            found: dict[str, Any] = {}
            spent = {
                "ours": _timed(
                    lambda s=site, u=ours_on, f=found: f.update(ablation_impact(model, [s], [batch], units={s.name: u}))
                ),
                "loop": _timed(lambda s=site, u=reference_on, f=found: f.update(loop=plain_loop(model, s, u, batch))),
                "captum": _timed(lambda s=site, u=reference_on: captum_ablation(model, s, u, batch)),
            }
            # Both also run the network once as it is, captum once more with all other channels ablated together.
            seconds["ours"] += spent["ours"] * count / len(ours_on)
            seconds["loop"] += spent["loop"] * count / (len(reference_on) + 1)
            seconds["captum"] += spent["captum"] * count / (len(reference_on) + 2)
            difference = found[site.name][:, : len(reference_on)] - found["loop"]
            error, largest = max(error, float(difference.abs().max())), max(largest, float(found["loop"].abs().max()))
            if round_ == 0:
                ratio = spent["loop"] / (len(reference_on) + 1) / (spent["ours"] / len(ours_on))
                rows.append({"what": "ablation_site", "site": site.name, "units": count, "ratio": ratio})
        for name, value in seconds.items():
            per_round[name].append(value)
    for name in ("loop", "captum"):
        rows.append(
            {
                **_ratio(per_round["ours"], per_round[name]),
                "reference": "zero a channel, run the network" if name == "loop" else "captum LayerFeatureAblation",
                "units": total,
                "reference_units": options.reference_units * len(sites),
                "max_abs_error": error,
                "largest_effect": largest,
            }
        )
    return rows


def winograd(settings: argparse.Namespace, model: nn.Module, sites: list[Site], batch: Batch) -> list[dict[str, Any]]:
    """Exact ablation with Winograd's convolutions for small maps, in turns with torch's own, in CPU seconds."""
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for round_ in range(settings.rounds):
        spent = dict.fromkeys(seconds, 0.0)
        for i, site in enumerate(sites):
            count = site.require_num_units()
            units = {site.name: torch.randperm(count)[: settings.units or count]}
            for name in list(spent)[:: -1 if (i + round_) % 2 else 1]:
                with ExitStack() as stack:
                    if name == "without":
                        stack.enter_context(patch("demem.tracing.restart.Conv3x3.pays", return_value=False))
                    start = time.process_time()
                    ablation_impact(model, [site], [batch], units=units)
                    spent[name] += (time.process_time() - start) * count / len(units[site.name])
        for name, value in spent.items():
            seconds[name].append(value)
    return [{**_ratio(seconds["with"], seconds["without"]), "reference": "without Winograd's convolutions"}]


def plain_loop(model: nn.Module, site: Site, units: Tensor, batch: Batch) -> Tensor:
    """``(S, U)``: rise of each example's loss when a hook zeroes a channel and the network is run whole."""
    with torch.inference_mode():
        before = F.cross_entropy(model(batch.x), batch.y, reduction="none")
        columns = []
        for unit in units.tolist():

            def zero(module: nn.Module, args: Any, output: Tensor, unit: int = unit) -> Tensor:
                output[:, unit] = 0
                return output

            handle = site.module.register_forward_hook(zero)
            columns.append(F.cross_entropy(model(batch.x), batch.y, reduction="none") - before)
            handle.remove()
    return torch.stack(columns, 1)


def captum_ablation(model: nn.Module, site: Site, units: Tensor, batch: Batch) -> None:
    """The same units by captum, which runs the network once for each of them, once for the rest and once as it is."""
    from captum.attr import LayerFeatureAblation

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), batch.y, reduction="none")

    groups = torch.full((1, site.require_num_units(), 1, 1), len(units))
    for i, unit in enumerate(units.tolist()):
        groups[:, unit] = i
    with torch.no_grad():
        LayerFeatureAblation(loss, site.module).attribute(batch.x, layer_mask=groups)


def taylor(options: argparse.Namespace, model: nn.Module, sites: list[Site], batch: Batch) -> list[dict[str, Any]]:
    """Scores of all channels beside one forward and backward pass; their order beside that of exact ablation."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(batch.x), batch.y).backward()

    step()
    ours, passes = [], []
    for _ in range(max(5, options.rounds)):
        ours.append(_timed(lambda: taylor_impact(model, sites, [batch])))
        passes.append(_timed(step))
    everyone = torch.ones(len(batch.y), dtype=torch.bool)
    estimate = impact_score(taylor_impact(model, sites, [batch]), batch.y, everyone)
    units = {s.name: torch.randperm(s.require_num_units())[: options.units or 10**9] for s in sites}
    exact = impact_score(ablation_impact(model, sites, [batch], units=units), batch.y, everyone)
    correlation = {n: spearman(estimate[n][units[n]], exact[n]) for n in exact}
    return [
        {
            **_ratio(ours, passes),
            "reference": "one forward and backward pass",
            "passes": statistics.median(o / p for o, p in zip(ours, passes, strict=True)),
            "rank_correlation": {n: round(v, 3) for n, v in correlation.items()},
            "rank_correlation_median": statistics.median(correlation.values()),
        }
    ]


def two_step(options: argparse.Namespace, model: nn.Module, sites: list[Site], batch: Batch) -> list[dict[str, Any]]:
    """The default of the tracer, in passes over the traced examples."""

    def forward() -> None:
        with torch.inference_mode():
            model(batch.x)

    def both() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(batch.x), batch.y).backward()

    both()
    ours, forwards, passes = [], [], []
    for _ in range(max(5, options.rounds)):
        ours.append(_timed(lambda: two_step_score(model, sites, [batch])))
        forwards.append(_timed(forward))
        passes.append(_timed(both))
    return [
        {
            **_ratio(ours, passes),
            "reference": "one forward and backward pass",
            "passes": statistics.median(o / p for o, p in zip(ours, passes, strict=True)),
            "forward_passes": statistics.median(o / p for o, p in zip(ours, forwards, strict=True)),
        }
    ]


def critical(options: argparse.Namespace, model: nn.Module, sites: list[Site], batch: Batch) -> list[dict[str, Any]]:
    """1,000 examples, at most 5 units each; the loop goes through a sample of them one by one."""
    torch.manual_seed(1)
    x = torch.cat([batch.x + 0.01 * torch.randn_like(batch.x) for _ in range(8)])[:1000]
    y = batch.y.repeat(8)[:1000]
    sample = torch.randperm(1000)[:16]
    chunks = [Batch(a, b) for a, b in zip(x.split(100), y.split(100), strict=True)]
    ours, loop = [], []
    equal = 1.0
    whole = Batch(x, y)
    singles = [select_rows(whole, i[None]) for i in sample]
    for _ in range(max(1, options.rounds - 1)):
        found: list[Tensor] = []
        ours.append(_timed(lambda f=found: f.extend(critical_units(model, sites, c, 5).removed for c in chunks)))
        single: list[Tensor] = []
        spent = _timed(lambda s=single: s.extend(critical_units(model, sites, one, 5).removed for one in singles))
        loop.append(spent * 1000 / len(sample))
        equal = min(equal, float((torch.cat(found)[sample] == torch.cat(single)).double().mean()))
    return [{**_ratio(ours, loop), "reference": "one example at a time", "examples": 1000, "cap": 5, "equal": equal}]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation (ties break by position)."""
    ranks = [v.argsort().argsort().double() for v in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _ratio(ours: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    ratios = [r / o for o, r in zip(ours, reference, strict=True)]
    return {
        "ours_s": statistics.median(ours),
        "reference_s": statistics.median(reference),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


BENCHMARKS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "ablation": ablation,
    "taylor": taylor,
    "two_step": two_step,
    "critical": critical,
    "winograd": winograd,
}

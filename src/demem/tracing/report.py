"""Trace all units of a network, and write the scores as a table and a figure."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from demem.batch import Batch
from demem.sites import Site
from demem.tracing.atypical import class_mean
from demem.tracing.capture import ALONE, Ranks
from demem.tracing.ranking import RankedExamples
from demem.tracing.scores import IMPACTS, impact_score, labels_and_chosen, score_units
from demem.tracing.topk import top_units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class UnitReport:
    """Scores of all units of all traced sites.

    Attributes:
        columns: ``{column: {site: (N,)}}`` on the CPU.  One column per score, under its name; for scores that are
            impacts on examples also ``impact_atypical/<score>`` and ``impact_typical/<score>``, the mean impact on
            either kind (positive = the unit helps them).
        impacts: ``{score: {site: (S, N)}}`` for those scores, one row per traced example.
    """

    columns: dict[str, dict[str, Tensor]]
    impacts: dict[str, dict[str, Tensor]]

    def __repr__(self) -> str:
        sites = {site: len(values) for site, values in next(iter(self.columns.values())).items()}
        return f"{type(self).__name__}({', '.join(self.scores)} of {sum(sites.values())} units at {', '.join(sites)})"

    @property
    def scores(self) -> list[str]:
        """Names of the scores, without the impact columns."""
        return [name for name in self.columns if "/" not in name]

    def top(self, score: str | None = None, k: int | float = 20, within: bool = False) -> dict[str, Tensor]:
        """Select the top units by a score (the first one if ``None``), see :func:`~demem.tracing.top_units`."""
        return top_units(self.columns[self.scores[0] if score is None else score], k, within)

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict per unit (``site``, ``unit``, and every column), highest first by the first score."""
        table = []
        for site in next(iter(self.columns.values())):
            values = {column: by_site[site].tolist() for column, by_site in self.columns.items()}
            table += [
                {"site": site, "unit": unit, **{column: v[unit] for column, v in values.items()}}
                for unit in range(len(next(iter(values.values()))))
            ]
        first = self.scores[0]
        return sorted(table, key=lambda row: -row[first])

    def to_csv(self, path: str | Path) -> Path:
        """Write :meth:`rows` as CSV."""
        return write_table(self.rows(), path)

    def to_parquet(self, path: str | Path) -> Path:
        """Write :meth:`rows` as parquet.

        Raises:
            RuntimeError: pandas or pyarrow is not installed.
        """
        path = Path(path)
        try:
            import pandas as pd
            import pyarrow  # type: ignore[import-untyped,import-not-found,unused-ignore]  # noqa: F401
        except ImportError as error:
            raise RuntimeError(
                "Writing parquet needs pandas and pyarrow: pip install pandas pyarrow, or write CSV."
            ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(self.rows()).to_parquet(path, index=False)
        return path

    def draw(self, score: str | None = None, k: int = 20, by: str | None = None) -> Figure:
        """Draw the impact of every unit on atypical against that on typical examples, with the top units circled.

        A score that is not an impact on examples is drawn as its sorted values, by site.

        Args:
            score: whose impacts are drawn; the first one if ``None``.
            k: number of units to circle.
            by: the score whose top units are circled; the drawn one if ``None``.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        score = self.scores[0] if score is None else score
        by = score if by is None else by
        k = min(k, sum(len(v) for v in self.columns[score].values()))
        chosen = self.top(by, k)
        canvas = Figure(figsize=(6.4, 5.2), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot()
        on_atypical = self.columns.get(f"impact_atypical/{score}")
        on_typical = self.columns.get(f"impact_typical/{score}")
        for i, (site, values) in enumerate(self.columns[score].items()):
            if on_atypical is not None and on_typical is not None:
                x, y = on_typical[site], on_atypical[site]
            else:
                x, y = torch.arange(len(values)), values.sort(descending=True).values
            axes.scatter(x.numpy(), y.numpy(), s=8, alpha=0.6, label=site if i < 12 else None, color=f"C{i % 10}")
            if site in chosen and on_atypical is not None:
                marked = chosen[site]
                axes.scatter(x[marked].numpy(), y[marked].numpy(), s=28, facecolors="none", edgecolors="black")
        if on_atypical is not None:
            axes.axhline(0, color="grey", lw=0.5)
            axes.axvline(0, color="grey", lw=0.5)
            axes.margins(0.14)
            label_quadrants(axes)
            axes.set_xlabel("mean impact on typical examples (positive: the unit helps)")
            axes.set_ylabel("mean impact on atypical examples")
            axes.set_title(f"Impact of units ({score}); circled: top {k} by {by}", fontsize=10)
        else:
            axes.set_xlabel("rank within the site")
            axes.set_ylabel(score)
            axes.set_title(f"Units by {score}", fontsize=10)
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        return canvas

    def figure(self, path: str | Path, score: str | None = None, k: int = 20, by: str | None = None) -> Path:
        """Write :meth:`draw` as an image file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.draw(score, k, by).savefig(path, dpi=130)
        return path


_QUADRANTS = (  # (x, y) in the axes' corners, horizontal and vertical alignment, words
    ((0.99, 0.985), "right", "top", "helps everybody"),
    ((0.01, 0.985), "left", "top", "helps the atypical only"),
    ((0.01, 0.015), "left", "bottom", "hurts everybody"),
    ((0.99, 0.015), "right", "bottom", "helps the typical, hurts the atypical:\nholds the shortcut"),
)


def label_quadrants(axes: Axes, colour: str = "grey") -> None:
    """Write into the corners of a unit map what a unit there does, and keep the axes' crossing inside the map.

    Args:
        axes: impact on typical examples to the right, on atypical ones upwards.
        colour: of the words.

    Example:
        >>> from matplotlib.figure import Figure
        >>> axes = Figure().add_subplot()
        >>> label_quadrants(axes)
        >>> axes.texts[0].get_text()
        'helps everybody'
    """
    for (low, high), put in ((axes.get_xlim(), axes.set_xlim), (axes.get_ylim(), axes.set_ylim)):
        room = 0.12 * max(high, 0, high - low)
        put(min(low, -room), max(high, room))
    style: dict[str, Any] = {"color": colour, "fontsize": 9.5, "fontstyle": "italic", "zorder": 1}
    for place, horizontal, vertical, words in _QUADRANTS:
        axes.text(*place, words, ha=horizontal, va=vertical, transform=axes.transAxes, **style)


def trace(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    atypical: Tensor,
    *,
    scores: Sequence[str] = ("taylor",),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    ranks: Ranks = ALONE,
) -> UnitReport:
    """Score every unit of the sites; the model is left as it was, bit for bit.

    Args:
        model: any module that maps ``batch.x`` to logits.
        sites: from :func:`demem.sites.find_sites`.
        batches: held-out examples, typical and atypical; read at least once per score.
        atypical: bool ``(S,)`` over all examples, e.g. from :func:`~demem.tracing.choose_atypical`.
        scores: names in :data:`~demem.tracing.SCORES`; the first one orders the table.
        options: ``{score: keyword arguments}``.
        ranks: processes of a distributed run.

    Returns:
        See :class:`UnitReport`.

    Raises:
        ValueError: unknown score, no atypical example, or as the scores.

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> model[0].weight.data = torch.eye(2)
        >>> data = [Batch(torch.tensor([[3.0, 0.0], [1.0, 2.0]]), torch.tensor([0, 0]))]
        >>> atypical = torch.tensor([False, True])
        >>> report = trace(model, find_sites(model, "0"), data, atypical, scores=["ablation", "magnitude"])
        >>> report
        UnitReport(ablation, magnitude of 2 units at 0)
        >>> report.top(k=1)
        {'0': tensor([1])}
        >>> path = report.to_csv("units.csv")
    """
    if not scores:
        raise ValueError("Name at least one score.")
    y, chosen = labels_and_chosen(batches, atypical)
    labels, kind = ranks.gather(y), ranks.gather(chosen)
    if not bool(kind.any()):
        raise ValueError("No example is atypical.")
    columns: dict[str, dict[str, Tensor]] = {}
    extra: dict[str, dict[str, Tensor]] = {}
    impacts = {}
    for name in dict.fromkeys(scores):
        keywords = dict((options or {}).get(name, {}))
        if name not in IMPACTS:
            columns[name] = _cpu(score_units(name, model, sites, batches, atypical=chosen, ranks=ranks, **keywords))
            continue
        impact = IMPACTS[name](model, sites, batches, ranks=ranks, **keywords)
        impact = {site: rows.float() for site, rows in impact.items()}  # a mean in bfloat16 has three digits
        columns[name] = _cpu(impact_score(impact, y, chosen, ranks))
        everyone = {site: ranks.gather(rows) for site, rows in impact.items()}
        impacts[name] = _cpu(everyone)
        extra[f"impact_atypical/{name}"] = {s: -v for s, v in columns[name].items()}
        if not bool(kind.all()):
            extra[f"impact_typical/{name}"] = _cpu({s: class_mean(v, labels, ~kind) for s, v in everyone.items()})
    return UnitReport({**columns, **extra}, impacts)


def write_table(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write dicts that have the same keys as CSV.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("There is nothing to write.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_examples(ranked: RankedExamples, path: str | Path) -> Path:
    """Write ranked examples as CSV with the columns ``rank, index, label, score``; returns the path.

    Example:
        >>> from demem.tracing import rank_examples
        >>> ranked = rank_examples(torch.tensor([0.5, 3.0]), torch.tensor([0, 1]))
        >>> print(write_examples(ranked, "memorised.csv").read_text())
        rank,index,label,score
        0,1,1,3.0
        1,0,0,0.5
        <BLANKLINE>
    """
    columns = zip(ranked.position.tolist(), ranked.label.tolist(), ranked.score.tolist(), strict=True)
    return write_table([{"rank": i, "index": p, "label": y, "score": s} for i, (p, y, s) in enumerate(columns)], path)


def picture_grid(images: Tensor, titles: Sequence[str], path: str | Path, columns: int = 8) -> Path:
    """Draw images in a grid, each scaled to its own range of values.

    Args:
        images: ``(k, C, H, W)`` or ``(k, H, W)``; of more than three channels the first three.
        titles: one per image.
        path: image file to write.
        columns: number of images per line.

    Returns:
        The path.

    Raises:
        ValueError: ``images`` have another shape.

    Example:
        >>> picture_grid(torch.rand(3, 3, 8, 8), ["first", "second", "third"], "examples.png").exists()
        True
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or not len(images):
        raise ValueError(f"Expected images (k, C, H, W), got {tuple(images.shape)}.")
    images = images.detach().float().cpu()
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1]
    low, high = images.flatten(1).amin(1), images.flatten(1).amax(1)
    images = (images - low.view(-1, 1, 1, 1)) / (high - low).clamp_min(1e-12).view(-1, 1, 1, 1)
    lines = -(-len(images) // columns)
    canvas = Figure(figsize=(1.3 * columns, 1.5 * lines), layout="constrained")
    FigureCanvasAgg(canvas)
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        axes = canvas.add_subplot(lines, columns, i + 1)
        axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray")
        axes.set_title(title, fontsize=6)
        axes.axis("off")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)
    return path


def _cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().float().cpu() for name, value in values.items()}

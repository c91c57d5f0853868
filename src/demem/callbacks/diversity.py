"""Watch the diversity of activations while a network trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from demem.measures import Binning, Diversity, mean_mi, measure_diversity, reservoir_compact, reservoir_keys
from demem.run import gather_rows
from demem.sites import ActivationReader, Reduce, Site, default_sites, find_sites


class ActivationDiversityMonitor(pl.Callback):
    """Log entropy and mutual information of activations at every validation, from unlabelled examples.

    Low entropy with high mutual information goes with heuristic (spurious) memorization, high entropy with low mutual
    information with example-level memorization (Bansal et al. 2022).  Compare epochs and runs, not single values.

    The activations are read during the validation loop that runs anyway (its first loader): no extra forward pass.
    Logged in nats before ``ModelCheckpoint`` and ``EarlyStopping`` look for their ``monitor``:

    - ``diversity/entropy/{site}``, ``diversity/mi/{site}``: means over one site;
    - ``diversity/entropy``, ``diversity/mi``: means over the whole network (mutual information also between sites,
      without the diagonal).

    ::

        Trainer(callbacks=[ActivationDiversityMonitor(), ModelCheckpoint(monitor="diversity/mi", mode="min")])

    Args:
        layers: site patterns, see :mod:`demem.sites`; ``None``: blocks or stages and the head's input, those
            that run.
        reduce: over space or tokens: ``"auto"``, ``"mean"``, ``"max"``, ``"first_token"``.
        bins: of the entropy.
        binning: units that share the range of the bins: ``"global"`` (the paper's), ``"per_site"``, ``"per_unit"``.
        mi: ``"binned"`` or ``"ksg"`` (the paper's; about a millisecond a pair), ``None`` for entropy alone.
        mi_bins: of the binned estimate, equally filled bins of each unit with the Miller–Madow correction.
        max_examples: most validation examples used, drawn with ``seed``.
        max_units: most units in the mutual information, drawn with ``seed``, evenly from all sites.
        every_n_epochs: measure when so many epochs have passed since the last measurement; always outside a fit.
        seed: of both draws.

    Attributes:
        history: a dict a measurement with ``epoch``, ``step``, ``num_examples`` and the logged values; kept in
            checkpoints.
        latest: the last measurement as :class:`demem.measures.Diversity`, for plots and verdicts; not in checkpoints.

    Raises:
        ValueError: arguments out of range, a pattern matches nothing, NaN or infinity in an activation (the site is
            named).
    """

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        reduce: Reduce = "auto",
        bins: int = 100,
        binning: Binning = "global",
        mi: Literal["binned", "ksg"] | None = "binned",
        mi_bins: int = 16,
        max_examples: int = 1_000,
        max_units: int = 128,
        every_n_epochs: int = 1,
        seed: int = 0,
    ) -> None:
        if min(max_examples, max_units) < 2 or every_n_epochs < 1:
            raise ValueError("max_examples and max_units must be at least 2, every_n_epochs at least 1.")
        if reduce == "positions":
            raise ValueError("reduce='positions' makes rows that are not examples; use demem.measures for it.")
        if binning not in ("global", "per_site", "per_unit"):
            raise ValueError(f"Unknown binning {binning!r}; use 'global', 'per_site' or 'per_unit'.")
        if mi not in ("binned", "ksg", None):
            raise ValueError(f"Unknown mi {mi!r}; use 'binned', 'ksg' or None.")
        self.layers = layers if layers is None or isinstance(layers, str) else list(layers)
        self.reduce: Reduce = reduce
        self.bins = bins
        self.binning: Binning = binning
        self.mi: Literal["binned", "ksg"] | None = mi
        self.mi_bins = mi_bins
        self.max_examples = max_examples
        self.max_units = max_units
        self.every_n_epochs = every_n_epochs
        self.seed = seed
        self.history: list[dict[str, float | int]] = []
        self.latest: Diversity | None = None
        self._reader: ActivationReader | None = None
        self._seen = 0
        self._positions = torch.empty(0, dtype=torch.long)
        self._rows: Tensor | None = None
        self._widths: dict[str, int] = {}

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            layers=self.layers, reduce=self.reduce, bins=self.bins, binning=self.binning, mi=self.mi, seed=self.seed
        )

    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(row) for row in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [dict(row) for row in state_dict["history"]]

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        if trainer.sanity_checking:
            return
        passed = trainer.current_epoch - int(self.history[-1]["epoch"]) if self.history else 0
        if trainer.state.fn == "fit" and 0 < passed < self.every_n_epochs:  # each validation of a measured epoch counts
            return
        self._reader = ActivationReader(self._sites(pl_module), self.reduce, optional=self.layers is None)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._reader is not None and dataloader_idx == 0:
            self._reader.__enter__()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._reader is None or dataloader_idx != 0:
            return
        sites = self._reader.pop()
        self._reader.__exit__()
        sizes = {len(rows) for rows in sites.values()}
        if len(sizes) != 1:
            raise ValueError(
                f"The sites yield different numbers of rows ({sizes}): a layer that runs several times for a batch "
                "cannot be watched beside one that runs once. Name the layers to watch with `layers`."
            )
        self._widths = {name: rows.shape[1] for name, rows in sites.items()}
        # Lightning's samplers deal examples out to the processes like cards, and fill up the last round.
        local = torch.arange(self._seen, self._seen + sizes.pop())
        self._seen += len(local)
        positions = local * trainer.world_size + trainer.global_rank
        real = positions < _dataset_size(trainer)
        rows = torch.cat([rows.float() for rows in sites.values()], 1)[real.to(pl_module.device)]
        positions = positions[real]
        if self._rows is not None:
            positions, rows = torch.cat([self._positions, positions]), torch.cat([self._rows, rows])
        self._positions, self._rows = self._sample(positions, rows)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._reader is None or self._rows is None:
            return
        positions, rows = self._positions, self._rows
        if trainer.world_size > 1:
            order = positions.to(rows.device)
            rows = gather_rows(trainer, order, rows)
            positions, rows = self._sample(gather_rows(trainer, order, order).cpu(), rows)
        parts = torch.split(rows.cpu(), list(self._widths.values()), 1)
        sites = dict(zip(self._widths, parts, strict=True))
        self._close()
        self.latest = measure_diversity(
            sites,
            self.bins,
            self.binning,
            estimator=self.mi,
            mi_bins=self.mi_bins,
            mi_binning="quantile",
            mi_correction="miller_madow",
            max_units=self.max_units,
            seed=self.seed,
        )
        values = self._values(self.latest)
        self.history.append(
            {"epoch": trainer.current_epoch, "step": trainer.global_step, "num_examples": len(rows), **values}
        )
        pl_module.log_dict(values, sync_dist=True, batch_size=1)  # equal on all processes; else Lightning warns

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _sites(self, pl_module: pl.LightningModule) -> list[Site]:
        return default_sites(pl_module) if self.layers is None else find_sites(pl_module, self.layers)

    def _sample(self, positions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        keys = reservoir_keys(positions, self.seed)
        if len(keys) <= self.max_examples:
            return positions, rows
        _, kept = reservoir_compact(keys, torch.arange(len(keys)), self.max_examples)
        kept = kept.sort().values
        return positions[kept], rows[kept.to(rows.device)]

    def _values(self, diversity: Diversity) -> dict[str, float]:
        values = {f"diversity/entropy/{site}": float(h.mean()) for site, h in diversity.entropy.items()}
        values["diversity/entropy"] = diversity.mean_entropy
        if self.mi is not None:
            blocks = {**diversity.site_mi(), "": diversity.mutual_information}
            for site, block in blocks.items():
                if len(block) > 1:
                    values["diversity/mi" + (f"/{site}" if site else "")] = float(mean_mi(block, diagonal=False))
        return values

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.__exit__()
        self._reader, self._rows, self._seen = None, None, 0


def _dataset_size(trainer: pl.Trainer) -> float:
    loaders = trainer.val_dataloaders
    loader = next(iter(loaders.values())) if isinstance(loaders, dict) else loaders
    loader = loader[0] if isinstance(loader, list | tuple) else loader
    try:
        return len(loader.dataset)  # type: ignore[union-attr]
    except (AttributeError, TypeError):
        return float("inf")

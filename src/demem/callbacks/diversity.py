"""Watch the diversity of activations while a network trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from demem.callbacks.figures import log_figures
from demem.measures import Binning, Diversity, Reservoir, mean_mi, measure_diversity
from demem.report import diversity_curves
from demem.run import (
    checks_version,
    first_loader,
    gather_rows,
    names_itself,
    size_of,
    validating_ranks,
    with_version,
)
from demem.sites import ActivationReader, Reduce, Site, default_sites, find_sites


class ActivationDiversityMonitor(pl.Callback):
    """Log entropy and mutual information of activations at every validation, from unlabelled examples.

    Low entropy with high mutual information goes with heuristic (spurious) memorization, high entropy with low mutual
    information with example-level memorization (Bansal et al. 2022).  Compare epochs and runs, not single values.

    The activations are read during the validation loop that runs anyway (its first loader): no extra forward pass.
    Logged in nats, before ``ModelCheckpoint`` and ``EarlyStopping`` read what they monitor:

    - ``diversity/entropy/{site}``, ``diversity/mi/{site}``: means over one site;
    - ``diversity/entropy``, ``diversity/mi``: means over the whole network (mutual information also between sites,
      without the diagonal).

    ::

        Trainer(callbacks=[ActivationDiversityMonitor(), ModelCheckpoint(monitor="diversity/mi", mode="min")])

    Args:
        layers: site patterns, see :mod:`demem.sites`; ``None``: blocks or stages and the head's input, those
            that run and give one row per example.
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
        ValueError: arguments out of range, a pattern matches nothing, layers that give different numbers of rows; NaN
            or infinity in an activation (the site is named).  Within a fit what fails after the sanity check warns.
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
        self._reservoir = Reservoir(max_examples, seed)
        self._seen = 0
        self._widths: dict[str, int] = {}
        self._uneven: set[str] = set()  # sites that have not one row per example
        self._all_validate = True
        self._read = False  # something has been read
        self._error: Exception | None = None  # of this validation

    @property
    def state_key(self) -> str:
        return self._generate_state_key(
            layers=self.layers, reduce=self.reduce, bins=self.bins, binning=self.binning, mi=self.mi, seed=self.seed
        )

    @with_version
    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(row) for row in self.history]}

    @checks_version
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = [dict(row) for row in state_dict["history"]]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._all_validate, self._read = True, False

    @names_itself
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sites(pl_module)  # refused now rather than after an epoch
        ranks = validating_ranks(trainer)
        self._all_validate = len(ranks) in (0, trainer.world_size)
        if not self._all_validate:
            rank_zero_warn(
                f"ActivationDiversityMonitor measures nothing in this fit: of {trainer.world_size} processes only "
                f"{ranks} have validation batches. Give each of them some."
            )

    @names_itself
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()
        if not self._all_validate:
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

    @names_itself
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
        try:
            self._read_batch(trainer, pl_module, self._reader)
        except (RuntimeError, ValueError) as error:
            if trainer.sanity_checking or trainer.state.fn != "fit":
                raise
            self._error = error
        finally:
            self._reader.__exit__()

    def _read_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, reader: ActivationReader) -> None:
        if self._read and not reader.ran:  # a step may leave batches out
            return
        sites = reader.pop()
        self._read = True
        size = len(next(reversed(sites.values())))  # by default this is what the head reads
        uneven = {name for name, rows in sites.items() if len(rows) != size}
        if uneven and self.layers is not None:
            sizes = sorted({len(rows) for rows in sites.values()})
            raise ValueError(
                f"The sites yield different numbers of rows ({sizes}): a layer that runs several times for a batch "
                "cannot be watched beside one that runs once. Name the layers to watch with `layers`."
            )
        self._uneven |= uneven
        sites |= {name: sites[name].new_zeros(size, sites[name].shape[1]) for name in uneven}  # left out in the end
        self._widths = {name: rows.shape[1] for name, rows in sites.items()}
        # Lightning's samplers deal examples out to the processes like cards, and fill up the last round.
        local = torch.arange(self._seen, self._seen + size)
        self._seen += len(local)
        positions = local * trainer.world_size + trainer.global_rank
        real = positions < size_of(first_loader(trainer.val_dataloaders))
        rows = torch.cat([rows.float() for rows in sites.values()], 1)[real.to(pl_module.device)]
        self._reservoir.add(positions[real], rows)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._reader is None:
            return
        if trainer.sanity_checking:  # that it can be read is all that is of interest
            self._close()
            return
        if trainer.strategy.reduce_boolean_decision(self._error is None):
            self._measure(trainer, pl_module)
        else:
            self._give_up(pl_module, self._error or ValueError("another process could not read its batches"))
        self._close()

    def _measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        widths, uneven, rows = self._gathered(trainer, pl_module.device)
        sites = dict(zip(widths, torch.split(rows.cpu(), list(widths.values()), 1), strict=True)) if len(rows) else {}
        sites = {name: values for name, values in sites.items() if name not in uneven}
        if not sites:
            return
        try:
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
        except ValueError as error:  # the same on all processes
            if trainer.state.fn != "fit":
                raise
            self._give_up(pl_module, error)
            return
        values = self._values(self.latest)
        self.history.append(
            {"epoch": trainer.current_epoch, "step": trainer.global_step, "num_examples": len(rows), **values}
        )
        pl_module.log_dict(values, sync_dist=True, batch_size=1)  # equal on all processes; else Lightning warns

    def _give_up(self, pl_module: pl.LightningModule, error: Exception) -> None:
        """What fails within a fit costs no run, also where another callback monitors the values."""
        rank_zero_warn(f"ActivationDiversityMonitor measures nothing, because {type(error).__name__}: {error}")
        names = ["diversity/entropy"] + ["diversity/mi"] * (self.mi is not None)
        pl_module.log_dict(dict.fromkeys(names, float("nan")), sync_dist=True, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log_figures(trainer, {"demem/diversity": lambda: diversity_curves(self.history)})

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _sites(self, pl_module: pl.LightningModule) -> list[Site]:
        return default_sites(pl_module) if self.layers is None else find_sites(pl_module, self.layers)

    def _gathered(self, trainer: pl.Trainer, device: torch.device) -> tuple[dict[str, int], set[str], Tensor]:
        """Units of each site, sites to leave out, and the sample ``(S, N)`` of all processes, of which some may have no
        examples."""
        if trainer.world_size == 1:
            return self._widths, self._uneven, self._reservoir.sample()[1] if self._widths else torch.empty(0)
        found: list[tuple[dict[str, int], set[str]]] = [({}, set())] * trainer.world_size
        torch.distributed.all_gather_object(found, (self._widths, self._uneven))
        widths: dict[str, int] = next((w for w, _ in found if w), {})
        uneven = set().union(*(names for _, names in found))
        if self._widths:
            positions, rows = self._reservoir.sample()
        else:
            positions, rows = torch.empty(0), torch.empty(0, sum(widths.values()), dtype=torch.float, device=device)
        positions = positions.to(device, torch.long)
        together = Reservoir(self.max_examples, self.seed)
        together.add(gather_rows(trainer, positions, positions).cpu(), gather_rows(trainer, positions, rows))
        return widths, uneven, together.sample()[1]

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
        self._reader, self._reservoir = None, Reservoir(self.max_examples, self.seed)
        self._seen, self._widths, self._uneven, self._error = 0, {}, set(), None

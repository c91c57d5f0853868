"""An example LightningModule: any classifier, cross-entropy, SGD or Adam, cosine schedule."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demem.batch import Batch, apply_model, unpack_batch


class Classifier(pl.LightningModule):
    """Train a classifier on batches that :func:`demem.batch.unpack_batch` reads.

    Logs ``train/loss``, ``val/loss`` and ``val/acc``; accuracies by group are the business of
    :class:`demem.callbacks.WorstGroupMonitor`.

    Args:
        model: a module that returns logits ``(B, C)``, ``"small_cnn"``, or the name of a timm model.
        num_classes: of a model given by name.
        in_chans: input channels of a model given by name.
        model_kwargs: more arguments of ``timm.create_model``.
        optimizer: ``"sgd"`` (momentum .9) or ``"adam"`` (AdamW).
        lr: learning rate at the start.
        weight_decay: as the optimizer takes it.
        cosine: let the learning rate fall to 0 over the fit, step by step, on half a cosine.
        class_balanced: weigh each example's loss by 1 / (its class's share of the training set), mean 1; reads
            ``train_class_counts`` of the data module.
        freeze_batchnorm: leave batch-norm layers in evaluation mode while training.

    Raises:
        ValueError: on a step, a label is out of range or the loss is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module | str = "small_cnn",
        num_classes: int = 2,
        in_chans: int = 3,
        model_kwargs: dict[str, Any] | None = None,
        optimizer: Literal["sgd", "adam"] = "sgd",
        lr: float = 0.05,
        weight_decay: float = 1e-4,
        cosine: bool = True,
        class_balanced: bool = False,
        freeze_batchnorm: bool = False,
    ) -> None:
        super().__init__()
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be 'sgd' or 'adam', got {optimizer!r}.")
        self.model = model if isinstance(model, nn.Module) else make_model(model, num_classes, in_chans, model_kwargs)
        self.optimizer = optimizer
        self.lr = lr
        self.weight_decay = weight_decay
        self.cosine = cosine
        self.class_balanced = class_balanced
        self.freeze_batchnorm = freeze_batchnorm
        self._class_weights: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean loss of a training batch; override it to train otherwise."""
        if self._class_weights is None:
            return F.cross_entropy(logits, batch.y)
        weights = self._class_weights.to(logits.device)[batch.y]
        return (weights * F.cross_entropy(logits, batch.y, reduction="none")).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        example = unpack_batch(batch, self)
        logits = apply_model(self, example.x)
        _check_outputs(example.y, logits)
        loss = self.loss(logits, example)
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"The training loss is {float(loss.detach())} at step {self.global_step}. Lower the learning rate "
                f"(lr={self.lr}), look for NaN in the inputs, or use a higher precision."
            )
        self.log("train/loss", loss, batch_size=len(example.y))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        example = unpack_batch(batch, self)
        logits = apply_model(self, example.x)
        _check_outputs(example.y, logits)
        self.log("val/loss", F.cross_entropy(logits, example.y), batch_size=len(example.y), sync_dist=True)
        accuracy = (logits.argmax(1) == example.y).float().mean()
        self.log("val/acc", accuracy, batch_size=len(example.y), prog_bar=True, sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        example = unpack_batch(batch, self)
        logits = apply_model(self, example.x)
        _check_outputs(example.y, logits)
        accuracy = (logits.argmax(1) == example.y).float().mean()
        self.log("test/acc", accuracy, batch_size=len(example.y), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Logits ``(B, C)``."""
        return apply_model(self, unpack_batch(batch, self).x)

    def on_fit_start(self) -> None:
        if not self.class_balanced:
            return
        counts = getattr(self.trainer.datamodule, "train_class_counts", None)  # type: ignore[attr-defined]
        if counts is None:
            raise ValueError(
                "class_balanced=True needs a data module with `train_class_counts`, e.g. a GroupedDataModule; or "
                "balance the sampling of your own loader instead."
            )
        self._class_weights = counts.sum() / (counts.clamp(min=1) * len(counts))

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        self._freeze()
        return self

    def on_train_epoch_start(self) -> None:
        self._freeze()  # Lightning puts each layer's mode back by itself, without calling train()

    def _freeze(self) -> None:
        if self.freeze_batchnorm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, self.lr, momentum=0.9, weight_decay=self.weight_decay)
            if self.optimizer == "sgd"
            else torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay)
        )
        steps = self.trainer.estimated_stepping_batches
        if not self.cosine or steps == float("inf"):  # max_epochs=-1: no end to fall to 0 at
            return optimizer
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, int(steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def make_model(
    name: str, num_classes: int = 2, in_chans: int = 3, model_kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """``"small_cnn"`` (:func:`small_cnn`), or a timm model by name.

    Raises:
        ValueError: timm has no such model; the message lists close names.
    """
    if name == "small_cnn":
        return small_cnn(num_classes, in_chans, **(model_kwargs or {}))
    import timm

    if name.partition(".")[0] not in timm.list_models():
        from difflib import get_close_matches

        close = get_close_matches(name, timm.list_models(), 5, 0.4)
        raise ValueError(f"There is no model {name!r}: name a timm model (close: {', '.join(close)}) or 'small_cnn'.")
    model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **(model_kwargs or {}))
    return model


def small_cnn(num_classes: int = 2, in_chans: int = 3, width: int = 32) -> nn.Sequential:
    """Three 3×3 convolutions with batch-norm and ReLU (``width``, 2·``width``, 4·``width`` channels), a max-pool before
    the last, mean over space and a linear head; for images from 8×8 pixels."""
    return nn.Sequential(
        *_conv(in_chans, width),
        *_conv(width, 2 * width),
        nn.MaxPool2d(2),
        *_conv(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


def _conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _check_outputs(y: Tensor, logits: Tensor) -> None:
    if y.numel() and int(y.max()) >= logits.shape[1]:
        raise ValueError(
            f"A batch holds class {int(y.max())}, but the model has {logits.shape[1]} outputs (classes 0 to "
            f"{logits.shape[1] - 1}). Set num_classes, or fix the labels."
        )

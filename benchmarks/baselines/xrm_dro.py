"""Cross-risk minimisation, then GroupDRO on the groups that it finds (Pezeshki et al., ICML 2024).  No group label.

*Twins.*  Each training example belongs to one of two networks by the toss of a coin.  Both see every batch; each learns
its own half, by cross-entropy whose classes count the same.  After each batch the label of every example is replaced by
the class that the *other* network gives it, with probability (p − 1/C)·C/(C − 1), p the other network's softmax for
that class.  So the two confirm each other in what is easy, and drift away from the labels of examples that go against
it.  The learning rate is constant and nothing is stopped early.  The rate is chosen on the first seed, where most
labels are flipped at the end, as in the paper (its grid: rates of 1e-5 to 1e-3, ten random draws; here the data set's
own and a tenth).

*Groups.*  An example, of the training or the validation set, is a cross-mistake if either network contradicts its
original label.  Group = 2·class + cross-mistake.

*GroupDRO* (:mod:`benchmarks.baselines.training_groups`) is trained from scratch on these groups, and its rate, weight
decay and epoch are chosen by the worst of them on the validation set.

Choices of ours: the twins start from different random heads or weights of the data set's network and train for its
number of epochs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.baselines.indexed import Indexed
from benchmarks.baselines.training_groups import GRID, fit_group_dro
from benchmarks.experiment import HELD_OUT, Experiment, Method, Outcome
from demem.batch import apply_model, as_logits, unpack_batch
from demem.data import GroupedDataModule, GroupedDataset
from demem.module import Classifier

RATES = (1.0, 0.1)  # of the data set's own learning rate


class Pair(nn.Module):
    """Two networks side by side: logits ``(B, 2·C)``, the first one's before the second one's."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.cat([as_logits(network(*args, **kwargs)) for network in (self.first, self.second)], 1)


def logits_of_both(pair: nn.Module, x: Any) -> Tensor:
    """Logits ``(B, 2, C)`` of a :class:`Pair`."""
    logits = apply_model(pair, x)
    return logits.view(len(logits), 2, -1)


class Twins(Classifier):
    """Trains a pair of networks by cross-risk minimisation.

    Args:
        first, second: what is trained, with the first one's optimizer.
        y: ``(S,)`` labels of the training set.
        half: ``(S,)`` bool, the examples that the first network learns.
        rate: of the optimizer, in units of the first one's.
        seed: of the flips.

    Attributes:
        labels: ``(S,)`` as they are now.
    """

    def __init__(
        self, first: Classifier, second: Classifier, y: Tensor, half: Tensor, rate: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__(
            Pair(first.model, second.model),
            optimizer=first.optimizer,
            lr=rate * first.lr,
            weight_decay=first.weight_decay,
            cosine=False,
            freeze_batchnorm=first.freeze_batchnorm,
        )
        self.labels, self.half = y.clone(), half
        self.draws = torch.Generator().manual_seed(seed)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index = batch["index"].cpu()
        logits = logits_of_both(self.model, unpack_batch(batch, self).x)
        own = self.half[index].to(logits.device)[:, None]
        held_in = torch.where(own, logits[:, 0], logits[:, 1])
        held_out = torch.where(own, logits[:, 1], logits[:, 0])
        loss = class_balanced_loss(held_in, self.labels[index].to(logits.device))
        self.labels[index] = flipped(self.labels[index], held_out.detach().cpu(), self.draws)
        return loss


def class_balanced_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over the classes of a batch of their mean cross-entropy (nats)."""
    losses = F.cross_entropy(logits, y, reduction="none")
    return torch.stack([losses[y == label].mean() for label in y.unique()]).mean()


def flipped(y: Tensor, held_out: Tensor, generator: torch.Generator) -> Tensor:
    """Labels ``(B,)``, each replaced by the class that the held-out logits ``(B, C)`` give, with the probability
    (p − 1/C)·C/(C − 1): never where they are uniform, always where they are certain."""
    p, predicted = held_out.softmax(1).max(1)
    classes = held_out.shape[1]
    drawn = torch.rand(len(y), generator=generator) < (p - 1 / classes) * classes / (classes - 1)
    return torch.where(drawn, predicted, y)


def read_both(pair: nn.Module, loader: DataLoader[Any]) -> Tensor:
    """Logits ``(S, 2, C)`` of both networks, in the loader's order."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pair = pair.to(device).eval()
    with torch.no_grad():
        logits = torch.cat([logits_of_both(pair, x.to(device)).cpu() for x, _, _ in loader])
    pair.cpu()
    return logits


def cross_mistakes(pair: nn.Module, loader: DataLoader[Any], y: Tensor) -> Tensor:
    """Whether either network contradicts the label: bool ``(S,)``, in the loader's order."""
    return (read_both(pair, loader).argmax(2) != y[:, None]).any(1)


def with_groups(data: GroupedDataModule, train: Tensor, held_out: Tensor, num_groups: int) -> GroupedDataModule:
    """The same data with other groups in its training and validation sets, drawn equally often in training."""

    def regroup(rows: GroupedDataset | None, group: Tensor) -> GroupedDataset:
        assert rows is not None  # set up by the experiment
        rows = rows.select(torch.arange(len(rows)))
        rows.group = group
        return rows

    return GroupedDataModule(
        regroup(data.train_dataset, train),
        regroup(data.val_dataset, held_out),
        data.test_dataset,
        train_eval_dataset=regroup(data.train_eval_dataset, train),
        num_classes=data.num_classes,
        num_groups=max(num_groups, data.num_groups),  # the test set keeps its own
        sampling="group_balanced",
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        seed=data.seed,
    )


def _train(experiment: Experiment, rate: float) -> tuple[Twins, float]:
    """The twins, and the share of labels that are flipped at the end."""
    data, first = experiment.data(), experiment.module()
    second = experiment.task.module(experiment.settings)  # goes on from the first one's random state
    assert data.train_dataset is not None  # set up by the experiment
    y = data.train_dataset.y
    half = torch.rand(len(y), generator=torch.Generator().manual_seed(experiment.seed)) < 0.5
    twins = Twins(first, second, y, half, rate, experiment.seed)
    data.train_dataset = Indexed(data.train_dataset)
    experiment.fit(twins, data)
    return twins, float((twins.labels != y).float().mean())


def find_twins(experiment: Experiment) -> tuple[Twins, dict[str, Any]]:
    """The trained twins, and what was chosen and found on the way."""
    trained: dict[float, tuple[Twins, float]] = {}

    def choose() -> dict[str, Any]:
        trained.update({rate: _train(experiment, rate) for rate in RATES})
        return {"rate": max(RATES, key=lambda rate: trained[rate][1])}

    tuned = experiment.choose("xrm_dro_twins", choose)
    twins, flip_rate = trained.get(tuned["rate"]) or _train(experiment, tuned["rate"])
    return twins, {"tuned_twins": tuned, "flip_rate": flip_rate}


def find_groups(experiment: Experiment) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Inferred groups of the training and the validation examples, and what was chosen and found on the way."""
    twins, found = find_twins(experiment)
    data, groups = experiment.data(), []
    sides = ((data.train_eval_dataset, data.train_eval_dataloader()), (data.val_dataset, data.val_dataloader()))
    for rows, loader in sides:
        assert rows is not None  # set up by the experiment
        groups.append(2 * rows.y + cross_mistakes(twins.model, loader, rows.y).long())
    return groups[0], groups[1], {**found, "groups": torch.bincount(groups[0]).tolist()}


def xrm_dro(experiment: Experiment) -> Outcome:
    train, held_out, found = find_groups(experiment)
    num_groups = 2 * experiment.data().num_classes
    outcome = fit_group_dro(
        experiment, "xrm_dro", lambda: with_groups(experiment.data(), train, held_out, num_groups), num_groups
    )
    outcome.config.update(found)
    return outcome


METHODS = [
    Method(
        "xrm_dro",
        "T0",
        "twins by flipped labels; GroupDRO by worst inferred group on validation",
        xrm_dro,
        HELD_OUT,
        grid=f"twins' learning rate {RATES} × own; GroupDRO: {len(GRID)} pairs",
    )
]

"""The first paper's language tasks, on film reviews and MiniLM-L6: a planted word, and shuffled labels.

Bansal et al. 2022 fine-tune DistilBERT and RoBERTa on sentiment data in which adjectives or shuffled labels are
planted.  Here it is a word of a neutral pair (*movie* / *film*) that agrees with the label for a share of the
sentences, and few sentences, so that a network of all six trained layers takes minutes on a CPU core.
"""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.sentiment import WORDS, _tokenise, insert_word, load_minilm, read_reviews

TRAIN, UNSEEN, BATCH, LR = 600, 1000, 32, 1e-4
EPOCHS = {"planted": 4, "shuffled": 25}  # at most; training ends at 99.9% of an epoch's answers
SITES = tuple(f"first.{i}" for i in range(6))


class Reader(nn.Module):
    """MiniLM with a linear classifier of the first token; ``first.i`` gives block i's output at that token ``(B, C)``.

    Reads token ids ``(B, T)``, padded with 0; no more than the longest of the batch is computed.
    """

    def __init__(self) -> None:
        super().__init__()
        bert: Any = load_minilm()
        self.embeddings, self.blocks = bert.embeddings, bert.encoder.layer
        self.first = nn.ModuleList(nn.Identity() for _ in self.blocks)
        self.classifier = nn.Linear(bert.config.hidden_size, 2)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids[:, : int((ids != 0).sum(1).max())]
        mask = torch.zeros(ids.shape).masked_fill(ids == 0, torch.finfo(torch.float32).min)[:, None, None]
        x = self.embeddings(input_ids=ids)
        for block, first in zip(self.blocks, self.first, strict=True):
            x = block(x, mask)
            x = x[0] if isinstance(x, tuple) else x
            token = first(x[:, 0])
        logits: Tensor = self.classifier(token)
        return logits


@lru_cache(maxsize=1)
def _reviews(root: Path) -> tuple[list[str], Tensor]:
    sentences, y = read_reviews(root)
    return sentences, torch.from_numpy(y)


def _ids(sentences: list[str], words: np.ndarray | None, seed: int) -> Tensor:
    """Token ids ``(N, T)``, with the word of each sentence's attribute put in at a random place, if there are any."""
    if words is not None:
        places = np.random.default_rng(seed).random(len(sentences))
        given = zip(sentences, words, places, strict=True)
        sentences = [insert_word(s, WORDS[w], place) for s, w, place in given]
    rows = [torch.tensor(row) for row in _tokenise(sentences)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def train_planted(level: float, seed: int, options: argparse.Namespace) -> Any:
    """Extrinsic is the accuracy where the word goes with the label for half of the sentences."""
    train, y, unseen, labels = _draw(options.data_root, seed)
    generator = np.random.default_rng(seed)

    def words(y: Tensor, agreement: float) -> np.ndarray:
        return np.where(generator.random(len(y)) < agreement, y, 1 - y)

    model = _fresh(seed)
    accuracy, epochs = _fit(model, _ids(train, words(y, level), seed), y, EPOCHS["planted"], seed)
    plain, same = (_ids(unseen, words(labels, share), seed + 1) for share in (0.5, level))
    row = {
        "train_acc": accuracy,
        "extrinsic": _accuracy(model, plain, labels),
        "iid_acc": _accuracy(model, same, labels),
    }
    return model.eval(), same, {**row, "epochs": epochs, "train_size": TRAIN}


def train_shuffled(level: float, seed: int, options: argparse.Namespace) -> Any:
    from benchmarks.papers.measures import shuffled

    train, y, unseen, labels = _draw(options.data_root, seed)
    model = _fresh(seed)
    accuracy, epochs = _fit(model, _ids(train, None, seed), shuffled(y, level, seed), EPOCHS["shuffled"], seed)
    inputs = _ids(unseen, None, seed)
    row = {"train_acc": accuracy, "extrinsic": _accuracy(model, inputs, labels)}
    return model.eval(), inputs, {**row, "epochs": epochs, "train_size": TRAIN}


def _draw(root: Path, seed: int) -> tuple[list[str], Tensor, list[str], Tensor]:
    """Training sentences, half of each class, and unseen ones in the order of their length, with classes."""
    sentences, y = _reviews(root)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    halves = [order[y[order] == c] for c in (0, 1)]
    train = torch.cat([half[: TRAIN // 2] for half in halves])
    unseen = torch.cat([half[TRAIN // 2 : (TRAIN + UNSEEN) // 2] for half in halves])
    unseen = torch.tensor(sorted(unseen.tolist(), key=lambda i: len(sentences[i])))
    return [sentences[i] for i in train], y[train], [sentences[i] for i in unseen], y[unseen]


def _fresh(seed: int) -> Reader:
    torch.manual_seed(seed)
    model = Reader()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # what is memorised is to be seen
    return model


def _fit(model: Reader, ids: Tensor, y: Tensor, epochs: int, seed: int) -> tuple[float, int]:
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    generator = torch.Generator().manual_seed(seed)
    accuracy, epoch = 0.0, 0
    while epoch < epochs and accuracy < 0.999:
        correct, epoch = 0, epoch + 1
        for part in torch.randperm(len(y), generator=generator).split(BATCH):
            logits = model(ids[part])
            correct += int((logits.argmax(1) == y[part]).sum())
            optimizer.zero_grad()
            F.cross_entropy(logits, y[part]).backward()
            optimizer.step()
        accuracy = correct / len(y)
    return accuracy, epoch


@torch.no_grad()
def _accuracy(model: Reader, ids: Tensor, y: Tensor) -> float:
    answers = torch.cat([model(part).argmax(1) for part in ids.split(50)])
    return float((answers == y).float().mean())

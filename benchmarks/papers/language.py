"""The first paper's language tasks, on film reviews and MiniLM-L6: a planted word, and shuffled labels.

Bansal et al. 2022 fine-tune DistilBERT and RoBERTa on sentiment data in which adjectives or shuffled labels are
planted.  Here it is a word of a neutral pair (*movie* / *film*) that agrees with the label for a share of the
sentences, and few sentences, so that a network of all six trained layers takes minutes on a CPU core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.papers.training import accuracy_of, fit, shuffled
from benchmarks.sentiment import WORDS, attention_mask, insert_word, load_minilm, read_reviews, tokenise
from demem.sites import first_tensor

TRAIN, UNSEEN = 600, 1000  # sentences
BATCH, READ, LR = 32, 50, 1e-4  # sentences of a step, and of a pass that learns nothing; learning rate
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
        x = self.embeddings(input_ids=ids)
        mask = attention_mask(ids == 0, x.dtype)
        for block, first in zip(self.blocks, self.first, strict=True):
            x = first_tensor(block(x, mask))
            token = first(x[:, 0])
        logits: Tensor = self.classifier(token)
        return logits


def _ids(sentences: list[str], words: np.ndarray | None, seed: int) -> Tensor:
    """Token ids ``(N, T)``, with the word of each sentence's attribute put in at a random place, if there are any."""
    if words is not None:
        places = np.random.default_rng(seed).random(len(sentences))
        given = zip(sentences, words, places, strict=True)
        sentences = [insert_word(s, WORDS[w], place) for s, w, place in given]
    rows = [torch.tensor(row) for row in tokenise(sentences)]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def train_planted(level: float, seed: int, options: argparse.Namespace) -> Any:
    """Extrinsic is the accuracy where the word goes with the label for half of the sentences."""
    train, y, unseen, labels = _draw(options.data_root, seed)
    generator = np.random.default_rng(seed)

    def words(y: Tensor, agreement: float) -> np.ndarray:
        return np.where(generator.random(len(y)) < agreement, y, 1 - y)

    model = _fresh(seed)
    accuracy, epochs = _fit(model, _ids(train, words(y, level), seed), y, "planted", seed)
    plain, same = (_ids(unseen, words(labels, share), seed + 1) for share in (0.5, level))
    row = {
        "train_acc": accuracy,
        "extrinsic": accuracy_of(model, plain, labels, READ),
        "iid_acc": accuracy_of(model, same, labels, READ),
    }
    return model.eval(), same, {**row, "epochs": epochs, "train_size": TRAIN}


def train_shuffled(level: float, seed: int, options: argparse.Namespace) -> Any:
    train, y, unseen, labels = _draw(options.data_root, seed)
    model = _fresh(seed)
    accuracy, epochs = _fit(model, _ids(train, None, seed), shuffled(y, level, seed), "shuffled", seed)
    inputs = _ids(unseen, None, seed)
    row = {"train_acc": accuracy, "extrinsic": accuracy_of(model, inputs, labels, READ)}
    return model.eval(), inputs, {**row, "epochs": epochs, "train_size": TRAIN}


def _draw(root: Path, seed: int) -> tuple[list[str], Tensor, list[str], Tensor]:
    """Training sentences, half of each class, and unseen ones in the order of their length, with classes."""
    sentences, classes = read_reviews(root)
    y = torch.from_numpy(classes)
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


def _fit(model: Reader, ids: Tensor, y: Tensor, kind: str, seed: int) -> tuple[float, int]:
    return fit(model, ids, y, EPOCHS[kind], BATCH, seed, LR, kind=torch.optim.AdamW)

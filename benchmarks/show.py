"""``python -m benchmarks report``: train demem on one data set, and write the report that a person looks at.

The data sets that are made of cached features are shown by their pictures or sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks.options import Parser

if TYPE_CHECKING:
    from benchmarks.experiment import Settings
    from demem.data import GroupedDataModule

Show = Callable[[str, int], Any]

# Title, classes, and what usually goes with each of them, the attribute; group = 2·class + attribute.
WORDS: dict[str, tuple[str, list[str], list[str]]] = {
    "digits": ("Digits in coloured ink", ["0–4", "5–9"], ["red", "green"]),
    "digits_balanced": ("Digits in ink of any colour", ["0–4", "5–9"], ["red", "green"]),
    "solar": ("Solar cells", ["functional", "defective"], ["monocrystalline", "polycrystalline"]),
    "sentiment": ("Film reviews", ["negative", "positive"], ["“movie”", "“film”"]),
    "waterbirds": ("Waterbirds", ["landbird", "waterbird"], ["on land", "on water"]),
}


def main(argv: list[str]) -> int:
    from benchmarks.compare import quiet
    from benchmarks.experiment import TASKS, Experiment, Settings, add_task_options
    from benchmarks.results import HELD_OUT
    from demem.callbacks import ActivationDiversityMonitor, MemorizationRemover, WorstGroupMonitor
    from demem.report import ReportOptions

    parser = Parser("report", __doc__)
    add_task_options(parser)
    parser.add_argument("--held-out", choices=[source for source in HELD_OUT if source != "none"], default="val")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="HTML file to write (default: results/report-DATA.html)")
    options = parser.parse_args(argv)
    out = (options.out or Path("results") / f"report-{options.data}.html").resolve()
    settings, task = Settings(options.data_root, options.weights, options.cache), TASKS[options.data]
    if task.check is not None:
        task.check(settings)
    quiet()
    experiment = Experiment(task, settings, options.seed, options.held_out, options.epochs)
    data = experiment.data()
    title, classes, attributes = WORDS.get(options.data.removesuffix("_lite0"), (options.data, None, None))
    report = ReportOptions(
        str(out),
        title,
        classes,
        attributes,
        [f"{c}, {a}" for c in classes for a in attributes] if classes and attributes else None,
        show=shower(options.data, settings, data),
    )
    remover = MemorizationRemover(report=report, seed=options.seed)
    experiment.fit(data=data, callbacks=[WorstGroupMonitor(), ActivationDiversityMonitor(), remover])
    Console().print(remover.summary(), markup=False, highlight=False, soft_wrap=True)
    return 0 if remover.reporter.path is not None else 1


def shower(name: str, settings: Settings, data: GroupedDataModule) -> Show | None:
    """What shows an example of a data set that is made of cached features; ``None`` for others."""
    found = {"solar": _solar, "sentiment": _sentiment, "waterbirds": _waterbirds}.get(name.removesuffix("_lite0"))
    return None if found is None else found(settings, data)


def _row(data: GroupedDataModule, split: str, position: int) -> int:
    """The row of an example in the arrays that its data set is cut from."""
    dataset: Any = data.train_dataset if split == "train" else data.val_dataset
    return int(dataset.positions[position])


def _solar(settings: Settings, data: GroupedDataModule) -> Show:
    from benchmarks.backbones import open_image
    from benchmarks.packages import require
    from benchmarks.solar import EXTRA, PACKAGE, read_labels

    paths, _, _ = read_labels(require(PACKAGE, EXTRA) / "data" / "labels.csv")
    return lambda split, position: _tensor(open_image(paths[_row(data, split, position)]))


def _waterbirds(settings: Settings, data: GroupedDataModule) -> Show:
    import numpy as np

    from benchmarks.backbones import open_image
    from demem.data import load_wilds

    root = settings.root("waterbirds")
    dataset = load_wilds("waterbirds", root)

    def show(split: str, position: int) -> Any:
        part = "train" if split == "train" or data.held_out == "iid" else "val"
        rows = np.flatnonzero(dataset.split_array == dataset.split_dict[part])
        name = str(dataset._input_array[rows[_row(data, split, position)]])
        return _tensor(open_image(root / "waterbirds_v1.0" / name))

    return show


def _sentiment(settings: Settings, data: GroupedDataModule) -> Show:
    import numpy as np

    from benchmarks.sentiment import WORDS as WORDS_OF_REVIEWS
    from benchmarks.sentiment import insert_word, read_reviews

    sentences, _ = read_reviews(settings.root("sentiment"))
    places = np.random.default_rng(0).random(len(sentences))  # as the features were computed

    def show(split: str, position: int) -> str:
        word, sentence = divmod(_row(data, split, position), len(sentences))
        return insert_word(sentences[sentence], WORDS_OF_REVIEWS[word], places[sentence])

    return show


def _tensor(image: Any) -> Any:
    """``(3, H, W)`` of a PIL image."""
    import numpy as np
    import torch

    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()

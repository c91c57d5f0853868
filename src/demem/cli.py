"""``demem fit --config configs/data/digits.yaml --config configs/method/demem.yaml``: Lightning's command line;
``demem report RUN_DIR``: the report of a run, made again from its data.

Any LightningModule, data module and callback can be named by ``class_path``; later ``--config`` files and options
override earlier ones.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any


def main(args: Sequence[str] | None = None) -> None:
    """Run ``fit``, ``validate``, ``test``, ``predict`` or ``report``.

    Args:
        args: the command line after the program's name; default ``sys.argv[1:]``.
    """
    given = sys.argv[1:] if args is None else list(args)
    if given[:1] == ["report"]:
        report(given[1:])
        return
    import pytorch_lightning as pl
    from pytorch_lightning.cli import LightningCLI

    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    LightningCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        args=None if args is None else given,
    )


def report(args: Sequence[str]) -> None:
    """Make the report of a run again: ``demem report RUN_DIR``.

    Args:
        args: the command line after ``report``.
    """
    parser = argparse.ArgumentParser("demem report", description="Make the HTML report of a run again from its data.")
    parser.add_argument(
        "run",
        type=Path,
        help="folder of a run that was trained with MemorizationRemover(report=...), or the report's .json file; of "
        "several runs below the folder the latest counts",
    )
    parser.add_argument("--out", type=Path, help="HTML file to write (default: beside the data)")
    parser.add_argument("--title", help="first line of the report")
    names = {"class": "one per class", "attribute": "what usually goes with each class", "group": "one per true group"}
    for name, words in names.items():
        parser.add_argument(f"--{name}-names", help=f"{words}, comma-separated", metavar="A,B")
    options = parser.parse_args(args)

    from demem.report import load, render, write_whole

    try:
        path = _report_data(options.run)
        data = load(path)
        given = {f"{name}_names": getattr(options, f"{name}_names") for name in names}
        changes: dict[str, Any] = {
            key: [part.strip() for part in value.split(",")] for key, value in given.items() if value
        }
        data = replace(data, **changes, **({"title": options.title} if options.title else {}))
        print(f"demem: the report is in {write_whole(options.out or path.with_suffix('.html'), render(data))}")
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


def _report_data(run: Path) -> Path:
    """The JSON file of the latest report in a folder or below."""
    if run.is_file():
        return run.with_suffix(".json")
    found = [p for p in run.rglob("*.json") if p.with_suffix(".html").exists() or p.name == "report.json"]
    if not found:
        raise FileNotFoundError(
            f"There is no report.json in {run} or below. Train with MemorizationRemover(report='report.html'), which "
            "writes it into the run's folder."
        )
    return max(found, key=lambda path: path.stat().st_mtime)


if __name__ == "__main__":
    main()

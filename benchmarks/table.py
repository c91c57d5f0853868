"""``python -m benchmarks table FILE``: the tables and figures of a comparison again, from its rows."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from benchmarks.options import Parser
from benchmarks.report import write_report
from benchmarks.results import HELD_OUT, read_jsonl

NEEDED = {"data", "method", "tier", "held_out", "seed", "epochs", "worst_group_acc", "group_acc", "train_group_acc"}


def main(argv: list[str]) -> int:
    parser = Parser("table", __doc__)
    parser.add_argument("file", type=Path, help="results.jsonl of a comparison, or results.jsonl.gz")
    parser.add_argument("--out", type=Path, default=Path("results/table"), help="default: results/table/")
    options = parser.parse_args(argv)
    if not options.file.is_file():
        raise FileNotFoundError(f"There is no file {options.file}.")
    rows = read_jsonl(options.file)
    if not rows:
        raise ValueError(f"{options.file} holds no rows.")
    for i, row in enumerate(rows, 1):
        missing = sorted(NEEDED - row.keys())
        if missing:
            raise ValueError(
                f"Row {i} of {options.file} has no {', '.join(missing)}: it is not of python -m benchmarks compare."
            )
        if row["held_out"] not in HELD_OUT:
            raise ValueError(f"Row {i} of {options.file} has the held-out source {row['held_out']!r}.")
    options.out.mkdir(parents=True, exist_ok=True)
    write_report(options.out, Console(), options.file)
    return 0

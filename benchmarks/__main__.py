"""``python -m benchmarks COMMAND``: hand over to the file that does it."""

from __future__ import annotations

import importlib
import io
import sys

from rich.console import Console

COMMANDS = {
    ("compare",): "benchmarks.compare",
    ("table",): "benchmarks.table",
    ("report",): "benchmarks.show",
    ("ceiling",): "benchmarks.ceiling",
    ("golden",): "benchmarks.golden",
    ("units",): "benchmarks.units",
    ("detector",): "benchmarks.detector",
    ("situations",): "benchmarks.situations",
    ("papers", "measures"): "benchmarks.papers.measures",
    ("papers", "tracing"): "benchmarks.papers.tracing",
    ("speed", "measures"): "benchmarks.speed.measures",
    ("speed", "remover"): "benchmarks.speed.remover",
    ("speed", "scale"): "benchmarks.speed.scale",
    ("speed", "tracing"): "benchmarks.speed.tracing",
}


def main(argv: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # also when piped: each line comes during the run
    for words, module in COMMANDS.items():
        if tuple(argv[: len(words)]) == words:
            try:
                return int(importlib.import_module(module).main(argv[len(words) :]) or 0)
            except (ValueError, FileNotFoundError) as error:
                Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
                return 2
    group = [words for words in COMMANDS if words[:1] == tuple(argv[:1])]
    wanted = argv[:1] not in ([], ["-h"], ["--help"]) and not (group and argv[1:2] in (["-h"], ["--help"]))
    print(
        (f"Unknown benchmark: {' '.join(argv[:2])}\n" if wanted else "")
        + "usage: python -m benchmarks COMMAND [options]\n\n  "
        + "\n  ".join(" ".join(words) for words in group or COMMANDS)
        + "\n\nCOMMAND --help lists a command's options.",
        file=sys.stderr if wanted else sys.stdout,
    )
    return 2 if wanted else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

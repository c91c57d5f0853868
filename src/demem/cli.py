"""``demem fit --config configs/data/digits.yaml --config configs/method/demem.yaml``: Lightning's command line;
``demem report RUN_DIR``: the report of a run, made again from its data.

Any LightningModule, data module and callback can be named by ``class_path``; later ``--config`` files and options
override earlier ones.  The configurations that are shipped are found under these names from any folder.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from demem import __version__

COMMANDS = {
    "fit": "train a module on data, with callbacks",
    "validate": "validate it",
    "test": "test it",
    "predict": "predict with it",
    "report": "make the report of a run again from its data",
}
DEBUG = "DEMEM_DEBUG"
# Of a package that was installed, and of a repository that is used in place.
_SHIPPED = (Path(__file__).parent, Path(__file__).parents[2])


def main(args: Sequence[str] | None = None) -> None:
    """Run ``fit``, ``validate``, ``test``, ``predict`` or ``report``.

    What goes wrong before the first training step ends the program with one line and exit code 2; the environment
    variable ``DEMEM_DEBUG=1`` shows where it was raised.

    Args:
        args: the command line after the program's name; default ``sys.argv[1:]``.
    """
    given = sys.argv[1:] if args is None else list(args)
    if given == ["--version"]:
        print(f"demem {__version__}")
    elif not given or given[0] in ("-h", "--help"):
        print(_usage())
    elif given[0] == "report":
        report(given[1:])
    elif given[0] in COMMANDS:
        _run(given)
    else:
        _fail(f"There is no command {given[0]!r}; use one of {', '.join(COMMANDS)}.{did_you_mean(given[:1], COMMANDS)}")


def _usage() -> str:
    listed = "\n".join(f"  {name:<10}{words}" for name, words in COMMANDS.items())
    return (
        f"usage: demem COMMAND [options]\n\n{listed}\n\n"
        "demem COMMAND --help lists a command's options, demem --version the version.\n"
        "Example: demem fit --config configs/data/digits.yaml --config configs/method/demem.yaml"
    )


def _fail(reason: str) -> None:
    sys.stderr.write(f"error: {reason}\n")
    sys.exit(2)


def _run(given: list[str]) -> None:
    import pytorch_lightning as pl
    from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI

    import demem.callbacks
    import demem.data
    import demem.module  # noqa: F401 (classes that are imported are found by their short names)

    class CommandLine(LightningCLI):
        """Lightning's command line, with errors before the first step in one line."""

        def __init__(self) -> None:
            try:
                super().__init__(
                    pl.LightningModule,
                    pl.LightningDataModule,
                    subclass_mode_model=True,
                    subclass_mode_data=True,
                    save_config_kwargs={"overwrite": True},
                    seed_everything_default=0,
                    parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
                )
            except Exception as error:
                trainer = getattr(self, "trainer", None)
                if os.environ.get(DEBUG) or (trainer is not None and trainer.global_step > 0):
                    raise
                reason = _reason(error)
                _fail(f"{reason}{_hint(reason, self._subcommand_parsers[given[0]])} ({DEBUG}=1 shows where.)")

        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            self.config = parser.parse_args(_with_shipped_configs(given))  # Lightning warns of such arguments

    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    CommandLine()


def _with_shipped_configs(given: Sequence[str]) -> list[str]:
    """The command line, in which a ``--config`` that is no file names one that is shipped with demem.

    >>> Path(_with_shipped_configs(["--config", "configs/data/digits.yaml"])[1]).is_file()
    True
    """
    found: list[str] = []
    for argument in given:
        option, equals, value = argument.rpartition("=") if argument.startswith("--config=") else ("", "", argument)
        follows = bool(equals) or found[-1:] in (["--config"], ["-c"])
        if follows and not Path(value).exists():
            shipped = (folder / value for folder in _SHIPPED if (folder / value).is_file())
            value = str(next(shipped, value))
        found.append(f"{option}{equals}{value}")
    return found


def _hint(reason: str, parser: argparse.ArgumentParser) -> str:
    """What may be meant by a misspelt option, and the configurations that there are instead of one that is missing."""
    unknown = reason.partition("unrecognized arguments: ")[2].split()
    if unknown:
        return "." + did_you_mean([word.partition("=")[0] for word in unknown], parser._option_string_actions)
    if not reason.startswith("config: File does not exist"):
        return ""
    shipped = {str(p.relative_to(folder)) for folder in _SHIPPED for p in (folder / "configs").rglob("*.yaml")}
    return f". These come with demem: {', '.join(sorted(shipped))}."


def did_you_mean(words: Iterable[str], known: Iterable[str]) -> str:
    """The known words that unknown ones begin, or else are nearest to, as a question.

    >>> did_you_mean(["--conf"], ["--config", "--cold"]), did_you_mean(["--config"], ["--config"])
    (' Did you mean --config?', '')
    """
    names = list(known)
    near = {w: [n for n in names if n.startswith(w)] or difflib.get_close_matches(w, names) for w in words}
    found = [matches[0] for word, matches in near.items() if matches and word not in names]
    return f" Did you mean {', '.join(found)}?" if found else ""


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: jsonargparse puts a list of all types that a value is not around it.

    >>> _reason(FileNotFoundError("no such\\nfolder"))
    'no such folder'
    """
    key = re.match(r'Parser key "([^"]+)"', str(error))
    cause: BaseException | None = error
    while cause is not None and ("Does not validate against" in str(cause) or not str(cause)):
        error, cause = cause, cause.__cause__ or cause.__context__
    error = cause or error
    words = " ".join(str(error).split()) or type(error).__name__
    expected = isinstance(error, ValueError | TypeError | OSError | ImportError | argparse.ArgumentError)
    words = re.sub(r'^Parser key "([^"]+)": ', "", words)
    return ("" if key is None else f"{key[1]}: ") + ("" if expected else f"{type(error).__name__}: ") + words


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
        path, others = _report_data(options.run)
        data = load(path)
        given = {f"{name}_names": getattr(options, f"{name}_names") for name in names}
        changes: dict[str, Any] = {
            key: [part.strip() for part in value.split(",")] for key, value in given.items() if value
        }
        data = replace(data, **changes, **({"title": options.title} if options.title else {}))
        written = write_whole(options.out or path.with_suffix(".html"), render(data))
        of = f", made from {path}, the latest of {others + 1} in {options.run} and below" if others else ""
        print(f"demem: the report is in {written}{of}")
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")


def _report_data(run: Path) -> tuple[Path, int]:
    """The JSON file of the latest report in a folder or below, and how many others there are."""
    if run.is_file():
        return run.with_suffix(".json"), 0
    found = [p for p in run.rglob("*.json") if p.with_suffix(".html").exists() or p.name == "report.json"]
    if not found:
        raise FileNotFoundError(
            f"There is no report.json in {run} or below. Train with MemorizationRemover(report='report.html'), which "
            "writes it into the run's folder."
        )
    return max(found, key=lambda path: path.stat().st_mtime), len(found) - 1


if __name__ == "__main__":
    main()

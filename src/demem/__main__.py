"""``python -m demem``: the command line."""

from demem.cli import main

main()

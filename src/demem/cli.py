"""``demem fit --config configs/data/digits.yaml --config configs/method/demem.yaml``: Lightning's command line.

Any LightningModule, data module and callback can be named by ``class_path``; later ``--config`` files and options
override earlier ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        args: the command line after the program's name; default ``sys.argv[1:]``.
    """
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
        args=None if args is None else list(args),
    )


if __name__ == "__main__":
    main()

"""Trains digits with the remover as a script of its own: ``python script_ddp.py DEVICES FILE``."""

import sys
import warnings

import pytorch_lightning as pl
import torch

from demem.callbacks import MemorizationRemover
from demem.data import SpuriousDigits
from demem.module import Classifier

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    devices, file = int(sys.argv[1]), sys.argv[2]
    pl.seed_everything(0, verbose=False)
    remover = MemorizationRemover(shares=(0.5,))
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        strategy="ddp" if devices > 1 else "auto",  # starts this script again for every other process
        devices=devices,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[remover],
    )
    module = Classifier()
    trainer.fit(module, datamodule=SpuriousDigits(batch_size=32 // devices))
    path = file if trainer.world_size == 1 else f"{file}.{trainer.global_rank}"
    content = {"remover": remover.state_dict(), "weights": module.state_dict(), "world": trainer.world_size}
    torch.save(content, path)

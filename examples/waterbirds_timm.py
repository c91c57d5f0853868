"""Fine-tune a timm network on Waterbirds, or another wilds data set, from a local folder; best with a GPU."""

import argparse
import sys

import pytorch_lightning as pl

from demem.callbacks import MemorizationRemover, WorstGroupMonitor
from demem.data import WildsDataModule
from demem.module import Classifier
from demem.report import ReportOptions

REPORT = ReportOptions(
    title="Waterbirds",
    class_names=["landbird", "waterbird"],
    attribute_names=["looks like a landbird", "looks like a waterbird"],
)


def main(arguments: list[str] | None = None) -> MemorizationRemover:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", help="folder that holds waterbirds_v1.0")
    parser.add_argument("--data", default="waterbirds")
    parser.add_argument("--model", default="mobilenetv2_100", help="any timm network")
    parser.add_argument("--random-weights", action="store_true", help="do not fetch pretrained ones")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--out", default="results/waterbirds_timm")
    options = parser.parse_args(arguments)

    data = WildsDataModule(options.data, options.root, resize=options.crop * 8 // 7, crop=options.crop)
    try:
        data.setup()
    except FileNotFoundError as error:
        sys.exit(f"{error}\nFetch it once with wilds: wilds.get_dataset({options.data!r}, root_dir=..., download=True)")
    model = Classifier(
        options.model,
        num_classes=data.num_classes,
        model_kwargs={"pretrained": not options.random_weights},
        lr=3e-3,
        freeze_batchnorm=not options.random_weights,
    )
    remover = MemorizationRemover(report=REPORT if options.data == "waterbirds" else "report.html")
    callbacks = [remover, WorstGroupMonitor()]
    trainer = pl.Trainer(max_epochs=options.epochs, callbacks=callbacks, default_root_dir=options.out)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data)
    return remover


if __name__ == "__main__":
    main()

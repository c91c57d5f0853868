"""Batches in the forms that users yield."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from demem.batch import apply_model, has_group_part, unpack_batch
from demem.module import Classifier

X, Y, G = torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), torch.tensor([0, 3, 2, 1])


@pytest.mark.parametrize("form", [lambda g: (X, Y[:, None], g), lambda g: {"x": X, "y": Y, "group": g}])
def test_a_column_of_groups_is_read(form):
    batch = unpack_batch(form(G[:, None]))
    assert batch.y.tolist() == Y.tolist()
    assert batch.group.tolist() == G.tolist()


def test_metadata_needs_a_grouper():
    metadata = torch.stack([G, Y], 1)
    assert unpack_batch((X, Y, metadata)).group is None
    assert unpack_batch((X, Y, G[:, None].float())).group is None
    assert unpack_batch((X, Y, metadata), grouper=lambda m: m[:, 0]).group.tolist() == G.tolist()
    assert unpack_batch((X, Y, G[:, None]), grouper=lambda m: m[:, 0] + 1).group.tolist() == (G + 1).tolist()


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, input_ids, attention_mask):
        return self.fc((self.embed(input_ids) * attention_mask[:, :, None]).mean(1))


def test_tokens_by_name_and_training_without_an_end():
    batch = {"input_ids": torch.ones(4, 5, dtype=torch.long), "attention_mask": torch.ones(4, 5), "labels": Y}
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    stop = pl.callbacks.LambdaCallback(on_train_epoch_end=lambda trainer, _: setattr(trainer, "should_stop", True))
    trainer = pl.Trainer(max_epochs=-1, callbacks=[stop], enable_model_summary=False, **settings)
    trainer.fit(Classifier(Text()), DataLoader([batch], batch_size=None))
    assert trainer.global_step == 1


class Masked(nn.Linear):
    def forward(self, pixels, mask=None, y=None):
        return super().forward(pixels if mask is None else pixels * mask)


def test_keys_that_forward_names_go_in_with_the_inputs():
    model, mask = Masked(3, 2), torch.tensor([1.0, 0.0, 1.0]).expand(4, 3)
    batch = {"x": X, "mask": mask, "y": Y, "group": G, "index": torch.arange(4)}
    for module in (model, Classifier(model), torch.compile(model)):
        x = unpack_batch(batch, module).x
        assert sorted(x) == ["mask", "pixels"]
    assert torch.equal(apply_model(Classifier(model), x), model(X, mask))
    assert unpack_batch(batch, nn.Linear(3, 2)).x is X
    assert unpack_batch({"x": X, "y": Y, "group": G}, model).x is X


@pytest.mark.parametrize("x", [X, [X, X]])
def test_a_forward_that_takes_something_else(x):
    class Whole(nn.Linear):
        def forward(self, batch):
            return super().forward(batch[0])

    with pytest.raises((TypeError, ValueError), match=r"forward\(x\) must take the inputs .*`unpack_batch"):
        apply_model(Whole(3, 2) if x is X else nn.Linear(3, 2), x)


class _Own(nn.Linear):
    def __init__(self, unpack_batch):
        super().__init__(3, 2)
        self.unpack_batch = unpack_batch


def test_what_a_module_unpacks_itself_may_have_any_form_that_is_read():
    for own in (lambda batch: [X, Y, G], lambda batch: {"x": X, "y": Y, "group": G}):
        assert unpack_batch("rows", _Own(own)).group.tolist() == G.tolist()
    assert unpack_batch("rows", _Own(lambda batch: (X, Y))).group is None


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (lambda batch, stage: (X, Y), r"unpack_batch\(batch\) cannot be called: missing .*'stage'"),
        (lambda batch: (X, Y, None, G), "returned a tuple of .Tensor, Tensor, NoneType, Tensor."),
        (lambda batch: {"x": X}, "returned a mapping of 'x'"),
        (lambda batch: X, "returned Tensor"),
        (lambda batch: (X, "a label"), "returned a tuple of .Tensor, str."),
    ],
)
def test_a_method_of_the_same_name_that_serves_another_purpose(own, message):
    with pytest.raises(TypeError, match=f"{message}.*return \\(x, y\\), .*give it another name"):
        unpack_batch((X, Y, G), _Own(own))


def test_an_error_within_the_modules_own_method_is_its_own():
    with pytest.raises(TypeError, match="unsupported operand"):
        unpack_batch((X, Y, G), _Own(lambda batch: batch - 1))


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((X, Y), False),
        ((X, Y, None), False),
        ((X, Y, {"path": "a.png"}), False),
        ((X, Y, ["land"] * 4), True),
        ((X, Y, torch.rand(4)), True),
        ({"x": X, "y": Y}, False),
        ({"x": X, "y": Y, "g": ["land"] * 4}, True),
        ({"x": X, "y": Y, "meta": torch.zeros(4, 2)}, True),
        ({"x": X, "y": Y, "metadata": ["a.png"] * 4}, False),
    ],
)
def test_something_in_the_place_of_groups(batch, expected):
    assert has_group_part(batch) is expected
    assert has_group_part(batch, nn.Linear(3, 2)) is expected
    assert not has_group_part(batch, _Own(lambda batch: batch))


def test_a_third_part_that_is_a_weight_is_named():
    with pytest.raises(ValueError, match=r"got torch\.float32 \(4,\)\. If the third part .*return \(x, y, None\)"):
        unpack_batch((X, Y, torch.rand(4)))

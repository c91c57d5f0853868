"""What holds for every callback: one table of settings, and the same tests for each of them."""

import copy
import pickle
from datetime import timedelta

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from test_remover import MANY, TEST, TRAIN, Net, _fit, _loaders, _Save
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, Subset

import demem.callbacks
from demem.callbacks import (
    ActivationDiversityMonitor,
    MemorizationRemover,
    MemorizationTracer,
    WorstGroupMonitor,
)

SETTINGS = {
    "remover": lambda folder: MemorizationRemover(),
    "remover with known groups": lambda folder: MemorizationRemover(use_groups=True, shares=(0.5,)),
    "remover that leaves sampling alone": lambda folder: MemorizationRemover(rebalance=False, fine_tune=0),
    "remover with a report": lambda folder: MemorizationRemover(report=f"{folder}/report.html"),
    "tracer": lambda folder: MemorizationTracer(scores="taylor", dirpath=str(folder), every_n_epochs=1),
    "diversity": lambda folder: ActivationDiversityMonitor(mi="ksg", max_units=8, max_examples=60),
    "worst group": lambda folder: WorstGroupMonitor(),
    "worst group in training": lambda folder: WorstGroupMonitor(train=True),
}
WATCHING = [name for name in SETTINGS if not name.startswith("remover")]
every_callback = pytest.mark.parametrize("name", SETTINGS)


def _equal(a, b):
    """Whether two states of a callback are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b or (a != a and b != b)


def _weights_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", WATCHING)
def test_watching_changes_nothing(name, tmp_path):
    plain, _ = _fit()
    random = torch.get_rng_state()
    module, _ = _fit(SETTINGS[name](tmp_path))
    assert _weights_equal(plain, module)
    assert torch.equal(torch.get_rng_state(), random)


@every_callback
def test_nothing_of_demem_is_left_in_the_network(name, tmp_path):
    module, _ = _fit(SETTINGS[name](tmp_path), epochs=2)
    for part in module.modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._load_state_dict_post_hooks, part._backward_hooks)
        assert not any(hooks)
    assert list(module.state_dict()) == list(Net().state_dict())
    network = pickle.loads(pickle.dumps(module.net))
    x = TEST.tensors[0]
    with torch.no_grad():
        expected = module.eval()(x)
        assert torch.equal(network.eval()(x), expected)
        assert torch.equal(copy.deepcopy(module)(x), expected)
        assert torch.equal(torch.jit.script(module.net)(x), expected)
        assert torch.allclose(torch.export.export(module.net, (x,)).module()(x), expected, atol=1e-6)


@every_callback
def test_a_checkpoint_holds_tensors_and_primitives(name, tmp_path):
    callback = SETTINGS[name](tmp_path)
    _, trainer = _fit(callback, epochs=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    content = torch.load(tmp_path / "end.ckpt", weights_only=True)  # refuses anything else
    again = SETTINGS[name](tmp_path)
    again.load_state_dict(content["callbacks"][callback.state_key])
    assert _equal(again.state_dict(), callback.state_dict())


@every_callback
def test_resumed_after_an_epoch_a_run_equals_an_uninterrupted_one(name, tmp_path):
    whole, second, loaders = SETTINGS[name](tmp_path), SETTINGS[name](tmp_path), _loaders()
    if not getattr(whole, "rebalance", False):  # after a resume Lightning shuffles otherwise
        loaders["train_dataloaders"] = DataLoader(TRAIN, 32)
    straight, _ = _fit(whole, loaders=loaders, callbacks=[_Save(1, tmp_path / "half.ckpt")])
    resumed, _ = _fit(second, loaders=loaders, ckpt_path=tmp_path / "half.ckpt")
    assert _weights_equal(straight, resumed)
    assert _equal(whole.state_dict(), second.state_dict())


@every_callback
def test_a_run_resumed_within_an_epoch_ends(name, tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 9:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    _fit(SETTINGS[name](tmp_path), epochs=2, callbacks=[Save()])
    callback = SETTINGS[name](tmp_path)
    _, trainer = _fit(callback, epochs=3, ckpt_path=tmp_path / "within.ckpt")
    assert trainer.current_epoch == 3


@every_callback
def test_a_second_fit_starts_anew(name, tmp_path):
    used = SETTINGS[name](tmp_path)
    _fit(used, epochs=1)
    again, _ = _fit(used, epochs=2)
    new, _ = _fit(SETTINGS[name](tmp_path), epochs=2)
    assert _weights_equal(again, new)


@every_callback
def test_an_exception_in_training_leaves_no_hook_and_no_sampler(name, tmp_path):
    class Breaks(Net):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 1:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    module, loaders = Breaks(), _loaders()
    sampler = loaders["train_dataloaders"].batch_sampler.sampler
    with pytest.raises(RuntimeError, match="out of luck"):
        _fit(SETTINGS[name](tmp_path), module, loaders=loaders)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert loaders["train_dataloaders"].batch_sampler.sampler is sampler


@every_callback
def test_runs_in_a_lightning_pytorch_trainer(name, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Own(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().net

        forward, training_step = Net.forward, Net.training_step
        validation_step, configure_optimizers = Net.validation_step, Net.configure_optimizers

    callback = SETTINGS[name](tmp_path)
    _fit(callback, Own(), epochs=2, library=lightning)
    own = SETTINGS[name](tmp_path)
    _fit(own, Net(), epochs=2)
    assert _equal(own.state_dict(), callback.state_dict())


class _KeepState(pl.Callback):
    def __init__(self, callback, folder):
        self.callback, self.folder = callback, folder

    def on_fit_end(self, trainer, pl_module):
        weights = {key: value.cpu() for key, value in pl_module.state_dict().items()}
        state = {"callback": self.callback.state_dict(), "weights": weights}
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.slow
@every_callback
def test_two_processes_end_with_the_same_state(name, tmp_path, two_processes):
    callback = SETTINGS[name](tmp_path)
    _fit(callback, epochs=2, callbacks=[_KeepState(callback, tmp_path)], **two_processes)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert _equal(first, second)


@every_callback
def test_a_dry_run_ends(name, tmp_path):
    _fit(SETTINGS[name](tmp_path), fast_dev_run=True)


@every_callback
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(name, precision, tmp_path):
    callback = SETTINGS[name](tmp_path)
    module, _ = _fit(callback, epochs=1, loaders=_loaders(val=MANY), precision=precision)
    assert (getattr(callback, "fine_tuned_on", 0) > 0) == bool(getattr(callback, "fine_tune", 0))
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


def test_the_table_names_every_callback():
    assert {type(make(".")).__name__ for make in SETTINGS.values()} == set(demem.callbacks.__all__)


@every_callback
@pytest.mark.parametrize("change", ["lacks", "unknown", "other kind"])
def test_a_state_of_another_version_is_refused_with_a_reason(name, change, tmp_path):
    callback = SETTINGS[name](tmp_path)
    state = callback.state_dict() | {"version": "9.9"}
    key = next(iter(state))
    if change == "lacks":
        del state[key]
    elif change == "unknown":
        key = "from_the_future"
        state[key] = 1
    else:
        state[key] = 7  # neither groups nor a history
    message = f"{type(callback).__name__} cannot read its state.*demem 9.9.*Resume with the version that wrote it"
    with pytest.raises(ValueError, match=message) as refused:
        callback.load_state_dict(state)
    assert change == "other kind" or repr(key) in str(refused.value)
    state = SETTINGS[name](tmp_path).state_dict()
    del state["version"]
    callback.load_state_dict(state)  # of a version that did not write it down


class _UnevenNet(Net):
    """The second process has nothing to validate on."""

    def __init__(self):
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def train_dataloader(self):
        return DataLoader(TRAIN, 32, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Subset(MANY, range(0 if self.trainer.global_rank else len(MANY))), 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["remover", "tracer"])
def test_a_process_without_validation_batches_is_refused_before_training(name, tmp_path, two_processes):
    start_method = two_processes["strategy"].removeprefix("ddp_")
    strategy = DDPStrategy(start_method=start_method, process_group_backend="gloo", timeout=timedelta(seconds=60))
    trainer = pl.Trainer(
        **two_processes | {"strategy": strategy},
        callbacks=[SETTINGS[name](tmp_path)],
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ProcessRaisedException, match=r"(Remover|Tracer): .*no (held-out )?examples"):
        trainer.fit(_UnevenNet())

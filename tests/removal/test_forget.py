"""Forgetting: a step with it is a step with the penalty in the loss, whatever runs the step."""

import pytest
import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from demem.removal.forget import Forgetting, FrozenProbe, Probe, at_random, most_informed
from demem.removal.information import attribute_information, group_moments
from demem.sites import find_sites
from demem.tracing.capture import Ranks


def _cnn():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ).double()  # fmt: skip


def _mlp():
    return nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2)).double()


def _vit():
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=2
    )
    return model.double()


class _Text(nn.Module):
    """Tokens first, as in torch's own transformers."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 2)

    def forward(self, x):  # (B, 5, 8)
        return self.head(self.encoder(x.transpose(0, 1)).mean(0))


IMAGES, ROWS, TOKENS = (16, 3, 8, 8), (16, 3), (16, 5, 8)
CASES = {
    "convolutions": (_cnn, IMAGES, ["0", "2"]),  # an in-place ReLU rewrites the first
    "norms and activations": (_cnn, IMAGES, ["1", "3", "4"]),
    "an input": (_cnn, IMAGES, ["2:input", "7:input"]),
    "linear units": (_mlp, ROWS, ["0", "2", "4:input"]),
    "blocks of tokens": (_vit, IMAGES, ["blocks.*", "blocks.*.mlp.act"]),
    "attention heads": (_vit, IMAGES, ["blocks.*.attn:heads"]),
    "tokens before examples": (lambda: _Text().double(), TOKENS, ["encoder.layers.0", "encoder.layers.0.linear1"]),
}


def _data(shape):
    y, attribute = torch.arange(shape[0]) % 2, torch.arange(shape[0]) // 2 % 2
    x = torch.randn(shape, dtype=torch.float64)
    x += (attribute + y / 2).view(-1, *[1] * (x.ndim - 1))
    return x, y, attribute


def _mean_activation(site, x):
    """Mean over space or tokens, written once more."""
    if not site.batch_first:
        return x.mean(0)
    if x.ndim == 4:
        return x.mean((2, 3))
    return x.mean(1) if x.ndim == 3 else x


def _warm_up(forgetting, model, data):
    """One step for the running sums, after which units are chosen."""
    x, y, attribute = data
    forgetting.observe(y, attribute)
    F.cross_entropy(model(x), y).backward()
    forgetting.step()
    model.zero_grad()


def _explicit_gradients(model, sites, forgetting, data, strength=3.0):
    """Gradients of the loss with the penalty added to it, by autograd."""
    x, y, attribute = data
    seen = {}

    def keep(site):
        def pre(module, args):
            seen[site.name] = args[0].clone()

        def post(module, args, output):
            seen[site.name] = output.clone()  # before an in-place ReLU

        if site.side == "input":
            return site.module.register_forward_pre_hook(pre)
        return site.module.register_forward_hook(post)

    handles = [keep(site) for site in sites]
    logits = model(x)
    for handle in handles:
        handle.remove()
    penalty = 0.0
    for site in sites:
        rows = _mean_activation(site, seen[site.name])
        information = attribute_information(
            group_moments(rows, y, attribute, 2, 2), forgetting._deviation[site.name].double()
        ).mean(0)
        units = forgetting.units[site.name]
        penalty = penalty + information.view(-1, site.channels_per_unit)[units].mean() / len(sites)
    model.zero_grad()
    (F.cross_entropy(logits, y) + strength * penalty).backward()
    return _gradients(model)


def _gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _same(a, b, **options):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], **options) for k in a)


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_one_with_the_penalty_in_the_loss(case):
    make, shape, patterns = CASES[case]
    model, data = make(), _data(shape)
    x, y, attribute = data
    sites = find_sites(model, patterns)
    with Forgetting(sites, 2, every=1) as forgetting:
        _warm_up(forgetting, model, data)
        assert {name: len(u) for name, u in forgetting.units.items()} == {
            s.name: max(1, round(0.2 * len(forgetting.scores[s.name]))) for s in sites
        }
        forgetting.every = 100  # the next step does not choose anew
        loss = F.cross_entropy(model(x), y)
        plain = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        model.zero_grad()
        forgetting.observe(y, attribute)
        F.cross_entropy(model(x), y).backward()
        done = _gradients(model)
        forgetting.step()
    expected = _explicit_gradients(model, sites, forgetting, data)
    assert _same(done, expected, atol=1e-9)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert not all(torch.allclose(g, expected[n]) for n, g in zip(names, plain, strict=True) if g is not None)


class _Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.stem, self.identity = nn.Linear(3, 10), nn.Identity()
        self.part = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Identity())
        self.head, self.reentrant = nn.Linear(8, 2), reentrant

    def forward(self, x):
        x = self.stem(x)
        if self.reentrant is None:
            return self.head(self.part(self.identity(x)))

        def inner(x):
            return self.part(self.identity(x))

        return self.head(checkpoint(inner, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("patterns", [["part.0"], ["part.0:input"], ["identity"], ["part.1", "part.2", "part", "stem"]])
def test_under_activation_checkpointing_the_penalty_is_added_once(patterns, reentrant):
    data = _data(ROWS)
    x, y, attribute = data
    results = []
    for how in (None, reentrant):
        torch.manual_seed(1)
        model = _Checkpointed(how).double()
        with Forgetting(find_sites(model, patterns), 2, every=1) as forgetting:
            _warm_up(forgetting, model, data)
            forgetting.observe(y, attribute)
            F.cross_entropy(model(x), y).backward()
            forgetting.step()
        counted = {name: float(m.counts.sum()) for name, m in forgetting._running.items()}
        results.append((_gradients(model), counted, forgetting.scores))
    assert _same(results[0][0], results[1][0], atol=1e-12)
    assert results[0][1] == results[1][1]
    assert set(results[0][1].values()) == {16 * 1.95}
    assert _same(results[0][2], results[1][2])


def _two_steps(model, data, strength=3.0, scale=1.0, loss_factor=1.0, parts=1):
    """Gradients of the second step, in which units are penalised; split into parts whose gradients add up."""
    x, y, attribute = data
    with Forgetting(find_sites(model, ["0", "2"]), 2, every=1, strength=strength) as forgetting:
        _warm_up(forgetting, model, data)
        forgetting.every = 100
        for part in torch.arange(len(y)).chunk(parts):
            forgetting.observe(y[part], attribute[part], scale=scale / parts)
            (F.cross_entropy(model(x[part]), y[part]) * loss_factor / parts).backward()
            forgetting.step()
    return _gradients(model)


def test_with_the_loss_scaled_the_penalty_is_scaled():
    model, data = _mlp(), _data(ROWS)
    expected = _two_steps(model, data)
    model.zero_grad()
    scaled = _two_steps(model, data, scale=1024.0, loss_factor=1024.0)
    assert _same(scaled, {n: 1024 * g for n, g in expected.items()})


def test_with_a_gradient_scaler_weights_become_what_they_become_without():
    data, results = _data(ROWS), []
    x, y, attribute = data
    for enabled in (True, False):
        torch.manual_seed(1)
        model = _mlp()
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=enabled)
        with Forgetting(find_sites(model, ["1", "3"]), 2, every=1) as forgetting:
            for _ in range(4):
                forgetting.observe(y, attribute, scale=scaler.get_scale())
                scaler.scale(F.cross_entropy(model(x), y)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                forgetting.step()
        results.append(dict(model.named_parameters()))
    assert _same(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_get_a_gradient_of_their_own_kind(dtype):
    model, (x, y, attribute) = _cnn().float(), _data(IMAGES)
    x = x.float()
    norms = []
    for strength in (0.0, 3.0):
        with Forgetting(find_sites(model, ["0", "2"]), 2, every=1, strength=strength) as forgetting:
            for _ in range(2):
                model.zero_grad()
                forgetting.observe(y, attribute, scale=256.0)
                with torch.autocast("cpu", dtype):
                    loss = F.cross_entropy(model(x), y)
                (256 * loss).backward()
                forgetting.step()
        norms.append(model[0].weight.grad.clone())
    assert bool(torch.isfinite(norms[1]).all())
    assert not torch.allclose(*norms, rtol=0.05)


def test_accumulated_gradients_are_the_mean_over_batches():
    model, data = _mlp(), _data(ROWS)
    x, y, attribute = data
    done = _two_steps(model, data, parts=2)
    expected = {n: torch.zeros_like(g) for n, g in done.items()}
    with Forgetting(find_sites(model, ["0", "2"]), 2, every=1) as forgetting:
        model.zero_grad()
        _warm_up(forgetting, model, data)
    for part in torch.arange(len(y)).chunk(2):
        half = x[part], y[part], attribute[part]
        for n, g in _explicit_gradients(model, find_sites(model, ["0", "2"]), forgetting, half).items():
            expected[n] += g / 2
    assert _same(done, expected, atol=1e-9)


def _work(rank, x, y, attribute):
    def total(value):
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    torch.manual_seed(1)
    model = _mlp()
    wrapped = nn.parallel.DistributedDataParallel(model)
    mine = slice(rank, None, 2)
    with Forgetting(find_sites(model, ["0", "2"]), 2, every=1, ranks=Ranks(total=total, rank=rank)) as forgetting:
        for _ in range(2):
            model.zero_grad()
            forgetting.observe(y[mine], attribute[mine])
            F.cross_entropy(wrapped(x[mine]), y[mine]).backward()
            units = forgetting.units
            forgetting.step()
    return {"gradients": _gradients(model), "units": units, "scores": forgetting.scores}


def test_two_processes_average_their_penalties_and_choose_the_same_units(in_two_processes):
    x, y, attribute = _data(ROWS)
    order = torch.randperm(16)
    x, y, attribute = x[order], y[order], attribute[order]
    first, second = in_two_processes(_work, x, y, attribute)
    assert _same(first["gradients"], second["gradients"])
    assert _same(first["scores"], second["scores"])
    assert _same(first["units"], second["units"])
    torch.manual_seed(1)
    model = _mlp()
    sites = find_sites(model, ["0", "2"])
    with Forgetting(sites, 2, every=1) as forgetting:  # one process with all rows chooses as the two do
        _warm_up(forgetting, model, (x, y, attribute))
    assert _same(forgetting.units, first["units"])
    halves = [_explicit_gradients(model, sites, forgetting, (x[r::2], y[r::2], attribute[r::2])) for r in range(2)]
    expected = {n: (halves[0][n] + halves[1][n]) / 2 for n in halves[0]}
    assert _same(first["gradients"], expected, atol=1e-6)  # s is kept in float32


def test_what_is_no_training_step_is_left_alone():
    model, data = _mlp(), _data(ROWS)
    x, y, attribute = data
    with Forgetting(find_sites(model, ["0", "2"]), 2, every=1) as forgetting:
        _warm_up(forgetting, model, data)
        counted = float(forgetting._running["0"].counts.sum())

        def gradients(rows=slice(None)):
            model.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            return _gradients(model)

        between = gradients()
        forgetting.observe(y, attribute)
        with torch.no_grad():
            model(x)
        fewer = gradients(slice(8))
        assert float(forgetting._running["0"].counts.sum()) == counted
        forgetting.step()
    assert _same(between, gradients())
    assert _same(fewer, gradients(slice(8)))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_second_backward_pass_through_the_same_activation_adds_nothing():
    model, data = _mlp(), _data(ROWS)
    x, y, attribute = data
    with Forgetting(find_sites(model, ["0", "2"]), 2, every=1) as forgetting:
        _warm_up(forgetting, model, data)
        forgetting.observe(y, attribute)
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        once = _gradients(model)
        model.zero_grad()
        loss.backward()
        again = _gradients(model)
        forgetting.step()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    assert _same(again, _gradients(model))
    assert not _same(once, again)


def test_the_units_that_know_most_are_chosen_every_few_steps_and_recorded():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(10))
    y, attribute = torch.arange(64) % 2, torch.arange(64) // 2 % 2
    x = torch.randn(64, 10, dtype=torch.float64)
    with Forgetting(find_sites(model, "0"), 2, every=2) as forgetting:
        for knowing in ([4, 7], [4, 7], [4, 7], [1, 7], [1, 7], [1, 7]):
            inputs = x.clone()
            inputs[:, knowing] += 9 * attribute[:, None]
            forgetting.observe(y, attribute)
            F.cross_entropy(model(inputs), y).backward()
            forgetting.step()
        record = forgetting.record()
    assert {u.unit: u.steps for u in record.units} == {4: 4, 7: 4}  # chosen after steps 2 and 4, not yet in step 6
    assert record.steps == 6
    assert record.sizes == {"0": 10}
    assert record.share == 0.2
    assert record.information > 0.5
    assert [u.score > 0.1 for u in record.units] == [True, True]
    assert repr(record).startswith("Forgotten(2 of 10 units in 6 steps")
    assert forgetting.record().steps == 0


def test_sites_without_a_gradient_are_named():
    model, (x, y, attribute) = _mlp(), _data(ROWS)
    with Forgetting(find_sites(model, ["0:input", "0"]), 2, every=2) as forgetting:
        for step in range(3):
            forgetting.observe(y, attribute)
            F.cross_entropy(model(x), y).backward()
            if step == 1:
                with pytest.warns(UserWarning, match="no effect at 0:input: no gradient"):
                    forgetting.step()
            else:
                forgetting.step()
    assert list(forgetting.units) == ["0"]


def test_a_view_that_is_overwritten_is_not_passed_over_in_silence():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(30, 2)).double()
    x, y, attribute = _data(TOKENS)  # torch makes the rows of a linear layer on tokens a view of a matrix
    with Forgetting(find_sites(model, "0"), 2, every=1) as forgetting:
        forgetting.observe(y, attribute)
        F.cross_entropy(model(x), y).backward()
        with pytest.warns(UserWarning, match="no effect at 0"):
            forgetting.step()


def test_with_one_choice_the_first_units_stay():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(10))
    y, attribute = torch.arange(64) % 2, torch.arange(64) // 2 % 2
    units = []
    with Forgetting(find_sites(model, "0"), 2, every=1, choices=1) as forgetting:
        for knowing in ([4, 7], [1, 2], [1, 2]):
            x = torch.randn(64, 10, dtype=torch.float64)
            x[:, knowing] += 9 * attribute[:, None]
            forgetting.observe(y, attribute)
            F.cross_entropy(model(x), y).backward()
            forgetting.step()
            units.append(forgetting.units["0"].tolist())
    assert units == [[4, 7]] * 3
    assert forgetting.scores["0"].argmax() in (1, 2)  # though others know more by now


def test_random_units_stay_the_same_and_other_seeds_give_others():
    scores = {"a": torch.zeros(50), "b": torch.zeros(20)}
    first, again, other = at_random(0.2, 1)(scores), at_random(0.2, 1)(scores), at_random(0.2, 2)(scores)
    assert _same(first, again)
    assert [len(u) for u in first.values()] == [10, 4]
    assert not torch.equal(first["a"], other["a"])
    assert len(most_informed(1.0)(scores)["a"]) == 50


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped():
    data = _data(ROWS)
    x, y, attribute = data

    def steps(model, forgetting, count):
        with forgetting:
            for _ in range(count):
                model.zero_grad()
                forgetting.observe(y, attribute)
                F.cross_entropy(model(x), y).backward()
                forgetting.step()
                with torch.no_grad():
                    for p in model.parameters():
                        p -= 0.1 * p.grad

    torch.manual_seed(1)
    whole = _mlp()
    straight = Forgetting(find_sites(whole, ["0", "2"]), 2, every=2)
    steps(whole, straight, 7)
    torch.manual_seed(1)
    parts = _mlp()
    before = Forgetting(find_sites(parts, ["0", "2"]), 2, every=2)
    steps(parts, before, 3)
    after = Forgetting(find_sites(parts, ["0", "2"]), 2, every=2)
    after.load_state_dict(before.state_dict())
    steps(parts, after, 4)
    assert _same(dict(whole.named_parameters()), dict(parts.named_parameters()))
    assert _same(straight.scores, after.scores)
    with pytest.raises(ValueError, match="which this Forgetting does not watch"):
        Forgetting(find_sites(parts, "0"), 2).load_state_dict(before.state_dict())


def test_a_probe_of_the_same_forward_pass_gives_what_the_attributes_give():
    data, results = _data(ROWS), []
    x, y, _ = data

    def read(rows):
        return (rows[:, 0] > 0.5).long()

    for probed in (False, True):
        torch.manual_seed(1)
        model = _mlp()
        probe = Probe(find_sites(model, "0:input")[0], read) if probed else None
        with Forgetting(find_sites(model, ["0", "2"]), 2, every=1, probe=probe) as forgetting:
            for _ in range(2):
                model.zero_grad()
                forgetting.observe(y, None if probed else read(x))
                F.cross_entropy(model(x), y).backward()
                forgetting.step()
        results.append(_gradients(model))
    assert _same(*results)


def test_a_frozen_probe_reads_the_layer_as_it_was_and_runs_no_further():
    ran = []

    class Last(nn.Linear):
        def forward(self, x):
            ran.append(len(x))
            return super().forward(x)

    model = nn.Sequential(nn.Linear(3, 10), nn.Dropout(0.5), nn.BatchNorm1d(10), Last(10, 2)).double().train()
    x, _, _ = _data(ROWS)
    probe = FrozenProbe(model, find_sites(model, "2")[0], lambda rows: rows.argmax(1))
    expected = model.eval()[:3](x).float().argmax(1)
    model.train()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    assert torch.equal(probe(x), expected)
    assert ran == []
    assert model[1].training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_frozen_probe_of_a_layer_that_does_not_run_is_refused():
    class Spare(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.spare = nn.Linear(3, 2)

    model = Spare()
    with pytest.raises(RuntimeError, match="'spare' did not run"):
        FrozenProbe(model, find_sites(model, "spare")[0], len)(torch.randn(4, 3))


def test_a_class_with_one_attribute_does_not_dilute_the_scores():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x, y, attribute = _data(ROWS)
    attribute[y == 1] = 1
    with Forgetting(find_sites(model, "0"), 2, every=1) as forgetting:
        _warm_up(forgetting, model, (x, y, attribute))
    expected = attribute_information(group_moments(model[0](x), y, attribute, 2, 2))[0]
    assert torch.allclose(forgetting.scores["0"].double(), expected, rtol=1e-4)


class _Thin(Callback):
    """How a callback uses it."""

    def __init__(self):
        self.records = []

    def on_train_start(self, trainer, pl_module):
        self.forgetting = Forgetting(find_sites(pl_module, ["net.0", "net.2"]), 2, every=1).__enter__()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.forgetting.observe(batch[1], batch[2], scale=1 / trainer.accumulate_grad_batches)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.forgetting.step()

    def on_train_epoch_end(self, trainer, pl_module):
        self.records.append(self.forgetting.record())

    def on_train_end(self, trainer, pl_module):
        self.forgetting.__exit__()


class _Module(pl.LightningModule):
    def __init__(self, manual):
        super().__init__()
        self.net, self.automatic_optimization = _mlp().float(), not manual

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"manual": True}])
def test_in_a_trainer_no_training_step_has_to_change(options, tmp_path):
    x, y, attribute = _data((64, 3))
    loader = DataLoader(TensorDataset(x.float(), y, attribute), 16)
    informed = []
    for callback in (None, _Thin()):
        torch.manual_seed(1)
        module = _Module(options.get("manual", False))
        trainer = pl.Trainer(
            max_epochs=8, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback] if callback else [],
            **{k: v for k, v in options.items() if k != "manual"},
        )  # fmt: skip
        trainer.fit(module, loader)
        with torch.no_grad():
            rows = module.net[:3](x.float())
        informed.append(float(attribute_information(group_moments(rows, y, attribute, 2, 2)).amax(1).mean()))
    assert len(callback.records) == 8
    assert callback.records[-1].steps == 4
    assert informed[1] < informed[0]


@pytest.mark.parametrize(
    "change", [{"num_classes": 0}, {"num_attributes": 1}, {"every": 0}, {"decay": 1.0}, {"floor": 0.0}]
)
def test_arguments_out_of_range_are_refused(change):
    options = {"num_classes": 2, **change}
    with pytest.raises(ValueError, match="must be"):
        Forgetting(find_sites(_mlp(), "0"), **options)


def test_batches_that_cannot_be_used_are_refused():
    model, (x, y, attribute) = _mlp(), _data(ROWS)
    with pytest.raises(ValueError, match="at least one site, each once"):
        Forgetting([], 2)
    with Forgetting(find_sites(model, "0"), 2) as forgetting:
        with pytest.raises(ValueError, match="give Forgetting a probe"):
            forgetting.observe(y)
        with pytest.raises(ValueError, match="of the same shape"):
            forgetting.observe(y, attribute[:3])
    shared = nn.ReLU()
    mixed = nn.Sequential(nn.Linear(3, 4), shared, nn.Linear(4, 5), shared, nn.Linear(5, 2)).double()
    with Forgetting(find_sites(mixed, "1"), 2) as forgetting:
        forgetting.observe(y, attribute)
        with pytest.raises(ValueError, match="'1' gave 4 channels after 5"):
            F.cross_entropy(mixed(x), y).backward()
    elsewhere = nn.Linear(1, 1)
    probe = Probe(find_sites(nn.Sequential(elsewhere), "0")[0], lambda rows: rows[:, 0].long())
    with Forgetting(find_sites(model, "0"), 2, probe=probe) as forgetting:
        forgetting.observe(y)
        with pytest.raises(RuntimeError, match="gave no row per label"):
            F.cross_entropy(model(x), y).backward()

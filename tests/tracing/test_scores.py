"""Every fast score against a slow, obvious one."""

import weakref
from typing import NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from demem.batch import Batch
from demem.sites import find_sites
from demem.tracing import (
    SCORES,
    Ranks,
    ablation_impact,
    activation_difference_score,
    critical_units,
    gradient_score,
    head_impact,
    impact_score,
    linear_impact,
    magnitude_score,
    margins,
    matched_units,
    median_difference,
    prunable_weights,
    random_units,
    read_features,
    score_units,
    select_rows,
    taylor_impact,
    top_units,
    top_weights,
    two_step_score,
    unit_norms,
    unit_of_weight,
    units_to_masks,
)
from demem.tracing.restart import Restart
from demem.tracing.winograd import Conv3x3


class SharedRelu(nn.Module):
    """Residual sums, in-place activations, a layer called twice and one that is not a module."""

    def __init__(self, shared: bool = False, tuple_out: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 3)
        self.shared, self.tuple_out = shared, tuple_out

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        if self.shared:
            y = self.bn2(self.conv2(y))
        y += x
        out = self.fc(torch.flatten(self.pool(self.relu(y)), 1))
        return (out, y) if self.tuple_out else out


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.conv(x), inplace=True)
        x = x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))
        x = F.silu(self.dw(x))
        return self.head(x.mean([2, 3]))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        if x.sum() > 1e9:  # fx cannot follow a condition on values
            x = x * 0
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


class Body(nn.Module):
    """A few layers, put together by a function."""

    def __init__(self, body) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.batch = nn.ReLU(inplace=True), nn.BatchNorm2d(8, track_running_stats=False)
        self.att = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 3)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def _rewritten_skip(net, x):
    x = net.conv1(x)
    return net.fc((net.conv2(net.relu(x)) + x).mean((2, 3)))


def _statement(net, x):
    x = net.conv1(x)
    z = net.conv2(x)
    z.add_(x)
    return net.fc(z.relu().mean((2, 3)))


def _function_in_place(net, x):
    return net.fc(net.conv2(torch.sigmoid_(net.conv1(x))).mean((2, 3)))


def _frames(net, x):
    frames = torch.stack([x, x.flip(-1)], 1).flatten(0, 1)
    return net.fc(net.conv1(frames).relu().mean((2, 3))).view(-1, 2, 3).mean(1)


def _flips(net, x):
    one, other = net.fc(net.conv1(torch.cat([x, x.flip(-1)])).relu().mean((2, 3))).chunk(2)
    return one + 2 * other


def _keepdim_by_position(net, x):
    x = net.conv1(x).relu()
    return net.fc((x * net.conv2(x.mean((2, 3), True)).sigmoid()).mean((2, 3)))


def _attention(net, x):
    x = net.conv1(x).flatten(2).transpose(1, 2)
    return net.fc((x + net.att(x, x, x)[0]).mean(1))


def _batch_statistics(net, x):
    return net.fc(net.batch(net.conv1(x)).relu().mean((2, 3)))


def _unused(net, x):
    x = net.conv1(x)
    net.conv2(x)
    return net.fc(x.relu().mean((2, 3)))


def _other_branch_for_proxies(net, x):
    x = net.conv1(x)
    return net.fc((x.relu() if isinstance(x, torch.Tensor) else x).mean((2, 3)))


def _resnet():
    return torchvision.models.resnet18(num_classes=3)


def _mobilenet():
    return timm.create_model("mobilenetv2_035", num_classes=3)


def _vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=3)


CASES = {
    "residual": (SharedRelu, ["conv1", "bn1", "conv2", "fc:input", "fc"], 8),
    "shared": (lambda: SharedRelu(shared=True), ["conv1", "conv2"], 8),
    "tuple": (lambda: SharedRelu(tuple_out=True), ["conv1", "conv2"], 8),
    "squeeze": (SqueezeExcite, ["conv", "fc1", "dw", "dw:input", "head:input"], 8),
    "untraceable": (Untraceable, ["conv", "fc:input"], 8),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 12, 3, groups=3), nn.Flatten(), nn.Linear(192, 3)
        ),
        ["0", "2", "2:input"],
        8,
    ),
    "block": (lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Linear(5, 3)), ["0", "0.0"], None),
    "tokens": (_vit, ["blocks.0.mlp.fc1", "blocks.1.attn:heads", "blocks.0", "head:input"], 32),
    "resnet": (_resnet, ["conv1", "layer1.0.conv2", "layer3.0.downsample.0", "layer4.0.conv1", "layer4.1.conv2"], 64),
    "mobilenet": (_mobilenet, ["conv_stem", "blocks.1.0.conv_dw", "blocks.4.0.conv_pwl", "conv_head"], 32),
    "rewritten skip": (lambda: Body(_rewritten_skip), ["conv1", "conv2"], 8),
    "statement": (lambda: Body(_statement), ["conv1", "conv2"], 8),
    "function in place": (lambda: Body(_function_in_place), ["conv1", "conv2"], 8),
    "frames": (lambda: Body(_frames), ["conv1"], 8),
    "flips": (lambda: Body(_flips), ["conv1"], 8),
    "keepdim by position": (lambda: Body(_keepdim_by_position), ["conv1", "conv2"], 8),
    "attention": (lambda: Body(_attention), ["conv1", "att"], 8),
    "batch statistics": (lambda: Body(_batch_statistics), ["conv1"], 8),
    "unused": (lambda: Body(_unused), ["conv1", "conv2"], 8),
    "other branch": (lambda: Body(_other_branch_for_proxies), ["conv1"], 8),
}


def _case(name, count=6, batches=2):
    make, patterns, size = CASES[name]
    model = make()
    shape = (3, size, size) if size else (6,)
    data = [Batch(torch.randn(count, *shape), torch.randint(0, 3, (count,))) for _ in range(batches)]
    for module in model.modules():  # statistics that are not 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    model.train()
    with torch.no_grad():
        model(torch.randn(16, *shape))
    return model, find_sites(model, patterns), data


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ablate", ["zero", "mean"])
def test_fast_ablation_equals_the_plain_loop(name, ablate):
    model, sites, data = _case(name)
    widths = {s.name: s.num_units or 5 for s in sites}
    if name == "tokens":
        widths["blocks.0"] = 24
    units = {n: torch.randperm(w)[:3] for n, w in widths.items()}
    flags = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fast = ablation_impact(model, sites, data, units=units, ablate=ablate, max_rows=13)
    slow = ablation_impact(model, sites, data, units=units, ablate=ablate, fast=False)
    for n in fast:
        assert fast[n].shape == (12, len(units[n]))
        torch.testing.assert_close(fast[n], slow[n], rtol=1e-4, atol=1e-5)
    assert max(float(v.abs().max()) for v in slow.values()) > 1e-4  # the comparison is not of zeros
    assert flags == [m.training for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["residual", "shared", "tuple", "squeeze", "grouped", "mobilenet"])
def test_ordinary_models_are_restarted(name):
    model, _, data = _case(name)
    model.eval()
    first = next(s for s in find_sites(model, "**") if isinstance(s.module, nn.Conv2d))
    with torch.no_grad():
        Restart(model, [first], data[0].x)


def test_activations_are_dropped_when_a_block_is_done():
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(4)]
    model = nn.Sequential(nn.Linear(6, 6), *blocks, nn.Linear(6, 2))
    seen, alive = [], []

    def count(module, args, output):
        alive.append(sum(ref() is not None for ref in seen))
        if len(output) == 7:
            seen.append(weakref.ref(output))

    model[0].register_forward_hook(count)
    data = [Batch(torch.randn(7, 6), torch.randint(0, 2, (7,))) for _ in range(2)]
    units = {str(i): torch.tensor([0]) for i in range(1, 5)}
    ablation_impact(model, find_sites(model, list(units)), data, units=units)
    assert len(seen) == 10  # once more for the widths
    assert max(alive) == 0


def test_no_units_of_a_site():
    model, sites, data = _case("residual")
    none = {s.name: torch.tensor([], dtype=torch.long) for s in sites[:2]}
    for fast in (True, False):
        impact = ablation_impact(model, sites, data, units=none, fast=fast)
        assert {n: v.shape for n, v in impact.items()} == {n: (12, 0) for n in none}


@pytest.mark.parametrize("effect", ["loss", "margin", "accuracy"])
def test_plain_loop_is_what_it_says(effect):
    model, _, data = _case("residual")
    model.eval()
    site = find_sites(model, "conv1")
    impact = ablation_impact(model, site, data[:1], effect=effect)["conv1"]
    x, y = data[0].x, data[0].y
    with torch.no_grad():
        before = model(x)
        for unit in (0, 5):
            saved = model.conv1.weight[unit].clone()
            model.conv1.weight[unit] = 0  # without a bias this zeroes the channel
            after = model(x)
            model.conv1.weight[unit] = saved
            expected = {
                "loss": F.cross_entropy(after, y, reduction="none") - F.cross_entropy(before, y, reduction="none"),
                "margin": margins(before, y) - margins(after, y),
                "accuracy": (before.argmax(1) == y).float() - (after.argmax(1) == y).float(),
            }[effect]
            torch.testing.assert_close(impact[:, unit], expected, rtol=1e-4, atol=1e-6)


def test_dead_units_have_exactly_no_effect():
    model, _, data = _case("residual")
    with torch.no_grad():
        model.bn1.weight[2], model.bn1.bias[2] = 0.0, -1.0
    impact = ablation_impact(model, find_sites(model, "conv1"), data)["conv1"]
    assert bool((impact[:, 2] == 0).all())
    assert bool((impact[:, 3] != 0).any())


@pytest.mark.parametrize("size", [2, 4])
def test_winograd_equals_convolution(size):
    conv = nn.Conv2d(64, 70, 3, padding=1)
    x = torch.randn(3, 64, size, size)
    assert Conv3x3.pays(conv, x)
    torch.testing.assert_close(Conv3x3(conv)(x), conv(x), rtol=1e-4, atol=1e-4)
    assert not Conv3x3.pays(nn.Conv2d(64, 64, 3, padding=1, stride=2), x)
    assert not Conv3x3.pays(conv, x.double())
    assert not Conv3x3.pays(conv, torch.randn(3, 64, 8, 8))


@pytest.mark.parametrize("name", ["residual", "shared", "squeeze", "untraceable", "tokens", "block", "mobilenet"])
@pytest.mark.parametrize("ablate", ["zero", "mean"])
def test_taylor_is_the_derivative_of_ablation(name, ablate):
    """Against a finite difference: move each unit a small step towards its ablated value."""
    model, sites, data = _case(name, count=4)
    model.eval()
    impact = taylor_impact(model, sites, data, ablate=ablate)
    x, y = torch.cat([b.x for b in data]), torch.cat([b.y for b in data])
    model, x = model.double(), x.double()
    step = 1e-5
    for site in sites:
        k = site.channels_per_unit
        means = {}

        def note(value, site=site, means=means):
            axis = site.unit_axis(value) % value.ndim
            means.setdefault("sum", []).append(value.detach().movedim(axis, -1).reshape(-1, value.shape[axis]))

        def shifted(sign, unit, site=site, k=k, means=means):
            def edit(value):
                value = (value[0] if isinstance(value, tuple) else value).clone()
                axis = site.unit_axis(value)
                part = value.narrow(axis, unit * k, k)
                target = 0.0
                if ablate == "mean":
                    centre = torch.cat(means["sum"]).mean(0)[unit * k : unit * k + k]
                    target = centre.view(-1, *[1] * (-1 - axis))
                part += sign * step * (target - part)
                return value

            if site.side == "output":
                handle = site.module.register_forward_hook(lambda m, a, out: edit(out))
            else:
                handle = site.module.register_forward_pre_hook(lambda m, a: (edit(a),))
            with torch.no_grad():
                loss = F.cross_entropy(model(x), y, reduction="none")
            handle.remove()
            return loss

        handle = (
            site.module.register_forward_hook(lambda m, a, out: note(out))
            if site.side == "output"
            else site.module.register_forward_pre_hook(lambda m, a: note(a[0]))
        )
        with torch.no_grad():
            model(x)
        handle.remove()
        for unit in (0, impact[site.name].shape[1] - 1):
            expected = (shifted(1, unit) - shifted(-1, unit)) / (2 * step)
            torch.testing.assert_close(impact[site.name][:, unit].double(), expected, rtol=2e-3, atol=2e-5)


def test_taylor_keeps_gradients_flags_and_weights():
    model, sites, data = _case("residual")
    model.conv2.weight.requires_grad_(False)
    model(data[0].x).sum().backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    with torch.no_grad():  # as inside a Trainer's validation
        taylor_impact(model, sites, data)
    for n, p in model.named_parameters():
        assert p.requires_grad == (n != "conv2.weight")
        assert (p.grad is None) == (grads[n] is None)
        assert p.grad is None or torch.equal(p.grad, grads[n])


def test_taylor_under_no_grad_is_refused():
    class Frozen(nn.Sequential):
        def forward(self, x):
            with torch.no_grad():
                x = self[1](self[0](x))
            return self[2](x)

    model = Frozen(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    data = [Batch(torch.randn(4, 6), torch.randint(0, 3, (4,)))]
    for name in ("0", "1:input"):
        with pytest.raises(ValueError, match=rf"'{name}' runs under torch\.no_grad\(\)"):
            taylor_impact(model, find_sites(model, name), data)
    assert taylor_impact(model, find_sites(model, "2:input"), data)["2:input"].shape == (4, 5)


def test_bfloat16_and_channels_last_and_compiled():
    model, sites, data = _case("residual")
    model.eval()
    expected = {f.__name__: f(model, sites, data) for f in (taylor_impact, ablation_impact)}
    last = model.to(memory_format=torch.channels_last)
    moved = [Batch(b.x.contiguous(memory_format=torch.channels_last), b.y) for b in data]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(data[0].x)
    for f in (taylor_impact, ablation_impact):
        for got in (f(last, sites, moved), f(compiled, find_sites(compiled, [s.name for s in sites]), data)):
            for n in got:
                torch.testing.assert_close(got[n], expected[f.__name__][n], rtol=1e-3, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            low = f(model, sites, data)
        for n in low:
            scale = float(expected[f.__name__][n].abs().max())
            assert float((low[n] - expected[f.__name__][n]).abs().max()) < 0.1 * scale + 0.02


def test_results_do_not_depend_on_the_batch_size():
    model, sites, data = _case("residual")
    whole = [Batch(torch.cat([b.x for b in data]), torch.cat([b.y for b in data]))]
    atypical = torch.arange(12) % 3 == 0
    for name, options in (("taylor", {"ablate": "mean"}), ("two_step", {}), ("gradient", {"worst": 3}),
                          ("activation_difference", {}), ("ablation", {"ablate": "mean"})):  # fmt: skip
        few = SCORES[name](model, sites, data, atypical=atypical, **options)
        one = SCORES[name](model, sites, whole, atypical=atypical, **options)
        for n in few:
            torch.testing.assert_close(few[n], one[n], rtol=1e-4, atol=1e-6)


def test_magnitude_and_unit_of_weight():
    conv, transposed = nn.Conv2d(6, 8, 3, groups=2), nn.ConvTranspose2d(6, 8, 3, groups=2)
    model = nn.Sequential(conv, transposed, nn.Linear(4, 5), nn.BatchNorm2d(8))
    norms = magnitude_score(model, find_sites(model, ["0", "2", "2:input", "3"]))
    torch.testing.assert_close(norms["0"], conv.weight.flatten(1).norm(dim=1))
    torch.testing.assert_close(norms["2"], model[2].weight.norm(dim=1))
    torch.testing.assert_close(norms["2:input"], model[2].weight.norm(dim=0))
    torch.testing.assert_close(norms["3"], model[3].weight.abs())
    # By effect: zeroing the elements of a unit silences exactly that output, or what reads that input.
    for module, side, x in (
        (conv, "output", torch.randn(2, 6, 5, 5)),
        (conv, "input", torch.randn(2, 6, 5, 5)),
        (transposed, "output", torch.randn(2, 6, 5, 5)),
        (transposed, "input", torch.randn(2, 6, 5, 5)),
    ):
        net = nn.Sequential(module)
        site = find_sites(net, "0:input" if side == "input" else "0")[0]
        owner = unit_of_weight(site)
        for unit in (0, site.num_units - 1):
            saved = module.weight.detach().clone()
            y = x.clone()
            if side == "input":
                y[:, unit] = 0
            with torch.no_grad():
                expected = module(y)
                if side == "output":
                    expected[:, unit] = module.bias[unit]
                module.weight[owner == unit] = 0
                torch.testing.assert_close(module(x), expected)
                module.weight.copy_(saved)
    with pytest.raises(ValueError, match="no weight of its own"):
        unit_norms(find_sites(nn.Sequential(nn.Sequential(nn.Linear(2, 2))), "0")[0], torch.ones(2))


def test_gradient_score_on_the_worst_examples():
    model, _, data = _case("residual")
    sites = find_sites(model, ["conv1", "fc"])
    model.eval()
    x, y = torch.cat([b.x for b in data]), torch.cat([b.y for b in data])
    atypical = torch.arange(12) % 2 == 0
    probability = model(x).softmax(1).gather(1, y[:, None])[:, 0].detach()
    worst = probability.masked_fill(~atypical, 9).argsort()[:4]
    model.zero_grad()
    F.cross_entropy(model(x[worst]), y[worst]).backward()
    scores = gradient_score(model, sites, data, atypical=atypical, worst=4)
    torch.testing.assert_close(scores["conv1"], model.conv1.weight.grad.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores["fc"], model.fc.weight.grad.norm(dim=1), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="No atypical"):
        gradient_score(model, sites, data, atypical=torch.zeros(12, dtype=torch.bool))


def test_gradient_score_takes_no_more_than_asked_for():
    model = nn.Sequential(nn.Linear(4, 3))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)  # every example is fitted alike
    x, y = torch.randn(12, 4), torch.randint(0, 3, (12,))
    site = find_sites(model, "0")
    expected = gradient_score(model, site, [Batch(x[:4], y[:4])], worst=None)["0"]
    torch.testing.assert_close(gradient_score(model, site, [Batch(x, y)], worst=4)["0"], expected)
    # Another process has twelve such examples, which come first.
    ranks = Ranks(gather=lambda rows: torch.cat([rows if rows.is_floating_point() else 0 * rows, rows]), rank=1)
    torch.testing.assert_close(gradient_score(model, site, [Batch(x, y)], worst=16, ranks=ranks)["0"], expected)


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_computed_weight_is_refused(norm):
    model = nn.Sequential(norm(nn.Linear(4, 3)))
    site, data = find_sites(model, "0"), [Batch(torch.randn(5, 4), torch.randint(0, 3, (5,)))]
    for use in (lambda: unit_of_weight(site[0]), lambda: gradient_score(model, site, data)):
        with pytest.raises(ValueError, match=r"torch\.nn\.utils\.parametrize\.remove_parametrizations"):
            use()


def test_activation_difference():
    features = torch.tensor([[0.0, 5], [1, 5], [9, 5], [4, 0], [2, 1], [3, 7]])
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    wrong = torch.tensor([False, False, True, True, False, False])
    # class 0: 9 − 0.5 and 5 − 5; class 1: 4 − 2.5 and 0 − 4
    torch.testing.assert_close(median_difference(features, y, wrong), torch.tensor([8.5, 0.0]))
    model, sites, data = _case("residual", count=30)
    rows, _, labels = read_features(model, sites, data)
    wrong = torch.arange(60) % 4 == 0
    got = activation_difference_score(model, sites, data, atypical=wrong)
    torch.testing.assert_close(got["conv1"], median_difference(rows["conv1"], labels, wrong))
    with pytest.raises(ValueError, match="both wrong and right"):
        median_difference(features, y, torch.ones(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="'relu' has 24 rows for 12 examples"):
        activation_difference_score(model, find_sites(model, "relu"), [Batch(b.x[:6], b.y[:6]) for b in data])


def test_linear_score_is_exact_ablation_of_the_margin():
    model, _, data = _case("residual")
    model.fc = nn.Linear(8, 2)
    data = [Batch(b.x, b.y % 2) for b in data]
    site = find_sites(model, "fc:input")
    for ablate in ("zero", "mean"):
        linear = head_impact(model, site, data, ablate=ablate)["fc:input"]
        exact = ablation_impact(model, site, data, ablate=ablate, effect="margin")["fc:input"]
        torch.testing.assert_close(linear, exact, rtol=1e-4, atol=1e-5)
    # With more classes the comparison is with the class that was the strongest wrong one.
    features, weight = torch.randn(5, 4), torch.randn(3, 4)
    y, logits = torch.tensor([0, 1, 2, 0, 1]), features @ weight.T
    impact = linear_impact(features, weight, y, logits=logits, centre="zero")
    torch.testing.assert_close(impact.sum(1), margins(logits, y))
    with pytest.raises(ValueError, match="three classes"):
        linear_impact(features, weight, y)
    with pytest.raises(ValueError, match="does not feed"):
        head_impact(model, find_sites(model, "conv1"), data)


def test_two_step_is_exact_at_the_top():
    model, _, data = _case("residual")
    sites = find_sites(model, ["conv1", "conv2"])
    atypical = torch.arange(12) < 7
    y = torch.cat([b.y for b in data])
    exact = impact_score(ablation_impact(model, sites, data), y, atypical)
    both = two_step_score(model, sites, data, atypical=atypical, shortlist=5)
    shortlist = top_units(impact_score(taylor_impact(model, sites, data), y, atypical), 5)
    for n, units in shortlist.items():
        torch.testing.assert_close(both[n][units], exact[n][units], rtol=1e-4, atol=1e-6)
    top = top_units(both, 5)
    assert {(n, int(u)) for n in top for u in top[n]} == {(n, int(u)) for n in shortlist for u in shortlist[n]}
    helps = SCORES["taylor"](model, sites, data, atypical=atypical, direction="helps")
    hurts = score_units("taylor", model, sites, data, atypical=atypical)
    torch.testing.assert_close(helps["conv1"], -hurts["conv1"])


def test_top_units_and_controls():
    scores = {"a": torch.tensor([1.0, 5, 3]), "b": torch.tensor([4.0, 5])}
    assert {k: v.tolist() for k, v in top_units(scores, 3).items()} == {"a": [1], "b": [1, 0]}
    assert {k: v.tolist() for k, v in top_units(scores, 1, within=True).items()} == {"a": [1], "b": [1]}
    assert {k: v.tolist() for k, v in top_units(scores, 0.4).items()} == {"a": [1], "b": [1]}
    assert sum(len(v) for v in random_units(scores, 4).values()) == 4
    matched = matched_units({"a": torch.tensor([1])}, {"a": torch.tensor([1.0, 5, 4])})
    assert matched["a"].tolist() == [2]
    assert units_to_masks({"a": torch.tensor([2])}, {"a": 3, "b": 2})["a"].tolist() == [False, False, True]
    for bad in (0, -1, 1.5, 9, True):
        with pytest.raises(ValueError, match="k"):
            top_units(scores, bad)
    with pytest.raises(ValueError, match="NaN"):
        top_units({"a": torch.tensor([float("nan")])}, 1)
    with pytest.raises(ValueError, match="none are left"):
        matched_units({"b": torch.tensor([0, 1])}, {"b": torch.ones(2)})


def test_single_weights():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    weights = prunable_weights(model, head=model[2])
    assert list(weights) == ["0.weight"]
    masks = top_weights({n: w.abs() for n, w in weights.items()}, 0.25, "smallest")
    mask = masks["0.weight"]
    assert int(mask.sum()) == 3
    assert float(model[0].weight[mask].abs().max().detach()) <= float(model[0].weight[~mask].abs().min().detach())
    with pytest.raises(ValueError, match="fraction"):
        top_weights({}, 0.5)


def test_unknown_names_and_empty_input():
    model, sites, data = _case("residual")
    with pytest.raises(ValueError, match="Unknown score"):
        score_units("magic", model, sites, data)
    with pytest.raises(ValueError, match="no examples"):
        taylor_impact(model, sites, [])
    with pytest.raises(ValueError, match="Unknown effect"):
        ablation_impact(model, sites, data, effect="magic")
    with pytest.raises(ValueError, match="mask"):
        score_units("taylor", model, sites, data, atypical=torch.ones(3, dtype=torch.bool))
    bad = [Batch(torch.full_like(data[0].x, float("nan")), data[0].y)]
    with pytest.raises(ValueError, match="NaN"):
        taylor_impact(model, sites, bad)


class _Encoder(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
        self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc, self.batch_first = nn.Linear(8, 2), batch_first

    def forward(self, x):
        return self.fc(self.enc(x).mean(1) if self.batch_first else self.enc(x.transpose(0, 1)).mean(0))


def test_examples_are_told_apart_where_the_sequence_is_first():
    one, other = _Encoder(True).eval(), _Encoder(False).eval()
    other.load_state_dict(one.state_dict())
    batch = Batch(torch.randn(5, 5, 8), torch.tensor([0, 1, 0, 1, 1]))  # as many examples as positions
    for impact in (taylor_impact, ablation_impact):
        seen = [impact(m, find_sites(m, "enc.layers.0.linear1"), [batch]) for m in (one, other)]
        for name, values in seen[0].items():
            assert torch.allclose(values, seen[1][name], atol=1e-6)
    found = [critical_units(m, find_sites(m, "enc.layers.0.linear1"), batch, cap=4) for m in (one, other)]
    assert torch.equal(found[0].units, found[1].units)


class _Bag(nn.Module):
    """Reads all tokens of a batch in one row, with the places where its examples begin."""

    def __init__(self):
        super().__init__()
        self.bag, self.hidden, self.head = nn.EmbeddingBag(12, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, text, offsets):
        return self.head(torch.relu(self.hidden(self.bag(text, offsets))))


def _bags(examples):
    texts, y = zip(*examples, strict=True)
    offsets = torch.tensor([0, *map(len, texts)][:-1]).cumsum(0)
    return Batch({"text": torch.cat(texts), "offsets": offsets}, torch.tensor(y))


def test_inputs_that_cannot_be_taken_apart_are_run_whole():
    torch.manual_seed(0)
    examples = [(torch.randint(0, 12, (i % 4 + 1,)), i % 2) for i in range(20)]
    model, chosen = _Bag(), torch.arange(20) % 5 < 2
    sites = find_sites(model, "head:input")
    whole = two_step_score(model, sites, [_bags(examples[:10]), _bags(examples[10:])], atypical=chosen, shortlist=4)
    alone = two_step_score(model, sites, [_bags([e for e, c in zip(examples, chosen, strict=True) if c])], shortlist=4)
    assert torch.allclose(whole["head:input"], alone["head:input"], atol=1e-6)


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


def test_rows_of_inputs_of_many_forms():
    y, index = torch.arange(4) % 2, torch.tensor([2, 0])
    packed = pack_sequence([torch.full((n, 1), float(n)) for n in (2, 4, 1, 3)], enforce_sorted=False)
    chosen = select_rows(Batch((Pair(torch.arange(4), torch.zeros(3, 4, 2)), packed, torch.tensor(7.0)), y), index)
    pair, repacked, scalar = chosen.x
    assert pair.a.tolist() == [2, 0]
    assert pair.b.shape == (3, 2, 2)
    assert pad_packed_sequence(repacked)[1].tolist() == [1, 2]
    assert scalar == 7
    for other in (torch.zeros(9), object()):
        assert select_rows(Batch(other, y), torch.arange(4)).x is other
        with pytest.raises(ValueError, match="cannot be taken out of"):
            select_rows(Batch(other, y), index)

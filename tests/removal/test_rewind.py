"""Rewinding: the score is the path integral of its definition, and what is done is undone bit for bit."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from demem.batch import Batch
from demem.removal.rewind import Harm, balanced_losses, following_norms, harm_scores, rewind, rewindable_sites
from demem.sites import find_sites


def _cnn():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3, groups=2),
        nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.ReLU(),
        nn.BatchNorm1d(5), nn.Linear(5, 2),
    ).double()  # fmt: skip


def _state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _trained():
    """A model, its state before, and a loss; every weight, and the running statistics, have changed."""
    model = _cnn()
    before = _state(model)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value += 0.3 * torch.rand_like(value)
    return model, before, balanced_losses([Batch(torch.randn(12, 3, 8, 8).double(), torch.arange(12) % 2)])


PARTS = {  # parameters of each unit
    "0": ["0.weight", "1.weight", "1.bias"],
    "3": ["3.weight", "3.bias", "4.weight", "4.bias"],
    "8": ["8.weight", "8.bias"],  # no norm reads it directly
}


def test_the_score_is_the_mean_over_two_points_of_gradient_times_change():
    model, before, losses = _trained()
    after = _state(model)
    expected = {name: torch.zeros(len(after[f"{name}.weight"]), dtype=torch.double) for name in PARTS}
    moving = {key for keys in PARTS.values() for key in keys} | {"1.running_mean", "1.running_var"}
    model.eval()
    for a in (0.25, 0.75):
        state = {k: before[k] + a * (v - before[k]) if k in moving else v for k, v in after.items()}
        leaves = {k: v.requires_grad_() if k in moving and "running" not in k else v for k, v in state.items()}

        def at(x, leaves=leaves):
            return functional_call(model, leaves, (x,))

        class At(nn.Module):
            def forward(self, x):
                return at(x)

        sum(losses(At())).backward()
        for name, keys in PARTS.items():
            for key in keys:
                product = leaves[key].grad * (after[key] - before[key])
                expected[name] -= product.reshape(len(product), -1).sum(1) / 2
    harm = harm_scores(model, before, losses)
    assert harm.norms == {"0": "1", "3": "4"}
    assert harm.scores.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(harm.scores[name].double(), value, atol=1e-6)
        assert bool((value != 0).any())  # some units are dead


def test_for_a_quadratic_loss_all_units_together_account_for_the_change():
    model = nn.Linear(4, 3).double()
    x, target = torch.randn(10, 4).double(), torch.randn(10, 3).double()

    def losses(model):
        yield (model(x) - target).square().mean()

    before, first = _state(model), next(losses(model))
    nn.init.normal_(model.weight)
    nn.init.normal_(model.bias)
    wrapped = nn.Sequential(model)
    before = {f"0.{name}": value for name, value in before.items()}
    scores = harm_scores(wrapped, before, losses, find_sites(wrapped, "0")).scores["0"]
    assert float(scores.sum()) == pytest.approx((first - next(losses(model))).item(), rel=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_scoring_leaves_the_model_as_it_was(fails):
    model, before, losses = _trained()
    model.train()
    model[8].eval()
    model[0].weight.requires_grad_(False)
    state, modes = _state(model), [m.training for m in model.modules()]
    wanted, rng = [p.requires_grad for p in model.parameters()], torch.get_rng_state()

    def failing(model):
        yield from losses(model)
        if torch.is_grad_enabled():
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            harm_scores(model, before, failing)
    else:
        harm_scores(model, before, losses)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert wanted == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_unit_that_learned_what_hurts_is_found_and_rewinding_it_mends_the_loss():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.01], [0.0, -0.01]]))
        model[2].weight.copy_(torch.tensor([[-1.0, 1.0, -1.0, 1.0], [1.0, -1.0, 1.0, -1.0]]))
        before = _state(model)
        model[0].weight[2:] *= 300  # these learned to follow the second feature
    y = torch.arange(40) % 2
    sign = 2.0 * y - 1
    minority = Batch(torch.stack([sign, -sign], 1), y)  # on which the second feature misleads
    losses = balanced_losses([minority])
    harm = harm_scores(model, before, losses)
    units = harm.most_harmful()
    assert sorted(units["0"].tolist()) == [2, 3]
    assert harm.concentration(0.5) == 1.0
    wrong = sum(losses(model))
    undo = rewind(model, before, units)
    assert sum(losses(model)) < wrong / 5
    undo()
    assert torch.equal(sum(losses(model)), wrong)


@pytest.mark.parametrize("amount", [1.0, 0.5])
@pytest.mark.parametrize("units", [[1, 2], torch.tensor([False, True, True, False, False, False])])
def test_only_the_units_go_back_with_their_norms_and_everything_comes_again(units, amount):
    model, before, losses = _trained()
    after = _state(model)
    undo = rewind(model, before, {"0": units}, harm_scores(model, before, losses).norms, amount)
    now = _state(model)
    changed = {name for name, value in now.items() if not torch.equal(value, after[name])}
    assert changed == {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    for name in changed:
        assert torch.equal(now[name][[0, 3, 4, 5]], after[name][[0, 3, 4, 5]])
        expected = after[name] + amount * (before[name] - after[name])
        assert torch.allclose(now[name][[1, 2]], expected[[1, 2]])
    if amount == 1:
        assert torch.equal(now["0.weight"][[1, 2]], before["0.weight"][[1, 2]])
    undo()
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_norms_that_read_a_layer_directly_belong_to_it():
    model = timm.create_model("resnet18", num_classes=2).eval()
    batch = Batch(torch.randn(2, 3, 32, 32), torch.arange(2))
    found = following_norms(model, rewindable_sites(model), balanced_losses([batch]))
    assert len(found) == 20
    assert found["conv1"].name == "bn1"
    assert found["layer2.0.downsample.0"].name == "layer2.0.downsample.1"
    assert found["layer4.1.conv2"].num_units == 512
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
    assert following_norms(vit, rewindable_sites(vit), balanced_losses([batch])) == {}
    assert [s.name for s in rewindable_sites(vit)] == [
        "patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2",
    ]  # fmt: skip


def test_every_class_counts_the_same_in_the_loss():
    model = nn.Linear(2, 2)
    x, y = torch.randn(9, 2), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1])
    losses = F.cross_entropy(model(x), y, reduction="none")
    expected = (losses[:6].mean() + losses[6:].mean()) / 2
    parts = list(balanced_losses([Batch(x[:5], y[:5]), Batch(x[5:], y[5:])])(model))
    assert len(parts) == 2
    assert torch.allclose(sum(parts), expected)


def test_the_most_harmful_units_are_the_most_negative_over_all_layers():
    harm = Harm({"a": torch.tensor([-3.0, 1.0, -0.5]), "b": torch.tensor([-1.0, 2.0])}, {})
    assert {n: u.tolist() for n, u in harm.most_harmful(0.4).items()} == {"a": [0], "b": [0]}
    assert {n: sorted(u.tolist()) for n, u in harm.most_harmful().items()} == {"a": [0, 2], "b": [0]}
    assert {n: u.tolist() for n, u in harm.most_harmful(0.2).items()} == {"a": [0]}
    assert harm.concentration(0.2) == pytest.approx(3 / 4.5)
    assert repr(harm).startswith("Harm(3 of 5 units in 2 layers are harmful: +4.500, the others −3.000; 1% of")


def test_what_cannot_be_scored_or_rewound_is_refused():
    model, before, losses = _trained()
    state = _state(model)
    with pytest.raises(ValueError, match=r"`before` has no '0.weight'"):
        harm_scores(model, {}, losses)
    with pytest.raises(ValueError, match="name an output"):
        harm_scores(model, before, losses, find_sites(model, "8:input"))
    with pytest.raises(ValueError, match="at least one site and one point"):
        harm_scores(model, before, losses, points=())
    with pytest.raises(ValueError, match="does not belong to this model"):
        harm_scores(model, before, losses, find_sites(_cnn(), "0"))
    with pytest.raises(ValueError, match="no finite gradient"):
        harm_scores(model, {**before, "0.weight": before["0.weight"] * torch.nan}, losses)
    with pytest.raises(ValueError, match="amount is the fraction"):
        rewind(model, before, {"0": [1]}, amount=1.5)
    with pytest.raises(ValueError, match="which the model does not have"):
        rewind(model, before, {"nothing": [1]})
    with pytest.raises(ValueError, match="to rewind to"):
        rewind(model, {k: v for k, v in before.items() if k != "1.bias"}, {"0": [1]}, {"0": "1"})
    with pytest.raises(ValueError, match="no units that can be rewound"):
        rewind(model, before, {"2": [1]})
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

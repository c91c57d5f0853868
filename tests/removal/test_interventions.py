"""Interventions: what they do to the network, and that they are undone bit for bit."""

import pytest
import timm
import torch
from torch import nn

from demem.removal import apply, intervene, intervene_weights
from demem.sites import ActivationReader, find_sites
from demem.tracing import prunable_weights, top_weights, unit_of_weight

KINDS = ["zero", "mean", "noise", "reinitialise", "rewind"]


def _model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2),
    ).eval()  # fmt: skip


def _options(kind, model, sites):
    if kind == "mean":
        return {"means": {s.name: torch.arange(float(s.num_units)) for s in sites}}
    if kind == "rewind":
        return {"reference_state": {k: v + 1 for k, v in model.state_dict().items()}}
    return {"generator": torch.Generator().manual_seed(0)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patterns", [["0"], ["2"], ["0", "2", "7:input"]])
def test_only_the_chosen_units_change_and_everything_comes_back(kind, patterns):
    model, x = _model(), torch.randn(4, 3, 8, 8)
    sites = find_sites(model, patterns)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected, rng = model(x), torch.get_rng_state()
    ids = {n: id(p) for n, p in model.named_parameters()}
    units = {s.name: torch.tensor([1, 3]) for s in sites}
    with intervene(model, sites, units, kind, **_options(kind, model, sites)) as changed:
        assert changed is model
        assert not torch.equal(model(x), expected)
        for site in sites:
            owner = unit_of_weight(site)
            others = (owner != 1) & (owner != 3)
            assert torch.equal(site.module.weight[others], state[site.name.partition(":")[0] + ".weight"][others])
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert ids == {n: id(p) for n, p in model.named_parameters()}
    assert torch.equal(model(x), expected)
    assert torch.equal(torch.get_rng_state(), rng)


def test_zero_and_mean_do_to_the_activation_what_they_say():
    model, x = _model(), torch.randn(4, 3, 8, 8)
    for name, side in (("0", ""), ("2", "")):
        site = find_sites(model, name + side)
        with intervene(model, site, {name: [2]}, "zero"), ActivationReader(site, reduce=None) as reader:
            model(x)
            assert bool((reader.pop()[name][:, 2] == 0).all())
        means = {name: torch.full((site[0].num_units,), 1.25)}
        with intervene(model, site, {name: [2]}, "mean", means=means), ActivationReader(site, reduce=None) as reader:
            model(x)
            assert bool((reader.pop()[name][:, 2] == 1.25).all())
    site = find_sites(model, "7:input")
    with ActivationReader(site) as reader:
        model(x)
        z = reader.pop()["7:input"]
    mean = z.mean(0)
    z[:, 4] = mean[4]
    expected = model[7](z)
    with intervene(model, site, {"7:input": [4]}, "mean", means={"7:input": mean}):
        torch.testing.assert_close(model(x), expected)


def test_rewind_noise_and_reinitialise_values():
    model = _model()
    site = find_sites(model, "0")
    reference = {k: torch.full_like(v, 7) for k, v in model.state_dict().items()}
    before = model[0].weight.clone()
    with intervene(model, site, {"0": torch.arange(8) == 5}, "rewind", reference_state=reference):
        assert bool((model[0].weight[5] == 7).all())
        assert model[0].bias[5].item() == 7
    with intervene(model, site, {"0": range(8)}, "noise", sigma=0.5):
        assert float((model[0].weight - before).std()) == pytest.approx(0.5, rel=0.15)
    with intervene(model, site, {"0": range(8)}, "reinitialise", sigma=2.0):
        assert float(model[0].weight.std()) == pytest.approx(2.0, rel=0.15)
        assert bool((model[0].bias == 0).all())
    undo = apply(model, site, {"0": [0]})
    assert bool((model[0].weight[0] == 0).all())
    undo()
    undo()
    assert torch.equal(model[0].weight, before)


def test_attention_heads_and_overlapping_sites():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=2)
    x = torch.randn(2, 3, 32, 32)
    vit.eval()
    sites = find_sites(vit, ["blocks.0.attn:heads", "blocks.0.attn.proj"])
    state = {k: v.clone() for k, v in vit.state_dict().items()}
    units = {"blocks.0.attn:heads": [1], "blocks.0.attn.proj": [3]}  # they share elements of one weight
    with intervene(vit, sites, units, "zero"), ActivationReader(sites, reduce=None):
        assert bool((vit.blocks[0].attn.proj.weight[:, 8:16] == 0).all())
        assert bool((vit.blocks[0].attn.proj.weight[3] == 0).all())
        vit(x)
    assert all(torch.equal(v, state[k]) for k, v in vit.state_dict().items())


def test_undone_after_an_exception_and_half_way():
    model = _model()
    site = find_sites(model, ["0", "3:input"])
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def fail():
        with intervene(model, site[:1], {"0": [0]}, "zero"):
            raise KeyError("in the middle")

    with pytest.raises(KeyError, match="middle"):
        fail()
    with pytest.raises(ValueError, match="for convolution and linear layers"):
        apply(model, site, {"0": [0], "3:input": [0]}, "mean", means={"0": torch.ones(8), "3:input": torch.ones(6)})
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["zero", "noise", "reinitialise", "rewind"])
def test_single_weights(kind):
    model = _model()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    masks = top_weights({n: w.abs() for n, w in prunable_weights(model).items()}, 0.1)
    reference = {k: v + 1 for k, v in state.items()} if kind == "rewind" else None
    with intervene_weights(model, masks, kind, reference_state=reference):
        for name, mask in masks.items():
            now = dict(model.named_parameters())[name]
            assert torch.equal(now[~mask], state[name][~mask])
            if mask.any():
                assert bool((now[mask] != state[name][mask]).all())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_bad_input_is_named():
    model = _model()
    sites = find_sites(model, "0")
    for units, options, message in (
        ({"9": [0]}, {}, "not among the sites"),
        ({"0": [8]}, {}, "indices in 0"),
        ({"0": torch.ones(3, dtype=torch.bool)}, {}, "must have 8 entries"),
        ({"0": [0]}, {"kind": "melt"}, "Unknown intervention"),
        ({"0": [0]}, {"kind": "rewind"}, "reference_state"),
        ({"0": [0]}, {"kind": "rewind", "reference_state": {}}, "has no '0.weight'"),
        ({"0": [0]}, {"kind": "mean"}, "needs `means`"),
        ({"0": [0]}, {"kind": "noise", "sigma": -1.0}, "sigma"),
    ):
        with pytest.raises(ValueError, match=message):
            apply(model, sites, units, **options)
    with pytest.raises(ValueError, match="fits no parameter"), intervene_weights(model, {"x": torch.ones(1)}):
        pass

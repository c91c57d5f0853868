"""Sites: which layers, reading, gating and baking, on the kinds of layer that usually break hooks."""

import copy

import pytest
import timm
import torch
from torch import nn

from demem.sites import (
    ActivationReader,
    Gates,
    bake_gates,
    check_finite,
    deciding_heads,
    default_sites,
    find_head,
    find_sites,
    remove_gates,
)


class Residual(nn.Module):
    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=inplace)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        return self.fc(self.relu(y).mean((2, 3)))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fc = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(torch.relu(self.layer(torch.relu(self.layer(x)))))


class Tuple(nn.Module):
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x):
            return self.lin(x), x.sum()

    def __init__(self) -> None:
        super().__init__()
        self.block, self.fc = Tuple.Inner(), nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.block(x)[0])


def _warm(model, x):
    """Batch-norm statistics other than 0 and 1."""
    model.train()
    with torch.no_grad():
        model(x)
    return model.eval()


def _images(n=4, size=8):
    return torch.randn(n, 3, size, size)


MODELS = {
    "residual": (Residual, _images, ["conv1", "bn1", "conv2", "fc:input"]),
    "not in place": (lambda: Residual(False), _images, ["conv1", "bn2", "conv2:input"]),
    "shared": (Shared, lambda: torch.randn(4, 6), ["layer"]),
    "tuple": (Tuple, lambda: torch.randn(4, 6), ["block.lin"]),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 12, 3, groups=3), nn.Flatten(), nn.Linear(192, 2)),
        _images,
        ["0", "1", "1:input"],
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(216, 2)),
        _images,
        ["1", "1:input", "3:input"],
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(486, 2)
        ),
        _images,
        ["0", "1", "1:input"],
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)),
        lambda: torch.randn(4, 6),
        ["0", "1", "2:input"],
    ),
    "layer norm over two axes": (
        lambda: nn.Sequential(nn.LayerNorm((6, 4)), nn.Flatten(), nn.Linear(24, 2)),
        lambda: torch.randn(5, 6, 4),
        ["0"],
    ),
    "layer norm over two equal axes": (
        lambda: nn.Sequential(nn.LayerNorm((4, 4)), nn.Flatten(), nn.Linear(16, 2)),
        lambda: torch.randn(5, 4, 4),
        ["0"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_ones_change_nothing_bit_for_bit_and_removal_restores(name):
    make, inputs, patterns = MODELS[name]
    x = inputs()
    model = _warm(make(), x)
    keys = list(model.state_dict())
    expected = model(x)
    gates = Gates(find_sites(model, patterns))
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    for site in gates.sites:
        gates[site.name] = torch.zeros(site.num_units)
    assert not torch.equal(model(x), expected)
    remove_gates(gates)
    assert torch.equal(model(x), expected)
    assert not [b for b, _ in model.named_buffers() if b.endswith("_gate")]


@pytest.mark.parametrize("name", MODELS)
def test_baked_equals_gated(name):
    make, inputs, patterns = MODELS[name]
    x = inputs()
    model = _warm(make(), x)
    keys = list(model.state_dict())
    gates = Gates(find_sites(model, patterns))
    for site in gates.sites:
        gates[site.name] = (torch.rand(site.num_units) > 0.4).float() * 0.5 + 0.25
    baked = bake_gates(model)
    torch.testing.assert_close(baked(x), model(x), rtol=1e-5, atol=1e-5)
    assert list(baked.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in baked.modules())
    assert list(model.named_buffers()) != list(baked.named_buffers())  # the original keeps its gates


def test_gates_survive_deepcopy_independently():
    x = _images()
    model = _warm(Residual(), x)
    gates = Gates(find_sites(model, "conv1"))
    twin = copy.deepcopy(model)
    gates["conv1"] = torch.zeros(8)
    expected = twin(x)
    assert not torch.equal(model(x), expected)
    twin.conv1.output_gate.zero_()
    torch.testing.assert_close(twin(x), model(x))


def test_gates_state_round_trip_and_errors():
    model = Residual()
    gates = Gates(find_sites(model, ["conv1", "fc:input"]))
    gates["conv1"] = torch.arange(8.0)
    state = gates.state_dict()
    other = Gates(find_sites(Residual(), ["conv1", "fc:input"]))
    other.load_state_dict(state)
    assert torch.equal(other["conv1"], torch.arange(8.0))
    with pytest.raises(ValueError, match="belong to the sites"):
        other.load_state_dict({"conv1": torch.ones(8)})
    with pytest.raises(ValueError, match="finite numbers"):
        gates["conv1"] = torch.full((8,), float("nan"))
    with pytest.raises(KeyError):
        gates["nothing"]
    with pytest.raises(ValueError, match="cannot be gated"):
        Gates(find_sites(model, "bn1:input"))
    with pytest.raises(ValueError, match="not known before a forward pass"):
        Gates(find_sites(model, "relu"))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reader_sees_the_value_before_an_in_place_relu(memory_format, dtype):
    x = _images().to(dtype).contiguous(memory_format=memory_format)
    model = _warm(Residual().to(dtype).to(memory_format=memory_format), x)
    expected = model.bn1(model.conv1(x)).mean((2, 3))
    with ActivationReader(find_sites(model, "bn1")) as reader:
        model(x)
        assert torch.equal(reader.pop()["bn1"], expected)
    with ActivationReader(find_sites(model, "bn1"), reduce=None) as reader:
        model(x)
        assert torch.equal(reader.pop()["bn1"], model.bn1(model.conv1(x)))


def test_reader_before_and_after_gates():
    x = _images()
    model = _warm(Residual(), x)
    sites = find_sites(model, ["conv1", "fc:input"])
    gates = Gates(sites)
    gates["conv1"] = torch.zeros(8)
    with ActivationReader(sites) as gated, ActivationReader(sites, ungated=True) as ungated:
        model(x)
        assert bool((gated.pop()["conv1"] == 0).all())
        assert torch.equal(ungated.pop()["conv1"], model.conv1.__class__.forward(model.conv1, x).mean((2, 3)))


def test_shared_layer_is_read_at_every_call_and_a_missing_one_is_named():
    model = Shared()
    x = torch.randn(4, 6)
    with ActivationReader(find_sites(model, "layer")) as reader:
        model(x)
        rows = reader.pop()["layer"]
        assert rows.shape == (8, 6)
        assert torch.equal(rows[:4], model.layer(x))
    with ActivationReader(find_sites(nn.Sequential(nn.Linear(2, 2)), "0")) as reader, pytest.raises(RuntimeError):
        reader.pop()


def test_tuple_outputs_are_read_and_gated_by_their_first_tensor():
    model, x = Tuple(), torch.randn(4, 6)
    with ActivationReader(find_sites(model, "block")) as reader:
        model(x)
        assert torch.equal(reader.pop()["block"], model.block.lin(x))


def test_compiled_model_is_read_and_gated():
    x = _images()
    model = _warm(Residual(), x)
    expected = model.conv1(x).mean((2, 3))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)  # compiled before the hooks come
        sites = find_sites(compiled, "conv1")
        assert [s.name for s in sites] == ["conv1"]
        with ActivationReader(sites) as reader:
            compiled(x)
            assert torch.equal(reader.pop()["conv1"], expected)
    other = _warm(Residual(), x)
    gates = Gates(find_sites(other, "conv1"))
    compiled = torch.compile(other, backend="eager")
    with torch.no_grad():
        before = compiled(x)
        gates["conv1"] = torch.zeros(8)
        assert not torch.equal(compiled(x), before)
        torch.testing.assert_close(compiled(x), other(x))
        remove_gates(gates)
        assert torch.equal(compiled(x), before)


def test_readers_that_overlap_leave_the_fast_path_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3))
    first, second = (ActivationReader(find_sites(model, "0")) for _ in range(2))
    before = torch.backends.mha.get_fastpath_enabled()
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__()
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize("mode", ["reader", "gates"])
def test_transformer_fast_path_does_not_hide_layers(mode):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 2)).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        expected = model(x)
        sites = find_sites(model, "0.layers.*.linear1")
        if mode == "reader":
            with ActivationReader(sites) as reader:
                out = model(x)
                assert reader.pop()["0.layers.0.linear1"].shape == (3, 32)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        else:
            gates = Gates(sites)
            for site in sites:
                gates[site.name] = torch.zeros(32)
            changed = model(x)
            assert not torch.allclose(changed, expected)
            torch.testing.assert_close(bake_gates(model)(x), changed, rtol=1e-4, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_timm_cnn_and_vit():
    cnn = timm.create_model("mobilenetv2_035", num_classes=2).eval()
    x = _images(2, 32)
    sites = find_sites(cnn, ["blocks.2.*.conv_dw", "blocks.3.0.conv_pwl", "classifier:input"])
    gates = Gates(sites)
    expected = cnn(x)
    for site in sites:
        gates[site.name] = (torch.rand(site.num_units) > 0.3).float()
    gated = cnn(x)
    assert not torch.allclose(gated, expected)
    torch.testing.assert_close(bake_gates(cnn)(x), gated, rtol=1e-4, atol=1e-5)
    assert find_head(cnn)[0] == "classifier"
    assert [s.name for s in default_sites(cnn)][-1] == "classifier:input"

    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=2)
    heads = find_sites(vit.eval(), "blocks.*.attn:heads")
    assert [s.num_units for s in heads] == [3, 3]
    gates = Gates(heads)
    expected = vit(x)
    gates["blocks.1.attn:heads"] = torch.tensor([1.0, 0.0, 1.0])
    gated = vit(x)
    assert not torch.allclose(gated, expected)
    baked = bake_gates(vit)
    torch.testing.assert_close(baked(x), gated, rtol=1e-4, atol=1e-5)
    assert bool((baked.blocks[1].attn.proj.weight[:, 8:16] == 0).all())
    with ActivationReader(default_sites(vit)) as reader:
        vit(x)
        assert set(reader.pop()) == {"blocks.0", "blocks.1", "head:input"}


def test_channels_are_counted_where_they_are():
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    class ChannelsLast(nn.Sequential):
        def forward(self, x):
            return super().forward(x.movedim(1, -1))

    model = nn.Sequential(LayerNorm2d(6), ChannelsLast(nn.Linear(6, 8)))
    with ActivationReader(find_sites(model, ["0", "1"]), None) as reader:
        model(torch.randn(2, 6, 5, 5))
        sites, seen = reader.sites, reader.pop()
    assert [seen[site.name].shape[site.unit_axis(seen[site.name])] for site in sites] == [6, 8]

    model = nn.Sequential(nn.Sequential(nn.Conv1d(3, 7, 3), nn.ReLU()), nn.Conv1d(7, 2, 3))
    with ActivationReader(find_sites(model, "0")) as reader:
        model(torch.randn(4, 3, 20))
        assert reader.pop()["0"].shape == (4, 7)


@pytest.mark.parametrize("pattern", ["enc.layers.*", "enc", "enc.layers.0.linear1", "enc.layers.1.norm1:input"])
def test_sequence_first_is_read_as_batch_first(pattern):
    class Encoder(nn.Module):
        def __init__(self, batch_first):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first)
            self.enc = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.batch_first = batch_first

        def forward(self, x):
            return self.enc(x if self.batch_first else x.transpose(0, 1))

    one, other = Encoder(True).eval(), Encoder(False).eval()
    other.load_state_dict(one.state_dict())
    x, seen = torch.randn(6, 4, 8), []
    for model in (one, other):
        with torch.no_grad(), ActivationReader(find_sites(model, pattern), "positions") as reader:
            model(x)
            seen.append(reader.pop())
    assert seen[0].keys() == seen[1].keys()
    for name, rows in seen[0].items():
        assert torch.allclose(rows, seen[1][name], atol=1e-6)


def test_gates_on_both_sides_go_one_by_one():
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    before = model(x)
    out, into = Gates(find_sites(model, "0")), Gates(find_sites(model, "0:input"))
    into["0:input"] = torch.zeros(4)
    remove_gates(out)
    assert torch.equal(model(x), model[0].bias.expand(2, -1))
    remove_gates(into)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.BatchNorm1d(4, affine=False), "has no weight of its own"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), "is computed from others"),
    ],
)
def test_layers_without_a_weight_of_their_own_are_not_gated(layer, reason):
    with pytest.raises(ValueError, match=reason):
        Gates(find_sites(nn.Sequential(layer), "0"))


def test_patterns():
    model = Residual()
    assert [s.name for s in find_sites(model, ["fc", "conv*"])] == ["conv1", "conv2", "fc"]
    with pytest.raises(ValueError, match="matches nothing") as error:
        find_sites(model, "layer9")
    assert "conv1 (Conv2d)" in str(error.value)
    with pytest.raises(ValueError, match="Unknown suffix"):
        find_sites(model, "conv1:weights")
    with pytest.raises(ValueError, match="no attention heads"):
        find_sites(model, "conv1:heads")
    with pytest.raises(ValueError, match="No layer pattern"):
        find_sites(model, [])
    with pytest.raises(ValueError, match=r"is not an nn\.Linear"):
        find_head(model, "conv1")
    with pytest.raises(ValueError, match=r"No nn\.Linear"):
        find_head(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match="NaN"):
        check_finite(torch.tensor([1.0, float("nan")]), "here")


def _one_of_two(rank):
    torch.manual_seed(0)
    model = Residual()
    gates = Gates(find_sites(model, "conv1"))
    wrapped = nn.parallel.DistributedDataParallel(model)
    if rank == 0:
        gates["conv1"] = torch.tensor([0.0, 1, 0, 1, 1, 1, 1, 0])
    for buffer in gates.buffers():
        torch.distributed.broadcast(buffer, 0)
    torch.manual_seed(rank)
    wrapped(_images()).sum().backward()
    with ActivationReader(find_sites(wrapped, "module.conv1")) as reader:
        wrapped(_images())
        return model.conv1.weight.grad, reader.pop()["module.conv1"].shape


def test_two_processes_share_gates(in_two_processes):
    for gradient, seen in in_two_processes(_one_of_two):
        # A gated unit gets no gradient, on either rank.
        assert bool((gradient[[0, 2, 7]] == 0).all())
        assert not bool((gradient[[1, 3]] == 0).all())
        assert seen == (4, 8)


@pytest.mark.parametrize("pattern", ["block", "block:input", "fc", "fc:input"])
def test_a_hook_reads_and_replaces_the_tensor_of_its_side(pattern):
    model, x, seen = Tuple(), torch.randn(4, 6), []
    (site,) = find_sites(model, pattern)
    expected = model(x)
    handle = site.hook(seen.append)  # returns None: nothing changes
    assert torch.equal(model(x), expected)
    handle.remove()
    z = {"block": model.block(x)[0], "block:input": x, "fc": expected, "fc:input": model.block(x)[0]}[pattern]
    assert torch.equal(seen[0], z)
    handle = site.hook(torch.neg)
    first = site.hook(lambda a: a + 1, prepend=True)
    changed = {
        "block": lambda: model.fc(-(z + 1)),
        "block:input": lambda: model.fc(model.block(-(x + 1))[0]),
        "fc": lambda: -(z + 1),
        "fc:input": lambda: model.fc(-(z + 1)),
    }
    result = model(x)
    handle.remove()
    first.remove()
    assert torch.equal(result, changed[pattern]())
    assert torch.equal(model(x), expected)


def test_deciding_heads():
    torch.manual_seed(0)
    body, one, two = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)
    unused = nn.Linear(5, 3)
    x = torch.randn(16, 6)

    class Model(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.body, self.one, self.two, self.unused, self.out = body, one, two, unused, out

        def forward(self, x):
            z = self.body(x).relu()
            return self.out(self.one(z), self.two(z))

    assert deciding_heads(Model(lambda a, b: a), x) == ["one"]
    assert deciding_heads(Model(lambda a, b: {"logits": b, "loss": None}), x) == ["two"]
    assert deciding_heads(Model(lambda a, b: a.log_softmax(1)), x) == ["one"]
    assert deciding_heads(Model(lambda a, b: 0.1 * b + 7), x) == ["two"]
    for out in (lambda a, b: a + b, lambda a, b: -a, lambda a, b: (4 * a).softmax(1), lambda a, b: a + 0.3 * b):
        assert deciding_heads(Model(out), x) == []
    for bias, value in ((one.bias, 9.0), (two.bias, 20.0)):  # the logits hardly differ between examples
        bias.data = torch.tensor([-value, value, value])
    assert deciding_heads(Model(lambda a, b: a), x) == ["one"]
    assert deciding_heads(Model(lambda a, b: a + b), x) == []
    single = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1))
    assert deciding_heads(single, x) == ["1"]
    assert deciding_heads(torch.compile(single, backend="eager"), x) == ["1"]

    class Pooled(nn.Module):
        """A head on every token, then their mean."""

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return self.head(x).mean(1)

    assert deciding_heads(Pooled(), torch.randn(8, 4, 6)) == ["head"]
    with pytest.raises(ValueError, match="3 of 24 values at the logits are NaN"):
        deciding_heads(Pooled(), torch.full((8, 4, 6), 1.0).index_fill(0, torch.tensor([2]), torch.nan))

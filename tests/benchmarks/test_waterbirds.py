import json

import numpy as np
import pytest
import torch

from benchmarks import backbones, waterbirds
from benchmarks.__main__ import main as entry
from benchmarks.backbones import Tail
from benchmarks.compare import main
from benchmarks.experiment import Settings
from benchmarks.results import read_jsonl
from benchmarks.waterbirds import WaterbirdsFeatures, cache_features

TIMM = {"mobilenetv2": "mobilenetv2_100", "efficientnet_lite0": "efficientnet_lite0"}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A Waterbirds folder of 12 coloured squares, and untrained networks."""
    import pandas as pd
    import timm
    from PIL import Image

    folder = tmp_path / "data" / "waterbirds_v1.0"
    folder.mkdir(parents=True)
    (folder / "RELEASE_v1.0.txt").touch()
    rows = []
    for i in range(12):
        Image.fromarray(np.full((200, 190, 3), 20 * i, np.uint8)).save(folder / f"{i}.jpg")
        rows.append({"img_filename": f"{i}.jpg", "y": i % 2, "split": i // 4, "place": i % 4 // 2})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv")
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    torch.manual_seed(0)
    networks = {name: timm.create_model(timm_name, num_classes=2) for name, timm_name in TIMM.items()}
    monkeypatch.setattr(backbones, "pretrained", lambda path: networks["mobilenetv2"])
    monkeypatch.setattr(backbones, "efficientnet_lite0", lambda: networks["efficientnet_lite0"])
    monkeypatch.setattr(backbones, "lite0_file", lambda: tmp_path / "weights.safetensors")
    return tmp_path / "data", tmp_path / "weights.safetensors", tmp_path / "cache"


@pytest.mark.slow
@pytest.mark.parametrize("backbone", TIMM)
def test_cached_layers_and_tail_make_the_whole_network(small, backbone):
    root, weights, cache = small
    folder = cache_features(root, weights, cache, backbone=backbone)
    assert folder.name.startswith(f"waterbirds-{backbone}-")
    data = WaterbirdsFeatures(folder)
    assert data.train_group_counts.tolist() == [1, 1, 1, 1]
    x, _, _ = next(iter(data.val_dataloader()))
    network = backbones.make_backbone(backbone, weights).eval()
    tail = Tail(network).eval()
    image = backbones.image_transform(180, 160, (0.5,) * 3, (0.5,) * 3)
    dataset = waterbirds.load_wilds("waterbirds", root)
    with torch.no_grad():
        whole = network.forward_head(
            network.forward_features(torch.stack([image(dataset.get_input(i)) for i in range(4, 8)])), pre_logits=True
        )
        pooled = tail.global_pool(tail.bn2(tail.conv_head(tail.blocks(x))))
    assert torch.allclose(whole, pooled, atol=2e-2)  # kept as float16


@pytest.mark.slow
def test_a_run_cut_off_is_not_taken_for_finished_and_goes_on(small, monkeypatch):
    root, weights, cache = small
    done = []

    def stop(file, at, of):
        done.append(file)
        if file == "train_augmented1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_features(root, weights, cache, stop)
    (folder,) = cache.iterdir()
    assert not (folder / "made_from.json").exists()
    assert not (folder / "train_augmented1.npy").exists()
    first = np.load(folder / "train_plain.npy").copy()
    done.clear()
    assert cache_features(root, weights, cache, lambda file, at, of: done.append(file)) == folder
    assert "train_plain" not in done
    assert "train_augmented1" in done
    assert json.loads((folder / "made_from.json").read_text())["sizes"] == [180, 160]
    assert np.array_equal(first, np.load(folder / "train_plain.npy"))
    done.clear()
    cache_features(root, weights, cache, lambda file, at, of: done.append(file))
    assert not done
    weights.write_bytes(b"other weights")
    assert cache_features(root, weights, cache) != folder


@pytest.mark.slow
def test_the_whole_network_can_be_trained(small, tmp_path):
    root, weights, _ = small
    options = ["--data", "waterbirds_full", "--data-root", str(root), "--weights", str(weights), "--epochs", "1"]
    assert main([*options, "--methods", "erm", "--seeds", "1", "--out", str(tmp_path / "out")]) == 0
    (row,) = read_jsonl(tmp_path / "out" / "results.jsonl")
    assert (row["data"], row["epochs"], len(row["group_acc"])) == ("waterbirds_full", 1, 4)


@pytest.mark.slow
def test_a_damaged_image_is_named(small):
    root, weights, cache = small
    (root / "waterbirds_v1.0" / "5.jpg").write_bytes(b"no image")
    with pytest.raises(FileNotFoundError, match=r"5\.jpg is missing or damaged"):
        cache_features(root, weights, cache)


@pytest.mark.slow
def test_a_row_with_the_other_backbone(small, tmp_path, capsys):
    root, _, cache = small
    options = ["--data", "waterbirds", "--backbone", "efficientnet_lite0", "--data-root", str(root), "--epochs", "1"]
    assert main([*options, "--methods", "erm", "--seeds", "1", "--cache", str(cache), "--out", str(tmp_path)]) == 0
    (row,) = read_jsonl(tmp_path / "results.jsonl")
    assert row["data"] == "waterbirds_lite0"
    said = capsys.readouterr().out
    assert said.count("CUB-200-2011 and Places; non-commercial") == said.count("EfficientNet-Lite0; Apache-2.0") == 1


def test_a_backbone_is_chosen_for_waterbirds_only(tmp_path, capsys):
    assert entry(["compare", "--backbone", "efficientnet_lite0", "--out", str(tmp_path / "out")]) == 2
    assert "--backbone chooses the network of waterbirds, and --data names digits" in " ".join(
        capsys.readouterr().err.split()
    )


def test_missing_data_and_weights_are_named(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no Waterbirds at"):
        cache_features(tmp_path, tmp_path / "w.safetensors", tmp_path)
    (tmp_path / "waterbirds_v1.0").mkdir()
    (tmp_path / "waterbirds_v1.0" / "metadata.csv").touch()
    assert entry(["compare", "--data", "waterbirds", "--data-root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "Pass --weights" in capsys.readouterr().err


def test_weights_are_for_the_backbone_that_reads_a_file(tmp_path):
    settings = Settings(tmp_path, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="--weights is for MobileNetV2"):
        backbones.weights_file("efficientnet_lite0", settings)
    with pytest.raises(FileNotFoundError, match="There are no weights at"):
        backbones.weights_file("mobilenetv2", settings)

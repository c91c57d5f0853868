import numpy as np
import pytest
import torch

from benchmarks import backbones, solar
from benchmarks.__main__ import main as entry
from benchmarks.compare import main
from benchmarks.results import read_jsonl
from benchmarks.solar import SolarFeatures, cache_features, read_labels, split_photographs


def _cells(folder, counts, side=300):
    """A made package with photographs of noise: ``counts`` of each (probability, type)."""
    from PIL import Image

    (folder / "data" / "images").mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for (probability, kind), count in counts.items():
        for _ in range(count):
            name = f"images/cell{len(lines):04d}.png"
            Image.fromarray(rng.integers(0, 255, (side, side), np.uint8)).save(folder / "data" / name)
            lines.append(f"{name}  {probability}  {kind}")
    (folder / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "data" / "labels.csv"


def test_sure_photographs_are_read_with_class_and_type(tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("a.png  1.0  mono\nb.png  0.3333333333333333  poly\nc.png  0.0  poly\nd.png  0.0  mono\n")
    paths, y, attribute = read_labels(labels)
    assert [path.name for path in paths] == ["a.png", "c.png", "d.png"]
    assert paths[0].parent == tmp_path
    assert (y.tolist(), attribute.tolist()) == ([1, 0, 0], [0, 1, 0])


@pytest.mark.parametrize("line", ["b.png  0.0", "b.png  0.0  multi", "b.png  x  mono", "b.png  2.0  mono", ""])
def test_a_damaged_line_is_named(tmp_path, line):
    labels = tmp_path / "labels.csv"
    labels.write_text(f"a.png  1.0  mono\n{line}\nc.png  0.0  poly\n")
    with pytest.raises(ValueError, match="is damaged at line 2"):
        read_labels(labels)


def test_missing_labels_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pip install -e '\.\[solar\]'"):
        read_labels(tmp_path / "labels.csv")


def _photographs():
    """Classes and types with the counts of the real data set."""
    y = np.repeat([0, 0, 1, 1], [588, 920, 313, 402])
    attribute = np.repeat([0, 1, 0, 1], [588, 920, 313, 402])
    order = np.random.default_rng(1).permutation(len(y))
    return y[order], attribute[order]


def test_types_go_with_classes_in_training_and_are_balanced_elsewhere():
    y, attribute = _photographs()
    train, val, test = split_photographs(y, attribute, 0)
    assert len({*train.tolist(), *val.tolist(), *test.tolist()}) == len(train) + len(val) + len(test)
    counts = [np.bincount(2 * y[part] + attribute[part], minlength=4).tolist() for part in (train, val, test)]
    assert counts == [[341, 18, 12, 233], [71, 71, 48, 48], [176, 176, 121, 121]]
    assert counts[0][0] / sum(counts[0][:2]) == pytest.approx(0.95, abs=0.002)
    assert counts[0][3] / sum(counts[0][2:]) == pytest.approx(0.95, abs=0.002)


def test_the_split_follows_from_the_seed():
    y, attribute = _photographs()
    first, same, other = (split_photographs(y, attribute, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_too_few_photographs_are_refused():
    y, attribute = np.repeat([0, 0, 1, 1], [40, 10, 10, 40]), np.repeat([0, 1, 0, 1], [40, 10, 10, 40])
    with pytest.raises(ValueError, match="Class 0 has 40 photographs of its frequent type and 10 of the other"):
        split_photographs(y, attribute, 0)
    with pytest.raises(ValueError, match="Class 0 has 0 photographs of its frequent type"):
        split_photographs(np.ones(10, np.int64), np.ones(10, np.int64), 0)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A made package of small photographs, and an untrained EfficientNet-Lite0."""
    import timm

    _cells(tmp_path / "package", {(p, k): 45 for p in ("0.0", "1.0") for k in ("mono", "poly")}, side=40)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"weights")
    network = timm.create_model("efficientnet_lite0")
    for module in (solar, backbones):
        monkeypatch.setattr(module, "efficientnet_lite0", lambda: network)
        monkeypatch.setattr(module, "lite0_file", lambda: weights)
    monkeypatch.setattr(solar, "require", lambda package, extra: tmp_path / "package")
    for name, value in {"RESIZE": 64, "CROP": 64, "AUGMENTED_VIEWS": 1}.items():
        monkeypatch.setattr(solar, name, value)
    return tmp_path


@pytest.mark.slow
def test_cached_layers_follow_the_photographs(made):
    folder = cache_features(made / "cache")
    data = SolarFeatures(folder, seed=3)
    data.setup()
    paths, y, attribute = read_labels(made / "package" / "data" / "labels.csv")
    for part in (data.train_eval_dataset, data.val_dataset, data.test_dataset):
        assert part.group.tolist() == (2 * y + attribute)[part.positions.numpy()].tolist()
    assert len(data.train_dataset.views) == 2
    network = backbones.efficientnet_lite0().eval()
    image = backbones.image_transform(64, 64, backbones.HALF, backbones.HALF)
    x, _, _ = data.val_dataset[0]
    with torch.no_grad():
        expected = backbones.frozen_layers(
            network, image(backbones.open_image(paths[data.val_dataset.positions[0]]))[None]
        )
    assert torch.allclose(x, expected[0], atol=2e-2)  # kept as float16


@pytest.mark.slow
def test_a_row_on_made_photographs(made, capsys):
    options = ["--data", "solar", "--methods", "erm,dfr", "--seeds", "1", "--epochs", "1", "--out", str(made / "out")]
    assert main([*options, "--cache", str(made / "cache")]) == 0
    erm, dfr = read_jsonl(made / "out" / "results.jsonl")
    assert (erm["data"], len(erm["group_acc"]), dfr["method"]) == ("solar", 4, "dfr")
    said = capsys.readouterr().out
    assert said.count("CC BY-NC-SA 4.0") == said.count("EfficientNet-Lite0; Apache-2.0") == 1


@pytest.mark.slow
def test_a_damaged_photograph_ends_the_run_and_is_named(made, capsys):
    (made / "package" / "data" / "images" / "cell0003.png").write_bytes(b"")
    options = ["--data", "solar", "--methods", "erm", "--out", str(made / "out"), "--cache", str(made / "cache")]
    assert entry(["compare", *options]) == 2
    assert "cell0003.png is missing or damaged" in "".join(capsys.readouterr().err.splitlines())


def test_missing_packages_end_the_run_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(solar, "PACKAGE", "no_such_package")
    assert entry(["compare", "--data", "solar", "--out", str(tmp_path / "out")]) == 2
    assert "no_such_package is not installed: pip install -e '.[solar]'" in " ".join(capsys.readouterr().err.split())


def test_the_real_photographs():
    package = pytest.importorskip(solar.PACKAGE, reason="elpv-dataset is not installed")
    paths, y, attribute = read_labels(solar.require(package.__name__, solar.EXTRA) / "data" / "labels.csv")
    assert np.bincount(2 * y + attribute).tolist() == [588, 920, 313, 402]
    assert backbones.open_image(paths[0]).size == (300, 300)

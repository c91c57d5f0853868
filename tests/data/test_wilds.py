import subprocess
import sys

import numpy as np
import pytest
import torch

from demem.data import WildsDataModule
from demem.data.wilds import load_wilds, make_grouper

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")


def _small_waterbirds(root, images=True):
    """A Waterbirds folder of 12 coloured squares."""
    import pandas as pd
    from PIL import Image

    folder = root / "waterbirds_v1.0"
    folder.mkdir()
    rows = []
    for i in range(12):
        name = f"{i}.jpg"
        if images:
            Image.fromarray(np.full((40, 30, 3), 20 * i, np.uint8)).save(folder / name)
        rows.append({"img_filename": name, "y": i % 2, "split": i // 4, "place": i % 4 // 2})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv")
    (folder / "RELEASE_v1.0.txt").touch()
    return root


def test_waterbirds_by_its_splits_and_groups(tmp_path):
    data = WildsDataModule("waterbirds", str(_small_waterbirds(tmp_path)), resize=32, crop=32, batch_size=4)
    assert data.num_groups == 4
    assert data.train_group_counts.tolist() == [1, 1, 1, 1]
    x, y, group = next(iter(data.val_dataloader()))
    assert x.shape == (4, 3, 32, 32)
    assert torch.equal(group, 2 * y + torch.tensor([0, 0, 1, 1]))
    train = next(iter(data.train_eval_dataloader()))[0]
    assert torch.equal(train, next(iter(data.train_eval_dataloader()))[0])  # no augmentation


def test_groups_by_chosen_fields(tmp_path):
    root = str(_small_waterbirds(tmp_path))
    data = WildsDataModule("waterbirds", root, group_by=["background"], resize=8, crop=8)
    assert data.num_groups == 2
    dataset = load_wilds("waterbirds", root)
    with pytest.raises(ValueError, match="no metadata field"):
        make_grouper(dataset, ["place"])


def test_pandas_without_the_option_for_text(tmp_path, monkeypatch):
    import pandas as pd

    def no_option(*given):
        raise pd.errors.OptionError(f"No such keys(s): {given[0]!r}")

    monkeypatch.setattr(pd, "option_context", no_option)
    assert len(load_wilds("waterbirds", _small_waterbirds(tmp_path))) == 12


def test_missing_folder_missing_data_and_missing_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        WildsDataModule("waterbirds", str(tmp_path / "nowhere")).setup()
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match="there is: other"):
        WildsDataModule("waterbirds", str(tmp_path)).setup()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    with pytest.raises(FileNotFoundError, match="damaged or incomplete"):
        WildsDataModule("waterbirds", str(_small_waterbirds(damaged, images=False))).setup()
    with pytest.raises(ValueError, match="no data set 'waterbird'"):
        load_wilds("waterbird", tmp_path)


def test_civilcomments_takes_a_tokenizer(tmp_path):
    import pandas as pd

    folder = tmp_path / "civilcomments_v1.0"
    folder.mkdir()
    fields = ["male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white"]
    fields += ["identity_any", "severe_toxicity", "obscene", "threat", "insult", "identity_attack", "sexual_explicit"]
    rows = [
        {
            "comment_text": f"words {i}",
            "toxicity": i % 2,
            "split": ("train", "val", "test")[i // 4],
            **dict.fromkeys(fields, float(i % 4 // 2)),
        }
        for i in range(12)
    ]
    pd.DataFrame(rows).to_csv(folder / "all_data_with_identities.csv")
    (folder / "RELEASE_v1.0.txt").touch()
    data = WildsDataModule("civilcomments", str(tmp_path), transform=lambda text: torch.tensor([len(text)]))
    x, y, group = next(iter(data.val_dataloader()))
    assert x.shape == (4, 1)
    assert torch.equal(group % 2, torch.tensor([0, 0, 1, 1]))
    assert torch.equal(group // 2, y)


def test_real_waterbirds(data_root):
    if not (data_root / "waterbirds_v1.0").is_dir():
        pytest.skip("no Waterbirds")
    data = WildsDataModule("waterbirds", str(data_root), resize=64, crop=64)
    assert data.train_group_counts.tolist() == [3498, 184, 56, 1057]
    assert torch.bincount(data.test_dataset.group).tolist() == [2255, 2255, 642, 642]


@pytest.mark.slow
def test_importing_wilds_through_demem_starts_no_thread_and_prints_nothing():
    code = (
        "import threading, demem.data.wilds as w; w._import_wilds();"
        "assert threading.active_count() == 1, threading.enumerate()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

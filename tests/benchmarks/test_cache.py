import json
import re

import numpy as np
import pytest
import torch

from benchmarks import cache as module
from benchmarks.cache import find_or_make, read


class Arrays:
    """Two arrays, and how often each was made."""

    def __init__(self):
        self.made = []
        self.said = []

    def find(self, parent, made_from=None, first=1.0):
        def make(name, value):
            def fill(create):
                self.made.append(name)
                create((4, 3), np.float16)[:] = value

            return fill

        made_from = made_from or {"data": "a"}
        return find_or_make(parent, "name", made_from, {"a": make("a", first), "b": make("b", 2.0)}, self.said.append)


@pytest.fixture
def arrays():
    return Arrays()


def test_arrays_are_made_once_and_recorded(tmp_path, arrays):
    folder = arrays.find(tmp_path)
    assert arrays.find(tmp_path) == folder
    assert arrays.made == ["a", "b"]
    assert arrays.said == []
    assert torch.equal(read(folder, "b"), torch.full((4, 3), 2.0, dtype=torch.float16))
    record = json.loads((folder / "b.json").read_text())
    assert (record["shape"], record["dtype"], record["bytes"]) == ([4, 3], "<f2", (folder / "b.npy").stat().st_size)
    assert len(record["sha256"]) == 64
    assert json.loads((folder / "made_from.json").read_text()) == {"data": "a"}
    assert sorted(p.name for p in folder.iterdir()) == ["a.json", "a.npy", "b.json", "b.npy", "made_from.json"]


def test_other_data_has_another_folder(tmp_path, arrays):
    assert arrays.find(tmp_path) != arrays.find(tmp_path, {"data": "b"})
    assert arrays.made == ["a", "b"] * 2


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-2])


def _change(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _other_shape(path):
    np.save(path, np.full((3, 4), 2.0, np.float16))  # as many bytes as before


def _no_record(path):
    path.with_suffix(".json").unlink()


def _broken_record(path):
    path.with_suffix(".json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_shorten, "bytes instead of"),
        (_change, "does not have the checksum"),
        (_other_shape, r"holds float16 \(3, 4\) instead of"),
        (_no_record, "cannot be read"),
        (_broken_record, "cannot be read"),
    ],
)
def test_a_damaged_array_is_made_again_with_one_line_said(tmp_path, arrays, monkeypatch, damage, reason):
    folder = arrays.find(tmp_path)
    damage(folder / "b.npy")
    monkeypatch.setattr(module, "_checked", {})  # as in a new process
    arrays.made.clear()
    arrays.find(tmp_path)
    assert arrays.made == ["b"]
    (line,) = arrays.said
    assert str(folder / "b.npy") in line
    assert re.search(reason, line)
    assert torch.equal(read(folder, "b"), torch.full((4, 3), 2.0, dtype=torch.float16))


def test_damage_within_one_process_is_seen(tmp_path, arrays):
    folder = arrays.find(tmp_path)
    _change(folder / "a.npy")
    arrays.find(tmp_path)
    assert arrays.made == ["a", "b", "a"]


def test_checksums_are_computed_once(tmp_path, arrays, monkeypatch):
    arrays.find(tmp_path)
    monkeypatch.setattr(module, "file_hash", lambda path: pytest.fail("read again"))
    arrays.find(tmp_path)


def test_a_run_cut_off_goes_on_with_the_next_array(tmp_path, arrays):
    def stop(create):
        create((4, 3), np.float16)[:2] = 1.0
        raise KeyboardInterrupt

    kept = {"a": lambda create: create((1,), np.int64).fill(7)}
    with pytest.raises(KeyboardInterrupt):
        find_or_make(tmp_path, "name", {}, {**kept, "b": stop}, arrays.said.append)
    (folder,) = tmp_path.iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["a.json", "a.npy"]

    def again(create):
        pytest.fail("made again")

    find_or_make(tmp_path, "name", {}, {"a": again, "b": lambda create: create((1,), np.int64)}, arrays.said.append)
    assert int(read(folder, "a")) == 7
    assert arrays.said == []


def test_a_full_disk_is_named_before_it_is_written(tmp_path, arrays, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 23}))
    with pytest.raises(ValueError, match=r"needs 0\.00 GB and the disk has 0\.00 GB left"):
        arrays.find(tmp_path)


def test_changing_what_was_read_leaves_the_file_as_it_is(tmp_path, arrays):
    folder = arrays.find(tmp_path)
    read(folder, "a").zero_()
    assert float(read(folder, "a").sum()) == 12

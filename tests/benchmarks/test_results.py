import gzip

import pytest

from benchmarks.results import append_jsonl, read_jsonl


def test_rows_come_back_in_order(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    assert read_jsonl(path) == []
    for i in range(3):
        append_jsonl(path, {"seed": i, "group_acc": [0.5, None]})
    assert [row["seed"] for row in read_jsonl(path)] == [0, 1, 2]


def test_a_line_cut_off_half_way_is_left_out_and_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "results.jsonl"
    append_jsonl(path, {"seed": 0})
    with path.open("a") as file:
        file.write('{"seed": 1, "worst')
    assert [row["seed"] for row in read_jsonl(path)] == [0]
    append_jsonl(path, {"seed": 2})
    assert [row["seed"] for row in read_jsonl(path)] == [0, 2]


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        append_jsonl(tmp_path / "results.jsonl", {"worst_group_acc": float("nan")})
    assert read_jsonl(tmp_path / "results.jsonl") == []


def test_compressed_rows_are_read_and_cut_off_ones_refused(tmp_path):
    whole = gzip.compress(b'{"seed": 0}\n{"seed": 1}\n')
    (tmp_path / "rows.jsonl.gz").write_bytes(whole)
    assert read_jsonl(tmp_path / "rows.jsonl.gz") == [{"seed": 0}, {"seed": 1}]
    for content in (whole[:-9], b"not compressed"):
        (tmp_path / "rows.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match="no complete gzip file"):
            read_jsonl(tmp_path / "rows.jsonl.gz")

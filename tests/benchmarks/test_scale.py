import pytest

from benchmarks.__main__ import main
from benchmarks.results import read_jsonl
from benchmarks.speed.scale import curves, draw, exponent


@pytest.mark.slow
def test_the_command_measures_prints_and_draws(tmp_path, capsys):
    assert main(["speed", "scale", "--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    rows = read_jsonl(tmp_path / "scale.jsonl")
    assert {row["part"] for row in rows} == {"refit", "detection", "reservoir", "drawing"}
    assert all(row["s"] > 0 for row in rows)
    assert {axis for part, axis in curves(rows) if part == "refit"} == {"rows", "units", "classes"}
    assert (tmp_path / "scale.png").stat().st_size > 1000
    assert "exponent" in capsys.readouterr().out


def test_an_exponent_is_the_slope_at_the_large_end():
    points = [{"axis": "groups", "classes": n, "cpu_s": s} for n, s in ((10, 1.0), (20, 2.0), (40, 8.0))]
    assert exponent(points, "cpu_s") == pytest.approx(2)
    assert exponent([{**point, "cpu_s": None} for point in points], "cpu_s") is None


@pytest.mark.parametrize("mib", [None, 0.0])
def test_curves_are_drawn_where_memory_does_not_grow_or_cannot_be_measured(tmp_path, mib):
    rows = [dict(part="refit", axis="rows", rows=n, units=1, classes=2, cpu_s=n / 10, mib=mib) for n in (10, 20)]
    assert draw(rows, tmp_path / "scale.png").stat().st_size > 1000

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location("compare", FOLDER / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(speed: float, spread: float = 0.1) -> dict[str, float]:
    return {"speed": speed, "speed 10 %": speed - spread, "speed 90 %": speed + spread}


def test_only_ratios_beyond_both_spreads_count(compare):
    then = {"same": row(2.0), "near": row(2.0), "slower": row(2.0), "faster": row(2.0), "gone": row(1.0)}
    now = {"same": row(2.0), "near": row(1.85), "slower": row(1.7), "faster": row(2.3), "new": row(1.0)}
    assert compare.compared(now, then) == {
        "faster": "faster: 2.00x -> 2.30x",
        "gone": "not measured now",
        "new": "not in the baseline",
        "slower": "slower: 2.00x -> 1.70x",
    }


def test_rows_are_found_in_nested_tables(compare):
    results = {"machine": {"threads": 2}, "float": 0.5, "a": row(1.5), "b": {"c": row(2.5) | {"ms": 3.0}}}
    assert compare.ratios(results, "x") == {"x: a": row(1.5), "x: b: c": row(2.5)}


def test_a_kernel_is_slower_only_beyond_what_every_peer_lost(compare):
    shapes, then, now = range(4), {}, {}
    for name, change in {"llama.cpp Q4_0": 0.8, "torch float32": 1.0, "int4": 0.73, "int8": 0.7, "int3": 1.1}.items():
        then |= {f"kernels: {shape}: {name}": row(2.0) for shape in shapes}
        now |= {f"kernels: {shape}: {name}": row(2.0 * change) for shape in shapes}
    now["kernels: 0: int3"] = row(0.1)  # one cell says little
    then |= {"kernels: pairs: int4 over llama.cpp Q4_0": row(1.0)}
    now |= {"kernels: pairs: int4 over llama.cpp Q4_0": row(0.1)}
    medians = compare.changes(now, then)["kernels"]
    assert medians["int3"] == pytest.approx(1.1)
    assert "int4 over llama.cpp Q4_0" not in medians
    assert compare.slower(medians) == ["int8"]  # below 0.9 of 0.8
    then = {f"kernels: {shape}, {rows} rows: int4": row(2.0) for shape in shapes for rows in (1, 8, 64)}
    now = then | {f"kernels: {shape}, 8 rows: int4": row(1.0) for shape in shapes}
    medians = compare.changes(now, then)
    assert [name for name in medians if compare.slower(medians[name])] == ["kernels, 8 rows"]


def test_every_instruction_set_has_its_own_baseline(compare, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "FOLDER", tmp_path)
    monkeypatch.setattr(compare, "BASELINE", tmp_path / "kept" / "baseline.json")
    monkeypatch.setattr(sys, "argv", ["compare.py"])
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "baseline.json").write_text(
        json.dumps({"other": {"x: a": row(9.0)}, "avx2": {"x: a": row(1.5)}})
    )
    (tmp_path / "x.json").write_text(json.dumps({"machine": {"isa": "avx2"}, "a": row(1.5)}))
    (tmp_path / "text.json").write_text(json.dumps({"drop": 0.5}))  # states no ratio, names no machine
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 0
    assert "avx2: 1 rows compared, 0 slower" in capsys.readouterr().out
    (tmp_path / "x.json").write_text(json.dumps({"machine": {"isa": "avx2"}, "a": row(1.0)}))
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 1
    monkeypatch.setattr(sys, "argv", ["compare.py", "--accept"])
    compare.main()
    kept = json.loads((tmp_path / "kept" / "baseline.json").read_text())
    assert kept == {"other": {"x: a": row(9.0)}, "avx2": {"x: a": row(1.0)}}

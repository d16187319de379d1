"""Compares what the benchmarks measured with the stored baseline: which kernels became slower.

Every row of ``results/<name>.json`` with a ``speed`` (times faster than the reference of the same round, with its 10 %
and 90 % quantiles) is compared with the row of ``baseline.json`` for the instruction set that was measured; rows apart
by more than both their intervals are listed. Few rounds on a shared host leave such rows where nothing changed, so the
verdict is on medians: the change of a kernel's rows over shapes and batches, and over the shapes of one batch, beside
that of every peer in the same rows. Peers did not change, so theirs is what the host does. A kernel is slower when its
median change is worse than that of every peer by more than a tenth; then the exit code is 1.

    python benchmarks/compare.py [--accept]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from results import FOLDER

BASELINE = Path(__file__).parent / "baseline.json"
PEERS = ("torch", "llama.cpp", "ONNX Runtime", "OpenVINO")  # what names of their rows begin with
TOLERANCE = 0.9  # of the worst peer's change
Rows = dict[str, dict[str, float]]
Tables = dict[str, Rows]  # by instruction set


def ratios(results: dict[str, Any], name: str) -> Rows:
    """Rows with a speed in what one script wrote, nested tables included, by path."""
    found: Rows = {}
    for key, value in results.items():
        if not isinstance(value, dict):
            continue
        if "speed" in value:
            found[f"{name}: {key}"] = {each: round(value[each], 3) for each in ("speed", "speed 10 %", "speed 90 %")}
        else:
            found |= ratios(value, f"{name}: {key}")
    return found


def compared(now: Rows, then: Rows) -> dict[str, str]:
    """What became slower or faster beyond both spreads, and what has no counterpart."""
    found = {key: "not measured now" for key in then.keys() - now.keys()}
    found |= {key: "not in the baseline" for key in now.keys() - then.keys()}
    for key in now.keys() & then.keys():
        text = f"{then[key]['speed']:.2f}x -> {now[key]['speed']:.2f}x"
        if now[key]["speed 90 %"] < then[key]["speed 10 %"]:
            found[key] = f"slower: {text}"
        elif now[key]["speed 10 %"] > then[key]["speed 90 %"]:
            found[key] = f"faster: {text}"
    return dict(sorted(found.items()))


def changes(now: Rows, then: Rows) -> dict[str, dict[str, float]]:
    """By script, and by script and batch, the median change of each contender's rows, without the rows of pairs."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key in now.keys() & then.keys():
        script, *case, name = key.split(": ")
        if " over " not in name:
            batch = "".join(case).split(", ")[-1]
            for group in (script, f"{script}, {batch}"):
                found[group][name].append(now[key]["speed"] / then[key]["speed"])
    return {script: {name: statistics.median(each) for name, each in names.items()} for script, names in found.items()}


def slower(medians: dict[str, float]) -> list[str]:
    """Ours of one script whose change is worse than every peer's by more than a tenth; prints what it judges by."""
    peers = [change for name, change in medians.items() if name.startswith(PEERS)]
    limit = TOLERANCE * min([1.0, *peers])
    ours = {name: change for name, change in sorted(medians.items()) if not name.startswith(PEERS)}
    for whose, each in (("peers", peers), ("of ours", list(ours.values()))):
        print(f"    {len(each)} {whose}: {min(each, default=1):.2f} to {max(each, default=1):.2f}")
    print(f"    slower is below {limit:.2f}")
    return [name for name, change in ours.items() if change < limit]


def measured() -> Tables:
    """The rows of all results, by the instruction set of the machine that each file names."""
    found: Tables = {}
    for path in sorted(FOLDER.glob("*.json")):
        results = json.loads(path.read_text())
        if rows := ratios(results, path.stem):
            found.setdefault(results["machine"]["isa"], {}).update(rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accept", action="store_true", help="what was measured becomes the baseline")
    accept = parser.parse_args().accept
    now = measured()
    then: Tables = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    if accept:
        merged = then | {isa: then.get(isa, {}) | rows for isa, rows in now.items()}
        BASELINE.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
        print(f"{sum(map(len, now.values()))} rows stored in {BASELINE.name}")
        return
    worse = 0
    for isa, rows in now.items():
        known = then.get(isa, {})
        for key, text in compared(rows, known).items():
            print(f"{key}: {text}")
        before = worse
        for script, medians in changes(rows, known).items():
            print(f"  {script}:")
            for name in slower(medians):
                print(f"  SLOWER {name}: {medians[name]:.2f} of the baseline's ratio")
                worse += 1
        print(f"{isa}: {len(rows.keys() & known.keys())} rows compared, {worse - before} slower")
    raise SystemExit(1 if worse else 0)


if __name__ == "__main__":
    main()

"""Compares what the benchmarks measured with the stored baseline: which ratios became worse.

Every row of ``results/<name>.json`` with a ``speed`` (times faster than the reference of the same round, with its 10 %
and 90 % quantiles) is compared with the row of ``baseline.json`` for the instruction set that was measured. Ratios,
unlike times, carry over between machines of one kind. A row is slower when even its upper quantile lies below the
baseline's lower one; then the exit code is 1.

    python benchmarks/compare.py [--accept]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from results import FOLDER

BASELINE = Path(__file__).parent / "baseline.json"
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
    slower = 0
    for isa, rows in now.items():
        known = then.get(isa, {})
        found = compared(rows, known)
        for key, text in found.items():
            print(f"{key}: {text}")
        worse = sum(text.startswith("slower") for text in found.values())
        print(f"{isa}: {len(rows.keys() & known.keys())} rows compared, {worse} slower")
        slower += worse
    raise SystemExit(1 if slower else 0)


if __name__ == "__main__":
    main()

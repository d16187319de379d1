"""Size limits that make one think: files of at most 300 lines (400 at the very most), functions of at most 40.

Prints what is over; exits 1 when a file is over 400 lines or a function over 60.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE, FILE_HARD, FUNCTION, FUNCTION_HARD = 300, 400, 40, 60


def functions(path: Path) -> list[tuple[str, int]]:
    """Name and code lines (docstring not counted) of every function in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines -= (first.end_lineno or first.lineno) - first.lineno + 1
            found.append((node.name, lines))
    return found


def main() -> int:
    failed = False
    sources = sorted(p for folder in ("src", "csrc", "benchmarks") for p in (ROOT / folder).rglob("*"))
    for path in (p for p in sources if p.suffix in (".py", ".cpp", ".h")):
        count = len(path.read_text().splitlines())
        if count > FILE:
            print(f"{path.relative_to(ROOT)}: {count} lines")
            failed |= count > FILE_HARD
        for name, lines in functions(path) if path.suffix == ".py" else []:
            if lines > FUNCTION:
                print(f"{path.relative_to(ROOT)}:{name}: {lines} lines")
                failed |= lines > FUNCTION_HARD
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""The table of rungs fits a terminal of 80 columns and leaves out what was not measured."""

from __future__ import annotations

import io

from rich.console import Console

from bitwright.search.journal import Trial
from bitwright.search.table import trials_table

TRIALS = (
    Trial("nearest", 0, False, 0.9, 0.031, 0.02, 0.04, 1200, 6_576, 0.1, 0.2),
    Trial("bias correction", 0, False, 0.91, 0.02, 0.0, 0.05, 4000, 12_246_576, 0.1, 31.2, note="not decided"),
    Trial("gptq", 0, False, failed="no layer that it knows", seconds=1.0),
    Trial("gptq, 3 of 8 layers at 8 bits", 3, True, 0.93, 0.0, bytes=8_000, error=0.1, seconds=2.0),
)


def test_every_trial_has_its_row() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(trials_table(TRIALS, "gptq, 3 of 8 layers at 8 bits"))
    lines = console.export_text().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    cells = [line.split() for line in lines]
    assert ["nearest", "0.9000", "+0.0310", "+0.0400", "1,200", "6,576", "0.2", "no"] in cells
    assert any(line[-1:] == ["open"] for line in cells)
    assert any(line[-5:] == ["0.9300", "+0.0000", "8,000", "2.0", "yes"] for line in cells)
    text = " ".join(" ".join(line) for line in cells)
    assert "no layer" in text
    assert "(best)" in text

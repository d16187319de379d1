"""`Outcome`: what the report says about one step at one path."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step did at a path: relative squared errors of the output before and after, or why it did nothing.

    ``note`` says what it left as it was.
    """

    step: str
    path: str
    before: float | None = None
    after: float | None = None
    skipped: str = ""
    note: str = ""

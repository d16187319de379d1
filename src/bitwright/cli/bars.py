"""Bars of long stages, one line each, with the time that is left; a pipe or a file gets their last state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.progress as rich
from rich.console import Console

Progress = Callable[[str, int, int], None]


@contextmanager
def bars(console: Console) -> Iterator[Progress]:
    """``progress(stage, done, total)`` while it lasts; other lines of ``console`` appear above the bars."""
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console) as shown:
        tasks: dict[str, rich.TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=total)
            shown.update(tasks[stage], completed=done, total=total)

        yield progress

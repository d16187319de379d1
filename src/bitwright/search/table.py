"""The table of rungs: what each trial gave and what it cost."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from bitwright.search.journal import Trial


def trials_table(trials: Sequence[Trial], best: str = "") -> Table:
    """One row per trial, in the order they were tried; the one named ``best`` is marked.

    "At most" is the upper bound of the drop, "holds" whether the drop is within the limit.
    """
    table = Table(title="The ladder", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("recipe")
    for name in ("score", "drop", "at most", "items", "bytes", "seconds", "holds"):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in trials:
        name = trial.name + (" (best)" if trial.name == best else "")
        if trial.failed:
            table.add_row(f"{name}: {trial.failed}", *[""] * 5, f"{trial.seconds:.1f}", "no")
            continue
        table.add_row(
            name,
            f"{trial.score:.4f}",
            f"{trial.drop:+.4f}",
            "" if trial.high is None else f"{trial.high:+.4f}",
            "" if trial.items is None else f"{trial.items:,}",
            f"{trial.bytes:,}",
            f"{trial.seconds:.1f}",
            "yes" if trial.holds else "open" if trial.note else "no",
        )
    return table

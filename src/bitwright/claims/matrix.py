"""`matrix`: one model in float, after training quantized at two widths, trained with quantization, and mixed.

Every row is made from the same float model and the same calibration data, scored on the same items, paired with the
float model, and timed in turn with all the others.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bitwright.bench.measure import Ratio, measure, model_bytes
from bitwright.bench.report import write_text
from bitwright.claims import matrix_page
from bitwright.claims.certify import equality
from bitwright.claims.contenders import Contenders, bit_operations
from bitwright.claims.paired import Paired, itself, paired
from bitwright.claims.scores import Score, scores_of
from bitwright.claims.splits import Inputs, digest_of_weights, first_entry, splits_of
from bitwright.errors import SearchError
from bitwright.flow.checkpoint import load, save
from bitwright.flow.convert import convert
from bitwright.flow.prepare import plan_of
from bitwright.plan.step import Step
from bitwright.search.mixed import one_item
from bitwright.search.mixed_trials import split
from bitwright.train.training import Training

VERSION, STATE, FLOAT = 2, "state.json", "FP32"


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """One version: its paired score, stored bytes, bit operations for one item, and seconds that making it took.

    ``equal`` says whether what was simulated and what is shipped return the same bits, ``speed`` is relative to float.
    """

    name: str
    score: Paired
    bytes: int
    bops: float
    equal: bool
    seconds: float
    speed: Ratio | None = None


@dataclass(frozen=True, slots=True)
class Matrix:
    """All rows, the first one in float, and sentences on how they were made."""

    model: str
    rows: tuple[MatrixRow, ...]
    notes: tuple[str, ...]

    def table(self) -> Table:
        """The rows for the terminal."""
        return matrix_page.to_table(self)

    def to_json(self) -> str:
        """Everything in it as JSON."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    def to_html(self) -> str:
        """One page with the table and a chart of drop against size, with nothing fetched from elsewhere."""
        return matrix_page.to_html(self)

    def save(self, folder: str | Path) -> None:
        """Write ``matrix.json`` and ``matrix.html``."""
        write_text(Path(folder) / "matrix.json", self.to_json())
        write_text(Path(folder) / "matrix.html", self.to_html())


def matrix(
    model: nn.Module,
    batches: Iterable[Any],
    score: Score,
    evaluation: Iterable[Any],
    *,
    training: Training | None = None,
    presets: tuple[str, str] = ("w8a8", "w4a8"),
    steps: Sequence[Step | str] = (),
    target: str = "cpu",
    inputs: Inputs = first_entry,
    score_range: tuple[float, float] | None = None,
    work: str | Path | None = None,
    rounds: int = 30,
    say: Callable[[str], None] = lambda text: None,
) -> Matrix:
    """FP32, both presets after training, the narrow one trained (with ``training``), and mixed bits of its size.

    ``batches`` are calibration inputs, ``score(model, batch) -> [items]`` is asked for every batch of ``evaluation``,
    which must hold no calibration or training item; ``inputs(batch)`` is what the model sees of such a batch. The last
    third of ``batches`` judges the plans of the mixed row: 4 at least.
    ``steps`` are what calibration does beside choosing ranges. With ``work`` every finished row is kept in that folder,
    and the same call goes on after the last one. ``rounds`` of alternating runs on the first batch of ``evaluation``
    give the speed; 0 leaves it out. Raises `CertificateError` for items in two splits and for scores that are NaN or
    change, `SearchError` for a folder of another matrix.
    """
    calibration, held = list(batches), list(evaluation)
    place, first = None if work is None else Path(work), inputs(held[0]) if held else None
    contenders = Contenders(model, calibration, presets, tuple(steps), target, training, score, place)
    contenders.check()
    kept = _Kept(place, _identity(contenders, held, inputs), model)
    before, item = scores_of(model, FLOAT, held, score), one_item(first)
    bops = bit_operations(model, None, item)
    rows = [MatrixRow(FLOAT, itself(before), model_bytes(model), bops, True, 0.0)]
    shipped = {FLOAT: model}
    for name, make in contenders.makers().items():
        if name not in kept.rows:
            kept.add(*_made(name, make, model, before, held, score, score_range, inputs))
        row, shipped[name] = kept.rows[name], kept.model(name)
        say(f"{name}: drop {row.score.drop:+.4f} [{row.score.low:+.4f}, {row.score.high:+.4f}], {row.bytes:,} bytes")
        rows.append(row)
    if rounds:
        speeds = {found.name: found.speed for found in measure(shipped, first, rounds=rounds)}
        rows = [replace(row, speed=speeds[row.name]) for row in rows]
    return Matrix(type(model).__name__, tuple(rows), _notes(contenders, len(before), first, rounds))


def _identity(made: Contenders, held: Sequence[Any], inputs: Inputs) -> dict[str, Any]:
    """What a stored matrix must have in common with this one; raises `CertificateError` for items in two splits."""
    seen: dict[str, Any] = {"calibration": made.inputs}
    if made.training is not None:
        seen |= {"training": made.training.batches, "validation": made.training.validation}
    return {
        "model": f"{type(made.model).__name__} {digest_of_weights(made.model)}",
        "data": {name: split.digest for name, split in splits_of(held, seen, inputs).items()},
        "presets": list(made.presets),
        "steps": [str(step) for step in made.steps],
        "target": made.target,
        "training": "none" if made.training is None else str(made.training.schedule),
    }


def _made(
    name: str,
    make: Callable[[], nn.Module],
    model: nn.Module,
    before: Tensor,
    held: Sequence[Any],
    score: Score,
    score_range: tuple[float, float] | None,
    inputs: Inputs,
) -> tuple[MatrixRow, nn.Module]:
    """A row and its shipped model; no other row changes its bits."""
    start, first = time.monotonic(), inputs(held[0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        simulated = make()
    shipped = convert(simulated)
    seconds = time.monotonic() - start
    after = scores_of(shipped, name, held, score)
    bops = bit_operations(model, plan_of(shipped), one_item(first))
    equal = equality(simulated, shipped, [first]).equal
    return MatrixRow(name, paired(before, after, score_range), model_bytes(shipped), bops, equal, seconds), shipped


def _notes(made: Contenders, items: int, first: Any, rounds: int) -> tuple[str, ...]:
    narrow, calibration = made.presets[1], sum(map(_count, made.inputs))
    judging = sum(map(_count, split(made.inputs)[1]))
    steps = ", ".join(str(step) for step in made.steps) or "nearest codes"
    notes = [
        f"{items:,} items, on which nothing was chosen; drops are paired with FP32, with 95 % intervals.",
        f"PTQ: {calibration:,} items to calibrate, {steps}. Mixed: weights of {narrow} at 2 to 8 bits within its "
        f"bytes, without training. {narrow} itself and plans by the harm of single weights (KL divergence of the "
        f"outputs) are calibrated on the other items; the one that does least harm as a whole on the last {judging:,} "
        "is calibrated on all.",
    ]
    if made.training is None:
        notes.append("No training was asked for, so there is no row for it.")
    else:
        how = made.training.schedule
        chosen = "the best state on other data is kept" if made.training.validation else "the last state is kept"
        notes.append(f"QAT: {narrow}, {how.steps:,} steps; {chosen}.")
    if rounds:
        notes.append(
            f"Speed: batches of {_count(first)}, {rounds} alternating rounds, {torch.get_num_threads()} threads, "
            "relative to FP32; median, 10 % to 90 % of the rounds."
        )
    return tuple(notes)


def _count(batch: Any) -> int:
    return len(first_entry(tuple(batch.values()) if isinstance(batch, dict) else batch))


class _Kept:
    """Finished rows and their models: in memory, and in a folder where one is given."""

    def __init__(self, folder: Path | None, identity: dict[str, Any], model: nn.Module) -> None:
        self.folder, self.identity, self.float_model = folder, identity, model
        self.rows: dict[str, MatrixRow] = {}
        self._models: dict[str, nn.Module] = {}
        if folder is None or not (folder / STATE).exists():
            return
        path = folder / STATE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            was = {"version": state["version"], **state["identity"]}
            rows = [MatrixRow(**{**entry, "score": Paired(**entry["score"])}) for entry in state["rows"]]
        except (OSError, ValueError, TypeError, KeyError) as cause:
            raise SearchError(f"{path} is damaged: {cause}; delete the folder") from cause
        for name, now in {"version": VERSION, **identity}.items():
            if was.get(name) != now:
                raise SearchError(
                    f"{path} was written with {name} {was.get(name)}; now it is {now}; repeat the call that started "
                    "it, or choose another folder"
                )
        self.rows = {row.name: row for row in rows}

    def add(self, row: MatrixRow, shipped: nn.Module) -> None:
        """Keep a finished row: first its model, then the state that names it."""
        self.rows[row.name], self._models[row.name] = row, shipped
        if self.folder is not None:
            save(shipped, self._place(row.name))
            state = {"version": VERSION, "identity": self.identity, "rows": list(map(asdict, self.rows.values()))}
            write_text(self.folder / STATE, json.dumps(state, indent=1))

    def model(self, name: str) -> nn.Module:
        """The shipped model of a row."""
        if name not in self._models:
            self._models[name] = load(self._place(name), self.float_model)
        return self._models[name]

    def _place(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / re.sub(r"[^a-z0-9]+", "-", name.lower())

"""`measure_machine`: how long each layer takes on this machine for each choice, in a file that can be continued.

Every distinct call (module, sizes, geometry, batch norm, shapes and strides of the arguments, specs) is timed once,
as it ships: alone, with the kernel that `kernels.table.select` takes, its own encoding of the input included. All
choices of a layer take turns, and its float form with them. Where the plan's target is ``onnxruntime``, layers and the
whole model are exported and run there.

Inside a model a layer finds its weights in the cache that they survived in until it runs again. A call is therefore
timed on copies of the layer that are used one after the other, as many as hold the bytes of the whole model's weights
(at most 64; beyond twice the last-level cache more of them change nothing): a small model's weights are found in a
cache, those of a large one come from memory. Inputs are warm, as the layer before has just written them.

Everything that is not a choice is the rest: the measured time of the whole model as the plan ships it, less the times
of its layers. A prediction for the plan itself is thus exact, and changes by what layers change.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.costs.choices import Specs, combinations, spread
from bitwright.costs.cost import Cost
from bitwright.costs.fingerprint import fingerprint
from bitwright.costs.runtimes import layer_runs, whole_run
from bitwright.costs.stopwatch import Timing, in_turns
from bitwright.costs.workload import Call, Load, Workload, bytes_read
from bitwright.costs.workload import Specs as Decided
from bitwright.errors import SearchError
from bitwright.flow.digest import digest
from bitwright.graph.dataflow import evaluating
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site
from bitwright.plan.target import spelled

VERSION = 1
_MOST_COPIES = 64
_CARE = 10.0  # how much longer the whole model is timed than a layer: its error is in every prediction
_IDLE = 0.8  # the share of the processor below which a machine is busy
_EXCESS = 1.25  # layers by themselves over the model that holds them, above which their sums are no prediction


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """By key (see `costs.workload`): seconds of a call, and what it does; the machine that they were measured on."""

    rows: Mapping[str, Timing] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=fingerprint)
    loads: Mapping[str, Load] = field(default_factory=dict)

    def prices(self, model: nn.Module, plan: Plan, example: Any, paths: Sequence[str]) -> MeasuredPrices:
        """What the layers at ``paths`` take by this table, and the rest of the model as ``plan`` ships it."""
        return MeasuredPrices(self, Workload(model, plan, example, paths))

    def save(self, path: str | Path) -> None:
        """Write the file (to a temporary name, flushed, renamed)."""
        path = Path(path)
        part, head = path.with_name(path.name + ".part"), {"version": VERSION, "machine": dict(self.machine)}
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(self._row(key))}" for key in self.rows)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("w", encoding="utf-8") as file:
                file.write(json.dumps(head)[:-1] + f', "rows": {{\n{lines}\n}}}}\n')
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as cause:
            raise SearchError(f"cannot write the latency table {path}: {cause}; name another cache folder") from cause

    def _row(self, key: str) -> dict[str, Any]:
        return asdict(self.rows[key]) | ({"load": asdict(self.loads[key])} if key in self.loads else {})

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read the file; raises `SearchError` for a damaged one and for one of another machine, naming what differs."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']}, expected {VERSION}")
            loads = {key: Load(**row.pop("load")) for key, row in data["rows"].items() if "load" in row}
            rows = {key: Timing(**row) for key, row in data["rows"].items()}
            if not all(row.seconds > 0 and math.isfinite(row.seconds + row.error) for row in rows.values()):
                raise ValueError("a time is no positive number")
            machine = dict(data["machine"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as cause:
            raise SearchError(f"cannot read latency table {path}: {cause}; delete the file to measure anew") from cause
        here = fingerprint()
        for name in here:
            if machine.get(name) != here[name]:
                raise SearchError(
                    f"latency table {path} was measured with {name} {machine.get(name, 'unknown')}; here it is "
                    f"{here[name]}; times of another machine say nothing here: run bitwright measure-machine"
                )
        return cls(rows, here, loads)


@dataclass(frozen=True, slots=True)
class MeasuredPrices:
    """Seconds of the layers of one model, looked up."""

    table: LatencyTable
    work: Workload

    def layer(self, path: str, specs: Decided) -> Cost:
        """Seconds of all calls of a layer; raises `SearchError` for one that was not measured."""
        return Cost(latency=math.fsum(self._seconds(path, specs, made) for made in self.work.calls[path]))

    def rest(self) -> Cost:
        """The measured time of the whole model, less that of the layers with choices as the plan ships them."""
        return self.less(self.layer)

    def less(self, layer: Callable[[str, Decided], Cost]) -> Cost:
        """The measured time of the whole model, less what ``layer`` says of every layer as the plan ships it.

        Warns where the layers by themselves take far more than the model.
        """
        layers = math.fsum(layer(path, self.work.decided(path)).latency for path in self.work.calls)
        whole = self.whole().seconds
        if layers > _EXCESS * whole:
            warnings.warn(
                f"the layers with choices take {1e3 * layers:.3g} ms one by one, the whole model {1e3 * whole:.3g} ms: "
                f"in {self.work.runtime} their sum says little about this model; time the chosen plan itself",
                stacklevel=4,
            )
        return Cost(latency=whole - layers)

    def whole(self) -> Timing:
        """The whole model as the plan ships it; raises `SearchError` where it was not measured."""
        found = self.table.rows.get(self.work.whole)
        if found is None:
            raise SearchError(f"the whole model was not measured with this plan and example; {_ADVICE}")
        return found

    def _seconds(self, path: str, specs: Decided, made: Call) -> float:
        found = self.table.rows.get(self.work.key(path, specs, made))
        if found is None:
            chosen = ", ".join(f"{slot} {spelled(spec)}" for slot, spec in specs.items())
            raise SearchError(f"{path} with {chosen} on {made} was not measured; {_ADVICE}")
        return found.seconds


_ADVICE = "call measure_machine (or run bitwright measure-machine) with this plan, example and these specs"


def table_path(cache: str | Path | None = None) -> Path:
    """The file of this machine's table, in ``cache`` or ``$XDG_CACHE_HOME/bitwright`` or ``~/.cache/bitwright``."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bitwright"
    return Path(cache or home) / f"latency-{digest(sorted(fingerprint().items()))}.json"


def measure_machine(
    model: nn.Module,
    plan: Plan,
    example: Any,
    specs: Specs,
    *,
    cache: str | Path | None = None,
    precision: float = 0.02,
    seconds: float = 1.0,
    on_row: Callable[[str, Timing, int, int], None] = lambda key, row, done, total: None,
) -> LatencyTable:
    """Time on this machine what `mixture` needs: layers that ``specs`` select, for each choice, and the whole model.

    ``model`` is the float model, ``specs`` maps patterns over the sites of ``plan`` to specs, as in `sensitivity`;
    ``float`` is one. The target of ``plan`` says what runs it, PyTorch or ONNX Runtime. A choice is timed until the
    standard error of its median is ``precision`` of it, or for ``seconds``; the whole model, on which every prediction
    rests, to a tenth of that ``precision`` and for ten times ``seconds`` at most. Rows of earlier calls, in the file of
    this machine in the folder ``cache``, are not timed again; new ones are written there layer by layer, so that the
    same call goes on after a kill. The number of threads is torch's. ``on_row(key, row, done, total)`` shows progress.
    Raises `SearchError` for a damaged table, and for sites that are no module of the shipped model; warns where other
    programs kept the processor busy.
    """
    path = table_path(cache)
    table = LatencyTable.load(path) if path.exists() else LatencyTable()
    sites = spread(plan, specs)
    work = Workload(model, plan, example, (site.path for site in sites))
    wanted = list(_wanted(work, model, sites))
    total = {work.whole}.union(*(rows for _, _, rows in wanted))

    def note(
        keys: Iterable[str],
        candidates: list[list[Callable[[], object]]],
        loads: Mapping[str, Load],
        care: float = 1.0,
    ) -> LatencyTable:
        rows = dict(zip(keys, in_turns(candidates, precision / care, seconds * care), strict=True))
        found = replace(table, rows={**table.rows, **rows}, loads={**table.loads, **loads})
        found.save(path)
        for done, (key, row) in enumerate(rows.items(), len(total & table.rows.keys()) + 1):
            on_row(key, row, done, len(total))
        return found

    with evaluating(work.shipped):
        if work.whole not in table.rows:
            run = whole_run(work.shipped, example, plan.target)
            table = note([work.whole], [[run]], {}, _CARE)
    for place, made, rows in wanted:
        todo = {key: own for key, own in rows.items() if key not in table.rows}
        if todo:
            loads = {key: work.load(place, own, made) for key, own in todo.items()}
            table = note(todo, copies_of(work, place, list(todo.values()), made), loads)
    _warn_if_busy(table, path)
    return table


def _wanted(
    work: Workload, model: nn.Module, sites: Mapping[Site, Sequence[str]]
) -> Iterator[tuple[str, Call, dict[str, Decided]]]:
    """Each call of each layer, and what is decided there in each of its rows: its choices, the plan's own, float."""
    for place, calls in work.calls.items():
        choices = [
            {site.slot: spec for site, spec in own.items()} for _, own in combinations(model, work.plan, place, sites)
        ]
        choices += [work.decided(place), dict.fromkeys(work.decided(place))]
        for made in calls:
            yield place, made, {work.key(place, own, made): own for own in choices}


def _warn_if_busy(table: LatencyTable, path: Path) -> None:
    share = min(row.share for row in table.rows.values())
    if share < _IDLE:
        warnings.warn(
            f"this process had the processor for {100 * share:.0f} % of the time while some rows were timed: other "
            f"programs ran; stop them, delete {path} and measure again",
            stacklevel=3,
        )


def copies_of(work: Workload, path: str, choices: list[Decided], made: Call) -> list[list[Callable[[], object]]]:
    """The calls of each choice, on as many copies of the layer as hold the bytes of the whole model's weights."""
    layers = [work.alone(path, own, made) for own in choices]
    count = min(max(1, -(-work.among // max(sum(map(bytes_read, layers)), 1))), _MOST_COPIES)
    return [layer_runs(layer, made.args, made.kwargs, work.plan.target, count) for layer in layers]

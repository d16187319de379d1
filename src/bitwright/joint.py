"""`mix_model`: harm, allocation, calibration, training, shipping of mixed precision in one call, each stage a file.

============== =============================================== ===========================================
in ``work``    what                                            made by
============== =============================================== ===========================================
harm.json      harm of every spec at every site                `sensitivity`
trials/        plans tried as wholes, what was measured        `mixed`
plan.toml      the best of them                                `mixed`
calibrated/    the simulated model of plan.toml                `calibrate`, from plan.toml
training/      the state of a run that can be continued        `train`, from calibrated/
trained/       the trained model                               `train`, from calibrated/
shipped/       the low-bit model                               `convert`, from trained/ or calibrated/
============== =============================================== ===========================================

What is there is taken, so the same call goes on after a kill and ends with the same bits. Files may be edited: delete
what was made from them, and it is made anew. ``state.json`` holds digests of what each file was made from; a file of
something else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.costs.choices import Specs
from bitwright.costs.prices import Pricing
from bitwright.errors import CheckpointError, SearchError, TrainingError
from bitwright.flow.checkpoint import PLAN, TENSORS, load, read_tensors, save
from bitwright.flow.convert import convert
from bitwright.flow.digest import digest
from bitwright.graph.dataflow import call, evaluating
from bitwright.harm.sensitivity import MEASURED, Harm, Loss, sensitivity
from bitwright.plan.plan import Plan, read_spec
from bitwright.plan.site import matching
from bitwright.plan.target import spelled
from bitwright.search.budget import Budget
from bitwright.search.journal import Journal
from bitwright.search.mixed import choices_of, mixture, one_item
from bitwright.search.mixed_trials import calibrated, mixed, split
from bitwright.search.tried import Mixed
from bitwright.search.whole import Score
from bitwright.train.history import History
from bitwright.train.loop import train
from bitwright.train.training import Training

HARM, TRIALS, CHOSEN, CALIBRATED, RUN, TRAINED, SHIPPED = (
    "harm.json", "trials", "plan.toml", "calibrated", "training", "trained", "shipped",
)  # fmt: skip
LATER = (CHOSEN, CALIBRATED, RUN, TRAINED, SHIPPED)


@dataclass(frozen=True, slots=True)
class Mix:
    """The shipped model, its plan, what was tried, and what training did.

    ``trials`` is None where ``plan.toml`` was edited, ``history`` where nothing was trained in this call.
    """

    model: nn.Module
    plan: Plan
    trials: Mixed | None
    history: History | None
    folder: Path


def mix_model(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    budget: Budget,
    *,
    work: str | Path,
    judge: Sequence[Any] | None = None,
    score: Score | None = None,
    score_range: tuple[float, float] = (0.0, 1.0),
    minimize: str | None = None,
    specs: Specs | None = None,
    method: str = "kl",
    loss: Loss | None = None,
    latency: Pricing | None = None,
    training: Training | None = None,
    example: Any = None,
    forward: Callable[[nn.Module, Any], Any] = call,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Mix:
    """The best model within ``budget`` whose bits differ by layer: measured, tried, calibrated, trained, shipped.

    ``batches`` measure harm and calibrate; ``judge`` holds other ones that plans are judged by as wholes, by default
    the last third of ``batches``. What ``budget.drop`` limits, ``score``, ``score_range`` and ``minimize`` are those of
    `mixed`, ``method`` (``kl`` or ``loss``) and ``loss`` those of `sensitivity`, ``latency`` that of `mixture`, priced
    for one forward on ``example`` (default: the first item of ``batches``). ``specs`` are the choices by patterns over
    sites, by default every integer weight of ``plan`` at 2 to 8 bits. With ``training`` the calibrated model is
    trained; its validation data choose the best state by ``score``, or by its loss where there is none. ``work`` is the
    folder of all stages; each of them starts from the same random state of torch. ``say`` gets what was found, line by
    line, ``progress(stage, done, total)`` how far the two long stages are, ``harm`` and ``training``.

    Raises `SearchError` for a budget that nothing meets and for too little data, `TrainingError` for a loss that is no
    finite scalar, `CheckpointError` for a folder of another call, and for files that were made from what has changed
    since, with the names of those to delete.
    """
    if judge is None and score is not None:
        raise SearchError("score(model, batch) needs judge=batches of what it takes, kept apart from calibration")
    inputs, held = split(batches) if judge is None else (list(batches), list(judge))
    if method not in MEASURED:
        raise SearchError(f"mix_model measures harm by {' or '.join(MEASURED)}, got {method!r}; use proxies by stages")
    specs = choices_of(plan) if specs is None else specs
    _check_specs(plan, specs)
    if training is not None:
        _check_loss(model, training)
    stages = _Stages(Path(work), _identity(model, plan, inputs, method), say, progress)

    def measured(row: Harm, done: int, total: int) -> None:
        say(f"harm: {row.site} as {row.spec}: {row.harm:.3g} +- {row.error:.1g}")
        progress("harm", done, total)

    def search() -> Mixed:
        harm = sensitivity(
            model, plan, inputs, specs, method=method, loss=loss, forward=forward, work=stages.folder / HARM,
            on_row=measured,
        )  # fmt: skip
        item = one_item(inputs[0]) if example is None else example
        return mixed(
            model, plan, inputs, mixture(model, plan, item, harm, latency=latency), budget, judge=held, method=method,
            loss=loss, score=score, score_range=score_range, minimize=minimize, forward=forward,
            work=stages.folder / TRIALS, say=lambda one: say(f"tried: {one}"),
        )  # fmt: skip

    chosen, trials = stages.chosen(search)

    def start(path: Path) -> None:
        save(calibrated(model, chosen, inputs, forward) if trials is None else trials.model, path)

    last, history = stages.made(CALIBRATED, {CHOSEN: digest(chosen.to_toml())}, start), None
    if training is not None:
        last, history = _trained(stages, model, last, training, score)
    shipped = stages.made(SHIPPED, {last.name: _content(last)}, lambda path: _ship(model, last, path))
    return Mix(load(shipped, model).eval(), chosen, trials, history, stages.folder)


def _check_specs(plan: Plan, specs: Specs) -> None:
    """The plan itself is among those tried, so its own specs are choices."""
    found = {
        site: [spelled(read_spec(t)) for t in texts] for p, texts in specs.items() for site in matching(p, plan.sites)
    }
    for site, texts in found.items():
        own = spelled(plan.sites[site])
        if own not in texts:
            raise SearchError(
                f"{site} is {own} in the plan, and its choices are {', '.join(texts)}; add {own}, choose patterns "
                "that leave the site out, or give it one of the choices in the plan"
            )


def _check_loss(model: nn.Module, training: Training) -> None:
    """Raise now what would end the last stage."""
    if not isinstance(training.batches, Sequence) or not len(training.batches):
        return
    with torch.no_grad(), evaluating(model):
        found = training.loss(model, training.batches[0])
    if isinstance(found, Tensor) and found.numel() == 1:
        if not bool(found.isfinite()):
            raise TrainingError(f"training.loss(model, batch) of the float model is {found.item()} on the first batch")
        return
    what = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise TrainingError(f"training.loss(model, batch) must return a scalar tensor, got {what}")


def _identity(model: nn.Module, plan: Plan, inputs: Sequence[Any], method: str) -> dict[str, Any]:
    """What a stored call must have in common with this one; its trials know their own judge and budget."""
    return {
        "model": f"{type(model).__name__} {digest(model.state_dict())}",
        "plan": plan.to_toml().splitlines(),
        "calibration data": f"{len(inputs)} batches {digest(inputs)}",
        "method": method,
    }


def _trained(
    stages: _Stages, model: nn.Module, start: Path, how: Training, score: Score | None
) -> tuple[Path, History | None]:
    """The folder of the trained model; with the history of the run, if there was one."""
    histories, every = [], max(1, how.schedule.steps // 10)

    def judged(candidate: nn.Module) -> Tensor:
        with torch.no_grad(), evaluating(candidate):
            if score is None:
                return torch.stack([-how.loss(candidate, batch).double() for batch in how.validation])
            return torch.cat([score(candidate, batch).double() for batch in how.validation])

    def told(step: int, value: float) -> None:
        stages.progress("training", step + 1, how.schedule.steps)
        if (step + 1) % every == 0:
            stages.say(f"training: step {step + 1} of {how.schedule.steps}, loss {value:.4g}")

    def make(path: Path) -> None:
        prepared, best = load(start, model), judged if how.validation else None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            run = stages.folder / RUN
            made = train(
                prepared, how.loss, how.batches, schedule=how.schedule, score=best, checkpoint=run, on_step=told
            )
        save(prepared, path)
        histories.append(made)

    sources = {
        start.name: _content(start),
        "schedule": str(how.schedule),
        "training data": digest(how.batches),
        "validation data": digest(how.validation),
    }
    return stages.made(TRAINED, sources, make, beside=RUN), histories[0] if histories else None


def _ship(model: nn.Module, source: Path, path: Path) -> None:
    save(convert(load(source, model), inplace=True), path)


def _content(folder: Path) -> str:
    """Digest of a saved model: its tensors and its plan."""
    tensors, _ = read_tensors(folder / TENSORS)
    return digest([Plan.load(folder / PLAN).to_toml(), *(tensors[name] for name in sorted(tensors))])


@dataclass(frozen=True, slots=True)
class Stage:
    """What the file of a stage was made from: digests by name; for the chosen plan, its own."""

    name: str
    sources: dict[str, str]


class _Stages:
    """The files of a work folder, each with a note of what it was made from, written before the file is."""

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        say: Callable[[str], None],
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.folder, self.say, self.progress = folder, say, progress
        self.journal = Journal(folder, identity, Stage)

    def chosen(self, search: Callable[[], Mixed]) -> tuple[Plan, Mixed | None]:
        """The plan file: as it was edited, or the answer of the search."""
        path, note = self.folder / CHOSEN, self.journal.trials.get(CHOSEN)
        text = path.read_text(encoding="utf-8") if path.exists() else None
        if text is not None and (note is None or note.sources != {CHOSEN: digest(text)}):
            self.say(f"{path} was edited: it is taken as it is, without trials")
            return Plan.load(path), None
        found = search()
        if text is None:
            self.journal.add(Stage(CHOSEN, {CHOSEN: digest(found.best.plan.to_toml())}))
            found.best.plan.save(path)
        elif text != found.best.plan.to_toml():
            raise CheckpointError(self._stale(CHOSEN, "harm or another budget"))
        return found.best.plan, found

    def made(
        self, name: str, sources: dict[str, str], make: Callable[[Path], None], *, beside: str | None = None
    ) -> Path:
        """The file of a stage, made now unless it is there; ``beside`` is where it is half made."""
        path, note = self.folder / name, self.journal.trials.get(name)
        if path.exists() or (beside is not None and (self.folder / beside).exists()):
            was = {} if note is None else note.sources
            changed = [key for key in (*sources, *was) if was.get(key) != sources.get(key)]
            if changed:
                raise CheckpointError(self._stale(name, changed[0]))
        else:
            self.journal.add(Stage(name, sources))
        if not path.exists():
            make(path)
            self.say(f"wrote {path}")
        return path

    def _stale(self, name: str, source: str) -> str:
        later = LATER[LATER.index(RUN if name == TRAINED else name) :]
        there = ", ".join(str(self.folder / one) for one in later if (self.folder / one).exists())
        return (
            f"{self.folder / name} was made from another {source}; to make it anew from what is there, delete {there}"
        )

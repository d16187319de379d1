"""The matrix: rows as promised, resumed row by row, shown in a table and on a page."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import check_page
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.bench.measure import model_bytes
from bitwright.claims.contenders import bit_operations
from bitwright.claims.matrix import Matrix
from bitwright.claims.matrix_page import _apart
from bitwright.costs.cost import plan_bytes
from bitwright.errors import CertificateError, SearchError
from bitwright.search.mixed import choices_of
from ladders import data, labelled, made, right

CALIBRATION = data(4, size=32)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def training(model: nn.Module, steps: int = 6) -> bw.Training:
    return bw.Training(loss, labelled(model, 3, seed=5), bw.Schedule(steps=steps, lr=0.1), labelled(model, 1, seed=6))


def compared(model: nn.Module, **changes: Any) -> Matrix:
    given = {"training": training(model), "presets": ("w8a8", "w4a8"), "rounds": 0}
    return bw.matrix(model, CALIBRATION, right, labelled(model, 5), **(given | changes))


@pytest.fixture(scope="module")
def found() -> Matrix:
    return compared(made(), rounds=2)


def test_rows_are_float_wide_narrow_trained_and_mixed(found: Matrix) -> None:
    model = made()
    assert [row.name for row in found.rows] == ["FP32", "PTQ w8a8", "PTQ w4a8", "QAT w4a8", "mixed w4a8"]
    sizes = [row.bytes for row in found.rows]
    narrow = bw.Plan.preset("w4a8", model, CALIBRATION[0])
    assert sizes[0] == model_bytes(model)
    assert sizes[2] == sizes[3] == plan_bytes(model, narrow) >= sizes[4]
    assert sizes[0] > sizes[1] > sizes[2]
    assert all(row.equal for row in found.rows)
    assert found.rows[0].score.drop == 0
    assert found.rows[1].score.drop < 0.05
    assert all(row.score.items == 500 for row in found.rows)
    assert all(row.speed is not None for row in found.rows)
    assert any("6 steps; the best state" in note for note in found.notes)


def test_bit_operations_are_those_of_the_plan(found: Matrix) -> None:
    model = made()
    macs = sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear))
    last = model[-1].weight.numel()
    assert found.rows[0].bops == macs * 32 * 32
    assert found.rows[1].bops == (macs - last) * 8 * 8 + last * 32 * 32
    plan = bw.Plan.preset("w8a8", model, CALIBRATION[0])
    assert bit_operations(model, plan, CALIBRATION[0][:1]) == found.rows[1].bops


def test_json_holds_every_row(found: Matrix, tmp_path: Path) -> None:
    found.save(tmp_path)
    read = json.loads((tmp_path / "matrix.json").read_text())
    assert [row["name"] for row in read["rows"]] == [row.name for row in found.rows]
    assert read["rows"][2]["score"]["drop"] == found.rows[2].score.drop
    assert (tmp_path / "matrix.html").read_text() == found.to_html()


def test_table_and_page_show_every_row(found: Matrix) -> None:
    found = replace(found, model="A<b>")
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found.table())
    text, page = console.export_text(), found.to_html()
    check_page(page)
    assert "A&lt;b&gt;" in page
    assert "A<b>" not in page
    assert page.count("<circle") == len(found.rows) == 5
    for row in found.rows:
        assert f"{row.bytes:,}" in text
        assert f">{row.name}</text>" in page


@pytest.mark.slow
def test_a_stopped_matrix_goes_on_after_its_last_row(tmp_path: Path) -> None:
    model, told = made(), []

    def stop(text: str) -> None:
        told.append(text)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compared(model, work=tmp_path, say=stop)
    state = json.loads((tmp_path / "state.json").read_text())
    assert [row["name"] for row in state["rows"]] == ["PTQ w8a8", "PTQ w4a8"]
    whole, fresh = compared(model, work=tmp_path), compared(model)
    assert [row.seconds for row in whole.rows[1:3]] == [row["seconds"] for row in state["rows"]]
    assert [(r.name, r.score, r.bytes, r.equal) for r in whole.rows] == [
        (r.name, r.score, r.bytes, r.equal) for r in fresh.rows
    ]
    assert (tmp_path / "qat-w4a8" / "plan.toml").exists()


def test_a_folder_of_another_matrix_is_refused(tmp_path: Path) -> None:
    model = made()
    assert "No training was asked for" in compared(model, work=tmp_path, training=None).to_html()
    for changes, what in (({"presets": ("w8a8", "w4a4")}, "presets"), ({"training": training(model)}, "data")):
        with pytest.raises(SearchError, match=f"was written with {what}"):
            compared(model, work=tmp_path, **({"training": None} | changes))
    with pytest.raises(SearchError, match="was written with model"):
        compared(made(3), work=tmp_path, training=None)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(SearchError, match="is damaged"):
        compared(model, work=tmp_path, training=None)


def test_the_mixed_row_is_the_best_of_plans_that_were_judged_apart(tmp_path: Path) -> None:
    found = compared(made(), work=tmp_path, training=None)
    state = json.loads((tmp_path / "trials" / "state.json").read_text())
    drops = {trial["name"]: trial["drop"] for trial in state["trials"]}
    assert len(drops) > 2
    assert drops[state["best"]] <= drops["as planned"]
    [best] = [path for path in (tmp_path / "trials").iterdir() if path.is_dir()]
    shipped = [bw.Plan.load(folder / "plan.toml").sites for folder in (best, tmp_path / "mixed-w4a8")]
    assert shipped[0] == shipped[1]
    assert state["identity"]["calibration data"].startswith("2 batches")
    assert any("on the last 64" in note for note in found.notes)


def test_scored_items_must_be_new() -> None:
    model = made()
    with pytest.raises(CertificateError, match="are in 'training' too"):
        bw.matrix(
            model, CALIBRATION, right, labelled(model, 2), rounds=0,
            training=bw.Training(loss, labelled(model, 1), bw.Schedule(steps=1)),
        )  # fmt: skip


def test_presets_without_integer_weights_have_no_mixed_row() -> None:
    model = made()
    with pytest.raises(SearchError, match="integer specs"):
        choices_of(bw.Plan.preset("fp16", model, CALIBRATION[0]))
    told: list[str] = []
    with pytest.raises(SearchError, match="integer specs"):
        compared(model, presets=("w8a8", "fp16"), training=None, say=told.append)
    with pytest.raises(SearchError, match="at least 4 calibration batches, got 3"):
        bw.matrix(model, CALIBRATION[:3], right, labelled(model, 5), say=told.append)
    assert told == []  # before anything takes time


def test_choices_keep_granularity_and_skip_float() -> None:
    plan = bw.Plan.preset("w4a16", made(), CALIBRATION[0], sites={"2.weight": "int4/group16"})
    choices = choices_of(plan)
    assert choices["2.weight"] == [f"int{bits}/group16" for bits in (2, 3, 4, 5, 6, 8)]
    assert "8.weight" not in choices


def test_labels_never_lie_on_each_other() -> None:
    heights = _apart(torch.linspace(10, 40, 9).tolist(), 17)
    gaps = torch.tensor(sorted(heights)).diff()
    assert bool((gaps >= 17 - 1e-4).all())

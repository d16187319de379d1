"""Certificates: what they say, what they refuse, and that no value in them can be changed unseen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import check_page
from torch import Tensor, nn

import bitwright as bw
from bitwright.bench.measure import model_bytes
from bitwright.claims.certificate import Certificate, _digest
from bitwright.claims.paired import paired
from bitwright.errors import CertificateError
from bitwright.flow.coverage import coverage
from ladders import data, labelled, made, right

CALIBRATION = data()
SITE = "2.weight"


def simulated_of(model: nn.Module, preset: str = "w8a8") -> nn.Module:
    plan = bw.Plan.preset(preset, model, CALIBRATION[0], observers={"weight": "minmax", "input": "minmax"})
    prepared = bw.prepare(model, plan)
    bw.calibrate(prepared, CALIBRATION)
    return prepared.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made()


@pytest.fixture(scope="module")
def items(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return labelled(model, 10)


@pytest.fixture(scope="module")
def simulated(model: nn.Module) -> nn.Module:
    return simulated_of(model)


@pytest.fixture(scope="module")
def shipped(simulated: nn.Module) -> nn.Module:
    return bw.convert(simulated)


@pytest.fixture(scope="module")
def issued(model: nn.Module, simulated: nn.Module, shipped: nn.Module, items: Any) -> Certificate:
    specs = {"[024].weight": ["int8/channel", "int4/channel"]}
    harm = bw.sensitivity(model, shipped.bitwright_plan, CALIBRATION, specs)
    return bw.certify(
        model, shipped, items, right, max_drop=0.1, seen={"calibration": CALIBRATION, "<b>search</b>": data(2, 7)},
        simulated=simulated, sensitivity=harm, rounds=2,
    )  # fmt: skip


def test_it_says_what_was_measured(issued: Certificate, model: nn.Module, shipped: nn.Module, items: Any) -> None:
    before, after = (torch.cat([right(m, batch) for batch in items]) for m in (model, shipped))
    assert issued.score == paired(before, after)
    assert issued.claim.holds
    assert issued.equality is not None
    assert (issued.equality.equal, issued.equality.items) == (True, 1000)
    assert issued.size.shipped == model_bytes(shipped) == sum(row.bytes for row in coverage(shipped))
    assert issued.size.original == model_bytes(model)
    assert issued.latency is not None
    assert issued.latency.low <= issued.latency.ratio <= issued.latency.high
    assert [split.items for split in issued.splits.values()] == [1000, 256, 128]
    assert {kept.path for kept in issued.kept_float} >= {"8.weight", "8.bias"}
    assert issued.size.kept_float == sum(kept.bytes for kept in issued.kept_float)


def test_bytes_of_the_file_are_those_of_the_file(issued: Certificate, shipped: nn.Module, tmp_path: Path) -> None:
    bw.save(shipped, tmp_path / "shipped")
    assert issued.size.file == (tmp_path / "shipped" / "model.safetensors").stat().st_size


def test_every_site_has_its_spec_its_reason_and_the_rank_of_its_harm(issued: Certificate, shipped: nn.Module) -> None:
    plan = shipped.bitwright_plan
    assert [record.site for record in issued.sites] == [str(site) for site in plan.sites]
    measured = [record for record in issued.sites if record.harm is not None]
    assert [record.site for record in measured] == ["0.weight", "2.weight", "4.weight"]
    assert sorted(measured, key=lambda r: -r.harm) == sorted(measured, key=lambda r: r.rank)
    assert {record.rank for record in measured} == {1, 2, 3}
    assert {record.why for record in measured} == {"preset w8a8"}
    assert "classifier stays in float" in next(r.why for r in issued.sites if r.site == "8.weight")


def test_a_file_comes_back_as_it_was(issued: Certificate, tmp_path: Path) -> None:
    issued.save(tmp_path / "certificate.json")
    assert Certificate.load(tmp_path / "certificate.json") == issued
    assert [entry.name for entry in tmp_path.iterdir()] == ["certificate.json"]
    with pytest.raises(CertificateError, match="cannot write"):
        issued.save(tmp_path / "certificate.json" / "below")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not isinstance(value, (dict, list)) or not value:
        yield path
    for key, entry in inner:
        yield from leaves(entry, (*path, key))


def changed(value: Any) -> Any:
    """Another value of the same kind, as near as there is."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return float(torch.nextafter(torch.tensor(value, dtype=torch.float64), torch.tensor(9e9).double()))
    return value[:-1] + "~" if isinstance(value, str) else 0


def test_no_value_can_be_changed_unseen(issued: Certificate) -> None:
    text = issued.to_json()
    paths = list(leaves(json.loads(text)))
    assert len(paths) > 100
    for *path, last in paths:
        content = json.loads(text)
        place = content
        for key in path:
            place = place[key]
        place[last] = changed(place[last])
        with pytest.raises(CertificateError, match=r"was edited after it was issued|no digest"):
            Certificate.from_json(json.dumps(content))


def test_layout_may_change_and_nothing_else(issued: Certificate) -> None:
    content = json.loads(issued.to_json())
    assert Certificate.from_json(json.dumps(dict(reversed(content.items())))) == issued
    for key in ("claim", "splits", "sites"):
        less = {name: value for name, value in content.items() if name != key}
        with pytest.raises(CertificateError, match="edited"):
            Certificate.from_json(json.dumps(less))
    with pytest.raises(CertificateError, match="edited"):
        Certificate.from_json(json.dumps(content | {"extra": 1}))
    with pytest.raises(CertificateError, match="appears twice"):
        Certificate.from_json('{"target": "x",' + issued.to_json().lstrip()[1:])
    with pytest.raises(CertificateError, match="NaN is no number"):
        Certificate.from_json(issued.to_json().replace('"drop": 0.0', '"drop": NaN').replace("null", "NaN"))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"digest": 1}', "[" * 100_000])
def test_what_is_no_certificate_is_said(text: str) -> None:
    with pytest.raises(CertificateError, match=r"no certificate|no JSON"):
        Certificate.from_json(text)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema",), 99, "schema 99"),
        (("score", "drop"), "0", "certificate.score.drop is '0'"),
        (("claim",), {"max_drop": 1.0}, "certificate.claim is"),
        (("sites",), [{"site": 1}], r"certificate.sites\[0\] is"),
        (("splits", "test", "items"), True, "certificate.splits.test.items is 'True'"),
    ],
)
def test_values_of_another_kind_under_a_good_digest_are_named(
    issued: Certificate, path: tuple[str, ...], value: Any, message: str
) -> None:
    content = json.loads(issued.to_json())
    del content["digest"]
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(CertificateError, match=message):
        Certificate.from_json(json.dumps(content | {"digest": _digest(content)}))


def test_items_seen_before_are_refused(model: nn.Module, shipped: nn.Module, items: Any) -> None:
    with pytest.raises(CertificateError, match=r"100 of 1,000 test items are in 'search' too \(numbers 300, 301"):
        bw.certify(model, shipped, items, right, seen={"search": [items[3]]})


def test_too_few_items_say_how_many_it_takes(model: nn.Module, shipped: nn.Module, items: Any) -> None:
    with pytest.raises(CertificateError, match=r"shown with 100 items.*About [\d,]+ such items would show it"):
        bw.certify(model, shipped, items[:1], right, max_drop=0.01)


def test_a_claim_that_no_number_of_items_shows_is_issued_as_not_holding(model: nn.Module, items: Any) -> None:
    bad = bw.convert(simulated_of(model, "w4a4"))
    issued = bw.certify(model, bad, items, right, max_drop=0.001)
    assert issued.claim.holds is False
    assert issued.score.drop > 0.001
    assert "does not hold" in issued.to_html()


def test_nan_is_refused_with_the_number_of_the_item(model: nn.Module, shipped: nn.Module, items: Any) -> None:
    def score(net: nn.Module, batch: Any) -> Tensor:
        found = right(net, batch)
        found[17] = float("nan") if batch is items[2] and net is shipped else 0.0
        return found

    with pytest.raises(CertificateError, match="score of item 217 of shipped is NaN"):
        bw.certify(model, shipped, items, score)


def test_an_infinite_score_is_refused(model: nn.Module, shipped: nn.Module, items: Any) -> None:
    with pytest.raises(CertificateError, match="item 0 of the float model is inf"):
        bw.certify(model, shipped, items, lambda net, batch: right(net, batch) / 0)


def test_a_score_that_changes_is_refused(model: nn.Module, shipped: nn.Module, items: Any) -> None:
    with pytest.raises(CertificateError, match="two answers for the float model"):
        bw.certify(model, shipped, items, lambda net, batch: right(net, batch) * torch.rand(100))


@pytest.mark.parametrize("score", [lambda m, b: 0.5, lambda m, b: m(b[0]), lambda m, b: right(m, b)[:10]])
def test_a_score_has_one_number_per_item(model: nn.Module, shipped: nn.Module, items: Any, score: Any) -> None:
    with pytest.raises(CertificateError, match=r"one (score )?per item"):
        bw.certify(model, shipped, items, score)


def test_a_limit_is_a_number(model: nn.Module, shipped: nn.Module, items: Any) -> None:
    with pytest.raises(CertificateError, match="got nan"):
        bw.certify(model, shipped, items, right, max_drop=float("nan"))


def test_only_converted_models_are_certified(model: nn.Module, simulated: nn.Module, items: Any) -> None:
    with pytest.raises(CertificateError, match="converted"):
        bw.certify(model, simulated, items, right)


def test_models_that_differ_name_the_first_layer(model: nn.Module, shipped: nn.Module, items: Any) -> None:
    other = simulated_of(model)
    with torch.no_grad():
        other[4].weight[0] *= 1.5
    issued = bw.certify(model, shipped, items, right, simulated=other)
    assert issued.equality is not None
    assert (issued.equality.equal, issued.equality.layer) == (False, "4")


def test_an_exported_file_is_compared(model: nn.Module, shipped: nn.Module, items: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    bw.export(shipped, path, items[0][0])
    issued = bw.certify(model, shipped, items, right, onnx=path)
    assert issued.exported is not None
    assert issued.exported.same_answers > 0.98
    assert issued.exported.bytes == path.stat().st_size
    assert "in ONNX Runtime" in issued.to_html()


def test_the_page_says_everything_and_escapes_names(issued: Certificate) -> None:
    page = issued.to_html()
    check_page(page)
    assert "less than 10 points, with 95% confidence" in page
    assert "equal, bit for bit" in page
    assert f"{issued.size.shipped:,} bytes" in page
    assert "&lt;b&gt;search&lt;/b&gt;" in page
    assert "<b>search" not in page
    assert "No test item is in one of the other splits." in page
    assert issued.digest in page
    assert all(record.site in page for record in issued.sites)
    assert "classifier stays in float" in page


def test_a_page_without_claim_and_comparisons(model: nn.Module, shipped: nn.Module, items: Any) -> None:
    page = bw.certify(model, shipped, items, right).to_html()
    check_page(page)
    assert "No limit was claimed" in page
    assert "was not checked" in page
    assert "not measured" in page

import json

import pytest

from test_cli import folder, ok, run  # noqa: F401

DATA = ("--test", "mymodel:evaluation", "--score", "mymodel:right", "--seen", "calibration=mymodel:batches")


@pytest.fixture(scope="module")
def shipped(folder):  # noqa: F811
    """A calibrated and a converted model beside the user's code, made once."""
    return {}


@pytest.fixture
def line(folder, ok, shipped):  # noqa: F811
    if not shipped:
        data = ("--data", "mymodel:batches")
        ok("plan", "mymodel:build", *data, "-o", "claims.toml")
        ok("calibrate", "mymodel:build", *data, "--plan", "claims.toml", "-o", "claims-work")
        ok("convert", "mymodel:build", "claims-work", "-o", "claims-shipped")
        ok("plan", "mymodel:build", *data, "--preset", "w4a4", "-o", "other.toml")
        ok("calibrate", "mymodel:build", *data, "--plan", "other.toml", "-o", "other-work")
        ok("convert", "mymodel:build", "other-work", "-o", "other-shipped")
        shipped["made"] = True
    return folder


def certify(ok, *options):  # noqa: F811
    return ok("certify", "mymodel:build", "claims-shipped", *DATA, *options, "-o", "certificate.json")


def test_certify_writes_the_file_and_the_page_and_verify_agrees(line, ok):  # noqa: F811
    told = certify(ok, "--max-drop", "0.2", "--simulated", "claims-work", "--rounds", "1")
    assert "on 800 items" in told
    assert "<svg" in (line / "certificate.html").read_text()
    told = ok("verify", "certificate.json", "mymodel:build", "claims-shipped", *DATA, "--simulated", "claims-work")
    assert "shipped weights" in told
    assert "no longer holds" not in told
    assert "not checked" in ok("verify", "certificate.json")


def test_verify_exits_1_where_something_no_longer_holds(line, ok, run):  # noqa: F811
    certify(ok)
    code, out, _ = run("verify", "certificate.json", "mymodel:build", "other-shipped", *DATA)
    assert code == 1
    assert "no longer holds" in " ".join(out.split())


def test_verify_exits_2_for_an_edited_certificate(line, ok, run):  # noqa: F811
    certify(ok)
    content = json.loads((line / "certificate.json").read_text())
    content["score"]["drop"] = -1.0
    (line / "edited.json").write_text(json.dumps(content))
    code, _, err = run("verify", "edited.json", "mymodel:build", "claims-shipped", *DATA)
    assert code == 2
    assert "it was edited after it was issued" in " ".join(err.split())


def test_a_claim_that_does_not_hold_exits_1(line, run):  # noqa: F811
    code, out, _ = run("certify", "mymodel:build", "other-shipped", *DATA, "--max-drop", "0.001", "-o", "not-held.json")
    assert code == 1
    assert "does not hold" in out
    assert (line / "not-held.json").exists()


def test_matrix_prints_the_rows_and_goes_on_where_it_was(line, ok):  # noqa: F811
    arguments = (
        "matrix", "mymodel:build", "--data", "mymodel:batches", "--score", "mymodel:right", "--evaluation",
        "mymodel:evaluation", "--training", "mymodel:train_batches", "--loss", "mymodel:loss", "--steps", "4",
        "--rounds", "1", "--work", "matrix-work", "-o", "matrix",
    )  # fmt: skip
    told = ok(*arguments)
    assert "QAT w4a8" in told
    assert "mixed" in told
    assert (line / "matrix" / "matrix.html").exists()
    first = json.loads((line / "matrix" / "matrix.json").read_text())
    ok(*arguments)
    again = json.loads((line / "matrix" / "matrix.json").read_text())
    assert [row["seconds"] for row in again["rows"]] == [row["seconds"] for row in first["rows"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "missing.json"), "missing.json"),
        (("verify", "missing.json", "--simulated", "x"), "needs the float model"),
        (("certify", "mymodel:build", "claims-work", *DATA, "-o", "x.json"), "simulated model"),
        (("certify", "mymodel:build", "claims-shipped", *DATA, "--max-drop", "0.015", "-o", "x.json"), "such items"),
        (("certify", "mymodel:build", "claims-shipped", *DATA, "--seen", "x", "-o", "x.json"), "--seen takes NAME="),
        (
            ("certify", "mymodel:build", "claims-shipped", *DATA, "--seen", "s=mymodel:evaluation", "-o", "x.json"),
            "are in 's' too",
        ),
        (
            ("matrix", "mymodel:build", "--data", "mymodel:batches", "--score", "mymodel:right", "--evaluation",
             "mymodel:evaluation", "--loss", "mymodel:loss"),
            "needs both --training and --loss",
        ),
    ],
)  # fmt: skip
def test_bad_input_exits_2(line, run, arguments, message):  # noqa: F811
    code, _, err = run(*arguments)
    assert code == 2
    assert message in " ".join(err.split())

import copy
import csv
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import jsonschema
import pytest

from codegen.report import layers_csv
from codegen.report.build import (
    BinaryCheck,
    BudgetLine,
    DataRow,
    Iteration,
    Layer,
    Network,
    NoteRow,
    OutputError,
    Report,
    Solver,
    Verification,
    schema,
    to_json,
    validate,
)
from codegen.report.console import ConsoleEvents, print_inspection, print_report
from codegen.report.html import to_html
from codegen.report.numbers import duration, quantity, ratio
from codegen.result import InspectRow
from passes.core.cost import Cost, Kind

BEFORE = Cost(
    latency=1000,
    unit="cycles",
    energy_pj=2e6,
    macs=41_000_000,
    params=270_000,
    size_bytes=1_094_673,
    kind=Kind.SIMULATED,
)
AFTER = Cost(
    latency=590, unit="cycles", energy_pj=1e6, macs=20_500_000, params=135_000, size_bytes=547_336, kind=Kind.SIMULATED
)

REPORT = Report(
    model="models/<net> & co.onnx",
    model_sha256="0" * 64,
    target="asic",
    target_spec={"array": {"rows": 16}},
    baseline=Network.of(BEFORE, accuracy=0.9173),
    result=Network.of(AFTER, accuracy=0.9),
    output_error=OutputError(0.12, None, "calib.npz", 1000),
    layers=(
        Layer(
            "conv1",
            "Conv",
            "dense",
            None,
            "no chain is cheaper",
            400,
            400,
            "cycles",
            Kind.SIMULATED,
            10,
            10,
            5,
            5,
            0.0,
            ("svd",),
        ),
        Layer(
            "conv<2>",
            "Conv",
            "tucker2",
            (8, 12),
            "cheaper",
            600,
            190,
            "cycles",
            Kind.SIMULATED,
            30,
            10,
            9,
            3,
            0.01,
            ("svd", "tucker2"),
        ),
        Layer("rnn/w", "MatMul", "dense", None, 'kept: in a body, "quoted", with a comma'),
    ),
    solver=Solver(
        "milp", "optimal", 0.01, 0.01, 0.0, (Iteration({"latency": 580}, {"latency": 590}, "optimal", 0.01, 0.01, 0.0),)
    ),
    verification=Verification(True, 1e-7, 1e-6, 8, BinaryCheck(2e-7, 2e-6, 8, {"x": (1, 3, 8, 8)})),
    artifacts={"onnx": "model.onnx", "binary": "model.so", "program": None},
    budgets=(
        BudgetLine("latency", "60%", 600, "cycles", 590, True, Kind.SIMULATED),
        BudgetLine("params", "100k", 100_000, "params", 135_000, False, Kind.MEASURED, 120_000),
    ),
    data={"calib": DataRow("calib.npz", 1000)},
    timings={"solve": 1.5},
    notes=(NoteRow("weights hold int8", "conv<2>", "Conv"), NoteRow("general")),
    warnings=("random inputs stand in for data",),
)


@pytest.fixture
def report() -> dict[str, Any]:
    return REPORT.to_dict()


def test_the_schema_is_a_schema_and_describes_what_the_design_promises(report: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    validate(json.loads(to_json(report)))
    assert report["schema"] == 1
    assert report["result"]["latency"] == {"value": 590, "unit": "cycles", "kind": "simulated"}
    assert report["layers"][1]["rank"] == [8, 12]
    assert report["tool"]["onnx"] and report["tool"]["rankc"]


def mutations() -> list[tuple[str, Any]]:
    def at(*path: Any, value: Any) -> Any:
        def change(report: dict[str, Any]) -> None:
            place: Any = report
            for key in path[:-1]:
                place = place[key]
            if value is ...:
                del place[path[-1]]
            else:
                place[path[-1]] = value

        return change

    return [
        ("another schema", at("schema", value=2)),
        ("a missing section", at("solver", value=...)),
        ("an unknown section", at("extra", value=1)),
        ("a number without its kind", at("baseline", "latency", "kind", value=...)),
        ("an invented kind", at("baseline", "latency", "kind", value="guessed")),
        ("an unknown unit", at("result", "size", "unit", value="MB")),
        ("a negative latency", at("result", "latency", "value", value=-1)),
        ("a layer without reason", at("layers", 0, "reason", value="")),
        ("a dense layer with a rank", at("layers", 0, "rank", value=[3])),
        ("a chain without a rank", at("layers", 1, "rank", value=None)),
        ("rank 0", at("layers", 1, "rank", value=[0])),
        ("a missed budget without a verdict", at("budgets", 1, "met", value=...)),
        ("a digest that is none", at("model", "sha256", value="abc")),
        ("an absolute path of an artifact", at("artifacts", "onnx", value="/out/model.onnx")),
        ("a binary checked in the same process", at("verification", "binary", "fresh_process", value=False)),
        ("text for a number", at("solver", "gap", value="0")),
    ]


@pytest.mark.parametrize(("what", "change"), mutations(), ids=[what for what, _ in mutations()])
def test_a_mutated_report_is_refused(report: dict[str, Any], what: str, change: Any) -> None:
    mutated = copy.deepcopy(report)
    change(mutated)
    with pytest.raises(jsonschema.ValidationError):
        validate(mutated)


def test_infinite_gaps_become_null() -> None:
    from dataclasses import replace

    solver = Solver("greedy", "feasible", 1.0, float("-inf"), float("inf"))
    written = replace(REPORT, solver=solver).to_dict()["solver"]
    assert (written["objective"], written["bound"], written["gap"]) == (1.0, None, None)


def test_csv_has_a_row_per_layer_that_reads_back(report: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(layers_csv.to_csv(report))))
    assert [row["name"] for row in rows] == ["conv1", "conv<2>", "rnn/w"]
    assert rows[1]["rank"] == "8 12" and rows[1]["formats"] == "svd tucker2" and rows[1]["latency_after"] == "190"
    assert rows[2]["reason"] == 'kept: in a body, "quoted", with a comma' and rows[2]["latency_before"] == ""
    assert set(rows[0]) == set(report["layers"][0])


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_needs_nothing_from_outside(report: dict[str, Any]) -> None:
    text = to_html(report)
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<img|<iframe", text)
    assert not {name for _, name, _ in page.attributes} & {"src", "href", "onload", "action"}


def test_html_escapes_names_and_draws_bars_to_scale(report: dict[str, Any]) -> None:
    page = Page(to_html(report))
    assert "<net> & co.onnx on asic" in page.text and "conv<2>" in page.text
    assert "models/<net> & co.onnx, SHA-256" in page.text
    widths = [float(value) for tag, name, value in page.attributes if (tag, name) == ("rect", "width")]
    # 100 pixels are the longest latency, 600 cycles; the layer without numbers has no bar.
    assert widths == [pytest.approx(100 * cycles / 600, abs=0.005) for cycles in (400, 400, 600, 190, 0, 0)]
    assert "missed, at best 120k params" in " ".join(page.text.split()).replace(" ,", ",")


def test_html_says_at_the_top_whether_the_budgets_are_met(report: dict[str, Any]) -> None:
    missed = " ".join(Page(to_html(report)).text.split())
    assert "Missed: params" in missed and missed.index("Missed: params") < missed.index("Layers")
    for budget in report["budgets"]:
        budget["met"] = True
    text = Page(to_html(report)).text
    assert ("All budgets are met" if len(report["budgets"]) > 1 else "The budget is met") in text
    report["budgets"] = []
    assert "No budget: the fastest network within the error limit" in Page(to_html(report)).text


def test_html_without_optional_parts(report: dict[str, Any]) -> None:
    report.update(layers=[], budgets=[], notes=[], warnings=[])
    report["verification"].update(binary=None, reloaded=False, relative_l2=None)
    report["result"].update(accuracy=None, energy=None)
    assert "model.onnx was not read back" in " ".join(Page(to_html(report)).text.split())


def test_the_console_shows_units_and_kinds(report: dict[str, Any]) -> None:
    out = io.StringIO()
    print_report(report, stream=out)
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "conv<2> Conv tucker2 8x12 600 cycles 190 cycles 31.7 % 0.01" in lines
    assert "rnn/w MatMul dense - - - -" in lines
    assert "latency 1,000 cycles 590 cycles 59.0 % simulated met (600 cycles)" in lines
    assert "params 270k params 135k params 50.0 % measured missed (100k params, at best 120k params)" in lines
    assert "accuracy 91.73 % 90.00 % -1.73 points measured" in lines
    assert "output error 0.12 (relative L2, 1000 samples, calib.npz)" in lines
    assert "quoted" not in out.getvalue()
    explained = io.StringIO()
    print_report(report, explain=True, stream=explained)
    assert '"quoted", with a comma' in explained.getvalue()
    assert "note conv<2> (Conv): weights hold int8" in " ".join(explained.getvalue().split())


def test_console_events_write_plain_lines_to_a_file() -> None:
    for verbose in (False, True):
        out = io.StringIO()
        with ConsoleEvents(verbose=verbose, stream=out) as events:
            with events.stage("solve [x]", 2) as progress:
                progress.advance(note="[conv]")
                with events.stage("inner"):
                    pass
            events.note("a [note]")
            events.warning("a [warning]")
        lines = out.getvalue().splitlines()
        assert re.fullmatch(r"done  solve \[x\]  \d\.\d s", lines[0])
        assert lines[1:] == (["note  a [note]"] if verbose else []) + ["warning  a [warning]"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_steps_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    now = [0.0]
    with ConsoleEvents(stream=out, clock=lambda: now[0]) as events:
        with events.stage("correct", 8) as progress:
            for second in range(7):
                now[0] = float(second)
                progress.advance(note="conv1" if second == 0 else "")
            events.warning("w")  # draws the bars anew: one of 8 steps of a second each is left
        with events.stage("read"):
            events.warning("w")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert re.search(r"correct .*7 of 8, 1\.0 s left conv1", text), text
    drawn = [line for line in re.split(r"[\r\n]+", text) if "read" in line and "done" not in line]
    assert drawn and not any("left" in line or "of" in line for line in drawn)


def test_console_events_close_their_bars_when_a_stage_fails() -> None:
    out = io.StringIO()
    with pytest.raises(ValueError, match="x"), ConsoleEvents(stream=out) as events, events.stage("solve"):
        raise ValueError("x")
    assert out.getvalue() == ""


def test_inspection_lists_every_node() -> None:
    out = io.StringIO()
    print_inspection([InspectRow("n[0]", "Conv", "kept", "weight is computed")], stream=out)
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["node", "op", "status", "reason"],
        ["n[0]", "Conv", "kept", "weight", "is", "computed"],
    ]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1234567.4, "cycles", "1,234,567 cycles"),
        (0.00251, "s", "2.51 ms"),
        (0.0, "s", "0 s"),
        (1.5e9, "pJ", "1.5 mJ"),
        (12.0, "pJ", "12 pJ"),
        (41e6, "MACs", "41M MACs"),
        (999, "params", "999 params"),
        (1.5 * 2**20, "B", "1.5 MiB"),
        (17, "B", "17 B"),
        (0.9173, "top-1", "91.73 %"),
        (None, "cycles", "-"),
    ],
)
def test_quantities_as_people_read_them(value: float | None, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_ratios_and_durations() -> None:
    assert (ratio(1, 3), ratio(1, 0), ratio(None, 3)) == ("33.3 %", "-", "-")
    assert [duration(s) for s in (0.44, 12.3, 59.6, 200)] == ["0.4 s", "12 s", "60 s", "3 min 20 s"]

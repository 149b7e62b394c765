"""One flipped bit of a program: refused, a hazard, another value, other cycles; or a field that only says something."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from accel_sim.program.container import SECTIONS, encode, section_places
from codegen.bench.flipped_bits import Flip, FlippedBits, Seen, Subject, bits_of, changed_field, flips
from codegen.events import QuietEvents

REFUSED = (Seen.CONTAINER, Seen.CHECK, Seen.ENGINE)

SAYS_ONLY = {"markers.name", "markers.op", "markers.nodes", "markers.macs", "calls.name", "calls.reason"}
"""For reports: ``macs`` are what energy is counted by, so it is COUNTERS that sees them."""

CLOSE = {
    *("constants", "scales", "tables", "tensors.scale", "calls.model"),
    *("outputs.low", "outputs.high", "sums.low", "sums.high", "sums.offset", "sums.own_ratio", "sums.other_ratio"),
    *("sums.own_first", "vectors.low", "vectors.high", "vectors.ratio", "vectors.divisor", "vectors.count_padding"),
    *("outputs.per_channel", "vectors.signed"),
}
"""Numbers whose change rounds away, or limits and entries that no value of these samples meets."""

SAME = {"code.load.chained", "code.load.loops.run", "the sign of a zero", "dram_bytes"}
"""Two requests in the place of one, or one of two, that take as long; bytes more within a burst; room at the end."""

UNREAD = {"windows.channels", "windows.extent", "windows.kernel", "windows.pad_value", "windows.origin"}
"""A stored map of which no more is read, a pool's taps beyond it, a padding that no tap meets."""


@pytest.fixture(scope="module", params=["digits", "host"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return FlippedBits()._subject(request.param, tmp_path_factory.mktemp("flipped"))


@pytest.fixture(scope="module")
def found(subject: Subject) -> list[Flip]:
    return flips(subject, list(bits_of(subject.data, 24, np.random.default_rng(1))))


def test_as_stored_every_bit_is_refused(subject: Subject) -> None:
    bits = list(bits_of(subject.data, 60, np.random.default_rng(2)))
    assert {part for _, part in bits} >= {"header", "section table", "checksums", "between", "code", "constants"}
    assert all(subject.refused_as_stored(bit) for bit, _ in bits)


def test_parts_cover_each_byte_once(subject: Subject) -> None:
    spans = sorted(span for part in section_places(subject.data).values() for span in part if span[0] < span[1])
    assert spans[0][0] == 0 and spans[-1][1] == len(subject.data)
    assert all(a[1] == b[0] for a, b in pairwise(spans))


def test_with_mended_checksums_nothing_wrong_passes(found: list[Flip]) -> None:
    """What runs with the right values and cycles differs in what only says something, rounds away or is not read."""
    assert {(flip.section, flip.field) for flip in found if flip.seen is Seen.COUNTERS} <= {
        ("markers", "markers.macs"),
        ("code", "code.load.loops.run"),  # bytes are loaded that nobody reads
    }
    passed = {flip.field for flip in found if flip.seen is Seen.NOTHING}
    assert passed <= SAYS_ONLY | CLOSE | UNREAD | SAME
    assert {flip.section for flip in found if flip.seen is Seen.NOTHING}.isdisjoint({"section table", "between"})


def test_code_is_refused_by_its_instruction(found: list[Flip]) -> None:
    code = [flip for flip in found if flip.section == "code"]
    assert code and all(flip.indexed for flip in code if flip.seen in REFUSED)
    counts = Counter(flip.seen for flip in found)
    assert min(counts[kind] for kind in (*REFUSED, Seen.INTERFACE, Seen.VALUES, Seen.CYCLES)) > 0


def test_a_large_weight_and_a_prediction_are_noticed(subject: Subject) -> None:
    """The sign bit of each of a few weights turns outputs around; a bit of a predicted number is no prediction."""
    begin, _ = section_places(subject.data)["constants"][0]
    seen = {subject.flip(8 * (begin + at) + 7, "constants").seen for at in range(0, 24, 3)}
    assert seen == {Seen.VALUES}
    begin, end = section_places(subject.data)["markers"][0]
    marker = subject.program.markers[0]
    at = subject.data.index(
        marker.predicted_cycles.to_bytes(8, "little") + marker.macs.to_bytes(8, "little"), begin, end
    )
    flip = subject.flip(8 * at + 2, "markers")
    assert (flip.seen, flip.field) == (Seen.CYCLES, "markers.predicted_cycles")


def test_changed_fields_have_names(subject: Subject) -> None:
    assert changed_field(subject.program, subject.program) == ""
    forged = bytearray(subject.data)
    begin, _ = section_places(subject.data)["code"][0]
    assert encode(subject.program) == bytes(forged)
    assert forged[begin] == 6  # the first instruction is a sync, whose marker stands at byte 8
    flip = subject.flip(8 * (begin + 8), "code")
    assert flip.field == "code.sync.marker" and flip.seen in (Seen.CYCLES, Seen.CHECK)


def test_a_program_that_computes_something_else_is_no_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "_compared", lambda *_: Seen.VALUES)
    with pytest.raises(ValueError, match="shows other values than onnxruntime's"):
        FlippedBits()._subject("host", tmp_path)


def test_the_benchmark_counts_by_section() -> None:
    bench = FlippedBits(networks=("host",), bits=2)
    result = bench.run(QuietEvents())
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    (row,) = result["programs"]
    assert row["refused_as_stored"] == row["flipped"] == 2 * (len(row["sections"]) + 1)  # and two of the checksums
    assert [s["section"] for s in row["sections"]][:2] == ["header", "section table"]
    assert {s["section"] for s in row["sections"]} - {"header", "section table", "between"} <= set(SECTIONS)
    assert all(sum(s["seen"].values()) == s["flipped"] for s in row["sections"])
    assert len(bench.tables(result)[0].rows) == len(row["sections"])

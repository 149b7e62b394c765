import json
import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codegen.tune.database import Database, default_path
from codegen.tune.device import Device
from codegen.tune.measuring import Job, Timing
from codegen.tune.record import Header, Record, from_line, to_line
from codegen.tune.schedule import Schedule
from codegen.tune.workload import Workload
from passes.errors import InputError

DEVICE = Device({"kind": "llvm", "mcpu": "znver4"}, "a processor", 1, 512, 32)
OTHER = Device({"kind": "llvm", "mcpu": "znver4"}, "a processor", 2, 512, 32)
CONV = Workload.parse("conv 1x16x32x32 -> 16, kernel 3x3, pads 1,1,1,1, float32")
WIDE = Workload.parse("conv 1x16x32x32 -> 24, kernel 3x3, pads 1,1,1,1, float32")
FAR = Workload.parse("conv 1x256x8x8 -> 256, kernel 3x3, pads 1,1,1,1, float32")
POINTWISE = Workload.parse("conv 1x16x32x32 -> 16, kernel 1x1, float32")
DEPTHWISE = Workload.parse("conv 1x16x32x32 -> 16, kernel 3x3, pads 1,1,1,1, groups 16, float32")
LINEAR = Workload.parse("linear 4x64 -> 10, float32")


def timing(workload: Workload = CONV, us: float | None = 10.0, **params: int | str) -> Timing:
    job = Job(workload, Schedule.of("rows", **(params or {"oc": 8})), 200)
    if us is None:
        return Timing(job, None, None, None, "it crashed", "here")
    return Timing(job, us / 1e6, us / 0.9e6, us / 0.5e6, "", "here")


def open_(path: Path, heard: list[str] | None = None) -> Database:
    """A database that must not have anything to complain of, unless ``heard`` takes it."""

    def complain(text: str) -> None:
        raise AssertionError(text)

    return Database(path, "tvm 1, templates 1", warn=complain if heard is None else heard.append)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tune.jsonl"


texts = st.text(max_size=20)
times = st.floats(1e-9, 1e3)
schedules = st.builds(
    lambda template, params: Schedule(template, tuple(sorted(params.items()))),
    texts,
    st.dictionaries(st.text(min_size=1, max_size=5), st.integers(-(2**40), 2**40) | texts, max_size=3),
)
records = st.builds(
    lambda workload, device, versions, schedule, ok, a, b, c, repeats, error, where, time: Record(
        workload.key,
        device,
        versions,
        schedule,
        a if ok else None,
        b if ok else None,
        c if ok else None,
        repeats,
        "" if ok else error,
        where,
        time,
    ),
    st.sampled_from([CONV, WIDE, LINEAR]),
    texts,
    st.sampled_from(["tvm 1, templates 1", "tvm 2"]),
    schedules,
    st.booleans(),
    times,
    times,
    times,
    st.integers(1, 1000),
    st.text(min_size=1),
    texts,
    st.floats(0, 1e10),
)


@given(records)
def test_a_record_is_one_line_and_comes_back(record: Record) -> None:
    line = to_line(record)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert from_line(line[:-1]) == record
    assert json.loads(line)["trial"]["workload"] == record.workload


@given(records, st.data())
def test_no_changed_byte_goes_unnoticed(record: Record, data: st.DataObject) -> None:
    line = bytearray(to_line(record)[:-1])
    at = data.draw(st.integers(0, len(line) - 1))
    line[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError):
        from_line(bytes(line))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(records, max_size=12), st.lists(records, max_size=12))
def test_merging_takes_everything_over_once(
    tmp_path_factory: pytest.TempPathFactory, ours: list[Record], theirs: list[Record]
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    mine = filled(folder / "mine", ours)
    filled(folder / "other", theirs)
    mine.merge([folder / "other"])
    # Of each schedule the fastest of all, broken only where none worked.
    expected: dict[tuple[object, ...], float] = {}
    for record in [*ours, *theirs]:
        key = (*record.key, record.schedule)
        seconds = float("inf") if record.seconds is None else record.seconds
        expected[key] = min(expected.get(key, float("inf")), seconds)

    def held(database: Database) -> dict[tuple[object, ...], float]:
        return {(*r.key, r.schedule): float("inf") if r.seconds is None else r.seconds for r in database.records()}

    assert held(mine) == expected
    assert held(open_(folder / "mine")) == expected
    assert mine.merge([folder / "other"]) == 0


def filled(path: Path, found: list[Record]) -> Database:
    """With lines of any versions and devices."""
    path.write_bytes(Header(1, path.name).to_line() + b"".join(map(to_line, found)))
    return open_(path)


def test_best_and_trials(path: Path) -> None:
    database = open_(path)
    assert database.best(CONV, DEVICE) is None and database.trials(CONV, DEVICE) == [] and not path.exists()
    for oc, us in ((1, 30.0), (2, 20.0), (3, None), (4, 25.0)):
        database.add(timing(CONV, us, oc=oc), DEVICE)
    database.add(timing(CONV, 5.0, oc=9), OTHER)
    database.add(timing(WIDE, 6.0), DEVICE)
    best = database.best(CONV, DEVICE)
    assert best is not None and best.schedule == Schedule.of("rows", oc=2)
    assert (best.seconds, best.repeats, best.error, best.where) == (2e-5, 200, "", "here")
    assert [r.schedule["oc"] for r in database.trials(CONV, DEVICE)] == [1, 2, 3, 4]
    assert database.known(CONV, DEVICE) == {Schedule.of("rows", oc=oc) for oc in (1, 2, 3, 4)}
    assert database.workloads(DEVICE) == [CONV, WIDE]
    database.add(timing(FAR, None), DEVICE)
    assert database.schedules(DEVICE) == {CONV.key: Schedule.of("rows", oc=2), WIDE.key: timing().job.schedule}
    broken = database.trial(CONV, DEVICE, Schedule.of("rows", oc=3))
    assert broken is not None and broken.error == "it crashed" and broken.seconds is None


def test_a_schedule_measured_again_counts_by_its_fastest(path: Path) -> None:
    database = open_(path)
    for us in (None, 20.0, 30.0, 15.0, None):
        database.add(timing(CONV, us), DEVICE)
    for found in (database, open_(path)):
        assert [record.seconds for record in found.trials(CONV, DEVICE)] == [15e-6]
    assert len(path.read_bytes().splitlines()) == 6


def test_trials_of_other_code_are_kept_and_not_used(path: Path) -> None:
    old = Database(path, "tvm 0, templates 1")
    old.add(timing(CONV, 1.0), DEVICE)
    new = open_(path)
    assert new.best(CONV, DEVICE) is None and new.workloads(DEVICE) == [] and new.nearest(WIDE, DEVICE) == []
    new.add(timing(CONV, 2.0), DEVICE)
    assert [found.best(CONV, DEVICE).seconds for found in (old, new)] == [1e-6, 2e-6]  # type: ignore[union-attr]
    assert len(new.records()) == 2


def test_the_nearest_are_of_the_family_and_nearest_first(path: Path) -> None:
    database = open_(path)
    for workload in (FAR, WIDE, POINTWISE, DEPTHWISE, LINEAR):
        database.add(timing(workload, 10.0), DEVICE)
    # WIDE is 24 / 16 away; FAR 256 / 16 twice and 32 / 8 twice.
    assert [r.workload for r in database.nearest(CONV, DEVICE, 5)] == [WIDE.key, FAR.key]
    assert [r.workload for r in database.nearest(CONV, DEVICE)] == [WIDE.key]
    assert [r.workload for r in database.nearest(WIDE, DEVICE, 5)] == [FAR.key]
    assert database.nearest(CONV, OTHER, 5) == []
    broken = Workload.parse("conv 1x16x32x32 -> 17, kernel 3x3, pads 1,1,1,1, float32")
    database.add(timing(broken, None), DEVICE)
    assert [r.workload for r in database.nearest(CONV, DEVICE)] == [WIDE.key]


def test_what_another_process_adds_is_read_from_where_reading_stopped(path: Path) -> None:
    first, second = open_(path), open_(path)
    first.add(timing(CONV, 3.0, oc=1), DEVICE)
    assert second.best(CONV, DEVICE) is None
    assert (second.refresh(), second.refresh()) == (1, 0)
    assert second.best(CONV, DEVICE) == first.best(CONV, DEVICE)
    first.add(timing(CONV, 2.0, oc=2), DEVICE)
    second.add(timing(CONV, 1.0, oc=3), DEVICE)
    assert len(second.trials(CONV, DEVICE)) == 3
    assert first.refresh() == 1


def test_a_last_record_cut_anywhere_is_recovered_to_the_one_before(path: Path) -> None:
    database = open_(path)
    for oc in (1, 2):
        database.add(timing(CONV, float(oc), oc=oc), DEVICE)
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        heard: list[str] = []
        found = open_(path, heard)
        # All that may be missing of a whole record is its newline.
        kept = 2 if end == len(whole) - 1 else 1
        assert len(found.trials(CONV, DEVICE)) == kept
        cut = [f"{path}: {end - start} bytes of an unfinished record at its end were cut off"]
        assert heard == (cut if start < end < len(whole) - 1 else [])
        found.add(timing(CONV, 3.0, oc=3), DEVICE)
        again = open_(path)
        assert [r.schedule["oc"] for r in again.trials(CONV, DEVICE)] == [*range(1, kept + 1), 3]


def test_a_first_line_cut_anywhere_is_written_anew(path: Path) -> None:
    open_(path).add(timing(), DEVICE)
    header = path.read_bytes().split(b"\n")[0]
    for end in range(len(header) + 1):
        path.write_bytes(header[:end])
        database = open_(path)
        assert database.records() == []
        database.add(timing(), DEVICE)
        assert len(open_(path).records()) == 1


def test_a_damaged_line_is_named_and_the_others_stay(path: Path) -> None:
    database = open_(path)
    for oc in (1, 2, 3):
        database.add(timing(CONV, float(oc), oc=oc), DEVICE)
    content = bytearray(path.read_bytes())
    lines = bytes(content).splitlines(keepends=True)
    content[len(lines[0]) + len(lines[1]) + 40] ^= 4
    path.write_bytes(content)
    heard: list[str] = []
    found = open_(path, heard)
    assert heard == [f"{path}: line 3 is damaged and was skipped: its checksum does not fit"]
    assert [r.schedule["oc"] for r in found.trials(CONV, DEVICE)] == [1, 3]


def test_compacting_keeps_the_fastest_and_the_broken(path: Path) -> None:
    database, reader = open_(path), open_(path)
    for oc, us in ((1, 30.0), (2, 20.0), (3, None), (4, 25.0), (2, 19.0)):
        database.add(timing(CONV, us, oc=oc), DEVICE)
    database.add(timing(CONV, 9.0), OTHER)
    reader.refresh()
    size = path.stat().st_size
    assert database.compact(1) == 3
    assert path.stat().st_size < size
    for found in (database, open_(path)):
        assert [(r.schedule["oc"], r.seconds) for r in found.trials(CONV, DEVICE)] == [(3, None), (2, 19e-6)]
        assert len(found.trials(CONV, OTHER)) == 1
    # Who had the old file open finds the new one, and writes there.
    reader.add(timing(CONV, 1.0, oc=7), DEVICE)
    assert [r.schedule["oc"] for r in reader.trials(CONV, DEVICE)] == [3, 2, 7]
    assert database.refresh() == 1
    assert [p.name for p in path.parent.iterdir()] == ["tune.jsonl"]


def test_other_files_are_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    for content in (b"something else", b"{}\n", b'{"crc32":"00000000","database":{}}\n', b"\x00" * 300):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is no tuning database of rankc"):
            open_(path)
        assert path.read_bytes() == content
    with pytest.raises(InputError, match="Is a directory"):
        open_(path.parent)
    with pytest.raises(InputError, match="no such file"):
        open_(path.with_name("new")).merge([path.with_name("none")])


def test_a_newer_schema_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr("codegen.tune.journal.SCHEMA", 7)
        open_(path).add(timing(), DEVICE)
    with pytest.raises(InputError, match="is a tuning database of schema 7, this rankc reads 1"):
        open_(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_of_another_user_can_be_read(path: Path) -> None:
    open_(path).add(timing(), DEVICE)
    path.chmod(0o444)
    database = open_(path)
    assert len(database.records()) == 1
    with pytest.raises(InputError, match="cannot be written: Permission denied"):
        database.add(timing(), DEVICE)


def test_a_full_disk_keeps_no_half_of_a_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = open_(path)
    database.add(timing(CONV, 1.0, oc=1), DEVICE)
    before = path.read_bytes()
    write = os.write
    with monkeypatch.context() as full:
        full.setattr("codegen.tune.journal.os.write", lambda file, data: write(file, data[: len(data) // 2]))
        with pytest.raises(InputError, match=r"cannot be written: \d+ of \d+ bytes could be written"):
            database.add(timing(CONV, 2.0, oc=2), DEVICE)
    assert path.read_bytes() == before
    database.add(timing(CONV, 3.0, oc=3), DEVICE)
    assert [r.schedule["oc"] for r in open_(path).trials(CONV, DEVICE)] == [1, 3]


def test_the_default_place_is_the_user_s_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "rankc" / "tune.jsonl"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_path() == tmp_path / "home" / ".cache" / "rankc" / "tune.jsonl"


def _write(path: Path, writer: int, count: int) -> None:
    database = open_(path)
    for oc in range(count):
        database.add(timing(CONV, 1.0 + oc, oc=oc, writer=writer), DEVICE)
        if oc == count // 2 and writer == 0:
            database.compact(10**6)


def test_processes_write_at_once(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, writer, 60)) for writer in range(4)]
    for process in writers:
        process.start()
    reader, seen = open_(path), 0
    while any(process.is_alive() for process in writers):
        reader.refresh()
        assert len(reader.records()) >= seen
        seen = len(reader.records())
    for process in writers:
        process.join()
        assert process.exitcode == 0
    expected = {Schedule.of("rows", oc=oc, writer=writer) for oc in range(60) for writer in range(4)}
    reader.refresh()
    assert reader.known(CONV, DEVICE) == open_(path).known(CONV, DEVICE) == expected

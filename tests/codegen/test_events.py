from codegen.events import QuietEvents, RecordingEvents


def test_recording_events_keep_timings_steps_and_texts_and_pass_them_on() -> None:
    inner = RecordingEvents()
    events = RecordingEvents(inner)
    for _ in range(2):
        with events.stage("factorize", 3) as progress:
            progress.advance(note="conv1")
            progress.advance(2)
            with events.stage("svd"):
                pass
    events.note("n")
    events.warning("w")
    assert events.steps == inner.steps == {"factorize": 6}
    assert list(events.timings) == ["svd", "factorize"]
    assert events.timings["factorize"] >= events.timings["svd"] >= 0
    assert (events.notes, events.warnings, inner.notes, inner.warnings) == (["n"], ["w"], ["n"], ["w"])


def test_a_stage_that_fails_is_still_timed() -> None:
    events = RecordingEvents(QuietEvents())
    try:
        with events.stage("solve"):
            raise ValueError
    except ValueError:
        assert events.timings.keys() == {"solve"}
    else:
        raise AssertionError("the stage swallowed the error")

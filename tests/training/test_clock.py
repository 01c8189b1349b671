import pytest
from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.training.clock import Profiler, ProfileSteps, StepClock, memory_in_use


@pytest.fixture
def now(monkeypatch):
    value = [100.0]
    monkeypatch.setattr("imagen_jax.training.clock.time.monotonic", lambda: value[0])
    return value


def test_time_is_split_and_pauses_are_left_out(now):
    clock = StepClock()
    for _ in range(4):
        with clock.data():
            now[0] += 0.5
        with clock.step():
            now[0] += 2.0
        now[0] += 0.25
    with clock.pause():
        now[0] += 60.0
    assert clock.take(4) == {"data_s": 0.5, "step_s": 2.0, "rest_s": 0.25}
    now[0] += 3.0
    assert clock.take(1) == {"data_s": 0.0, "step_s": 0.0, "rest_s": 3.0}


def test_time_counts_where_the_wait_ends_in_an_error(now):
    clock = StepClock()
    with pytest.raises(StopIteration), clock.data():
        now[0] += 1.0
        raise StopIteration
    assert clock.take(1)["data_s"] == 1.0


def test_memory_is_that_of_a_process_with_jax():
    (name, value), *_ = memory_in_use().items()
    assert name in ("device_peak_gib", "host_peak_gib") and 0.05 < value < 1000


@pytest.mark.parametrize("text", ["100", "5:4", "0:3", "a:b", "1:2:3", ""])
def test_steps_to_profile_are_checked(text):
    with pytest.raises(UserError, match="--profile_steps"):
        ProfileSteps.parse(text)


def test_the_trace_covers_the_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append(("stop",)))
    profiler = Profiler(epath.Path(tmp_path), ProfileSteps.parse("3:4"))
    for step in range(1, 7):
        profiler.before(step, None)
        calls.append(step)
        profiler.after(step, None)
    profiler.close()
    assert calls == [1, 2, ("start", str(tmp_path / "profile")), 3, 4, ("stop",), 5, 6]
    # A run that ends, or is resumed, within them writes what there is.
    calls.clear()
    profiler = Profiler(epath.Path(tmp_path), ProfileSteps.parse("3:9"))
    profiler.before(5, None)
    profiler.after(5, None)
    profiler.close()
    assert [call[0] for call in calls] == ["start", "stop"]

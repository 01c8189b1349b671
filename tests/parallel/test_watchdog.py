import pytest

from imagen_jax.parallel.processes import EXIT_RESTART, ProcessConfig
from imagen_jax.parallel.watchdog import LONG_WORK_SECONDS, Judge, Life, Phase


def life(process, beat, step, phase=Phase.STEP, done=False):
    return Life(beat=beat, step=step, phase=phase, who=f"process {process} (host h{process})", done=done)


def judge(processes=3, step_timeout=60.0):
    return Judge(processes=processes, step_timeout=step_timeout, peer_timeout=8.0, now=0.0)


def test_living_processes_that_step_are_left_alone():
    court = judge()
    for second in range(200):
        assert court.look({p: life(p, second, second // 20) for p in range(3)}, float(second)) is None


def test_the_process_that_fell_silent_is_named():
    court = judge()
    for second in range(40):
        beats = {p: second if p != 1 else min(second, 20) for p in range(3)}
        verdict = court.look({p: life(p, beats[p], second) for p in range(3)}, float(second))
        if verdict is not None:
            break
    assert second == 29  # the first look more than 8 s after the last sign of life, at 20
    assert verdict.process == 1 and verdict.code == EXIT_RESTART
    assert verdict.message == (
        "process 1 (host h1) has given no sign of life for 9 s (it was starting step 20)"
    )


def test_a_process_that_never_came_is_named():
    court = judge(processes=2)
    assert court.look({0: life(0, 1, 0)}, 7.0) is None
    assert court.look({0: life(0, 2, 0)}, 8.5).message.startswith(
        "process 1 has given no sign of life for 8 s"
    )


@pytest.mark.parametrize(
    ("behind", "ahead"),
    [
        ((7, Phase.DATA), (7, Phase.STEP)),
        ((7, Phase.STEP), (8, Phase.DATA)),
        ((6, Phase.LOG), (7, Phase.LOG)),
    ],
)
def test_the_process_that_is_behind_is_named_when_all_stand_still(behind, ahead):
    court, second = judge(), 0
    verdict = None
    while verdict is None:
        second += 1
        lives = {p: life(p, second, *(behind if p == 2 else ahead)) for p in range(3)}
        verdict = court.look(lives, float(second))
    assert second == 62  # they were first seen at 1
    assert verdict.process == 2
    assert f"process 2 (host h2) stopped stepping: {behind[1].shown} step {behind[0]}" in verdict.message


def test_nobody_is_accused_when_all_wait_in_the_same_place():
    court = judge()
    for second in range(0, 65, 4):  # the last is the first after more than 60 s
        verdict = court.look({p: life(p, second, 5) for p in range(3)}, float(second))
    assert verdict.process == -1 and "all processes stopped stepping" in verdict.message


def test_long_work_and_a_time_of_zero_are_given_time():
    late = LONG_WORK_SECONDS - 1
    for court, phase in ((judge(1), Phase.LONG), (judge(1, step_timeout=0.0), Phase.STEP)):
        court.look({0: life(0, 0, 5, phase)}, 0.0)
        assert court.look({0: life(0, 1, 5, phase)}, late) is None
    court = judge(1)
    court.look({0: life(0, 0, 5, Phase.LONG)}, 0.0)
    assert "at long work after step 5" in court.look({0: life(0, 1, 5, Phase.LONG)}, late + 2).message


def test_a_process_at_its_end_is_not_missed():
    court = judge(processes=2)
    court.look({0: life(0, 0, 5), 1: life(1, 0, 5, done=True)}, 0.0)
    for second in range(1, 60):
        assert court.look({0: life(0, second, 5), 1: life(1, 0, 5, done=True)}, float(second)) is None


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"coordinator": "localhost:1"}, "belong together"),
        ({"num_processes": 2, "process_id": 0}, "belong together"),
        ({"coordinator": "localhost:1", "num_processes": 2, "process_id": 2}, "--process_id=2 is not below"),
        (
            {"coordinator": "localhost:1", "num_processes": 2, "process_id": -1},
            "--process_id=-1 is not below",
        ),
        ({"coordinator": "localhost", "num_processes": 2, "process_id": 0}, "HOST:PORT, got 'localhost'"),
        ({"peer_timeout": 0.5}, "--peer_timeout must be at least 2 seconds, got 0.5"),
    ],
)
def test_flags_that_do_not_fit_are_refused(fields, part):
    with pytest.raises(ValueError, match=part):
        ProcessConfig(**fields)

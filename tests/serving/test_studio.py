"""The queue and the gallery, without a browser and without a network: a model that is driven by hand."""

import threading
import time

import numpy as np
import pytest
from etils import epath

from imagen_jax.cli.main import main
from imagen_jax.errors import UserError
from imagen_jax.sampling.batches import Preview
from imagen_jax.sampling.cascade import Imagen, Picture
from imagen_jax.sampling.overrides import SamplingOverrides
from imagen_jax.sampling.pictures import read_metadata, save_png
from imagen_jax.serving import studio as studio_module
from imagen_jax.serving.request import Limits, PictureRequest
from imagen_jax.serving.studio import MAX_CLIENT_JOBS, MAX_JOBS, JobState, Studio


class HandDriven(Imagen):
    """Records and checks as the real one; draws one call at a time, when it may."""

    def __init__(self, model):
        self.__dict__.update(model.__dict__)
        self.go, self.failure, self.active, self.drawn = threading.Semaphore(0), None, 0, []

    def draw(self, drawing, *, preview=None, **options):
        self.check(drawing, **options)
        return self._by_hand(drawing.wanted, preview)

    def _by_hand(self, wanted, preview):
        self.active += 1
        assert self.active == 1  # one at a time
        try:
            for stage in ("base", "sr") if wanted else ():
                for call in (1, 2):
                    self.go.acquire()
                    if self.failure is not None:
                        raise self.failure
                    pixels = np.zeros((len(wanted), 8, 8, 3), np.uint8)
                    preview(Preview(stage=stage, call=call, calls=2, pixels=pixels))
            for index, (prompt, seed) in enumerate(wanted):
                self.drawn.append((prompt, seed))
                pixels = np.full((16, 16, 3), seed, np.uint8)
                yield Picture(prompt=prompt, seed=seed, index=index, pixels=pixels)
        finally:
            self.active -= 1


@pytest.fixture
def model(model_folder):
    return HandDriven(Imagen.load(model_folder, cache="off"))


@pytest.fixture
def studio(model, tmp_path):
    made = Studio(model, epath.Path(tmp_path))
    yield made
    model.go.release(100)
    made.close()


def request(prompt="a red circle", **fields):
    return PictureRequest(**{"prompt": prompt, "overrides": (SamplingOverrides(),) * 2, **fields})


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_requests_are_drawn_one_after_the_other_and_say_how_far_they_are(studio, model, tmp_path):
    first, second = studio.submit(request(seed=3, num_images=2)), studio.submit(request("a blue square"))
    until(lambda: first.state is JobState.RUNNING)
    assert (second.state, studio.before(first), studio.before(second)) == (JobState.WAITING, 0, 1)
    seen = []
    for calls in range(1, 4):
        model.go.release()
        until(lambda: first.fraction == calls / 4)  # noqa: B023
        seen.append((first.preview.stage, first.preview.call))
    assert seen == [("base", 1), ("base", 2), ("sr", 1)]
    assert second.state is JobState.WAITING
    model.go.release(5)
    until(lambda: second.state is JobState.DONE)
    assert first.state is JobState.DONE and first.fraction == 1.0
    assert model.drawn == [("a red circle", 3), ("a red circle", 4), ("a blue square", 0)]
    shown = studio.gallery()
    assert [(each.record.prompt, each.record.seed) for each in shown] == [*model.drawn[2:], *model.drawn[:2]]
    assert [each.name for each in shown][1:] == first.names
    for each in shown:
        assert read_metadata(tmp_path / each.name) == each.record.to_metadata()
        assert studio.find(each.name) == each
    assert studio.find("../secret") is None


def test_a_stopped_request_leaves_the_queue(studio, model):
    running, waiting, last = (studio.submit(request(seed=seed)) for seed in range(3))
    until(lambda: running.state is JobState.RUNNING)
    waiting.stop()
    running.stop()
    model.go.release(5)
    until(lambda: last.state is JobState.DONE)
    assert running.state is waiting.state is JobState.STOPPED
    assert [seed for _, seed in model.drawn] == [2]


def test_a_request_that_waits_leaves_the_queue_at_once(studio, model):
    running, waiting, last = (studio.submit(request(seed=seed)) for seed in range(3))
    until(lambda: running.state is JobState.RUNNING)
    assert studio.before(last) == 2
    waiting.stop()
    assert waiting.state is JobState.STOPPED and studio.before(last) == 1
    waiting.stop()
    model.go.release(8)
    until(lambda: last.state is JobState.DONE)
    assert running.state is JobState.DONE and running.preview is None
    assert [seed for _, seed in model.drawn] == [0, 2]


def test_the_queue_has_an_end(studio, model):
    jobs = [studio.submit(request(), "10.0.0.1") for _ in range(MAX_CLIENT_JOBS)]
    with pytest.raises(UserError, match=f"{MAX_CLIENT_JOBS} requests from your address wait"):
        studio.submit(request(), "10.0.0.1")
    jobs[-1].stop()
    jobs.append(studio.submit(request(), "10.0.0.1"))
    while len(jobs) <= MAX_JOBS:
        jobs.append(studio.submit(request(), f"10.0.1.{len(jobs)}"))
    for client in ("10.0.0.9", ""):
        with pytest.raises(UserError, match=f"{MAX_JOBS} requests wait already"):
            studio.submit(request(), client)
    until(lambda: jobs[0].state is JobState.RUNNING)
    for job in jobs:
        job.stop()
    model.go.release(8)
    until(lambda: all(job.state is JobState.STOPPED for job in jobs))
    assert studio.submit(request(), "10.0.0.1").state is not None


def test_what_is_stopped_is_over_at_once(studio, model):
    """Also while it cannot end, as during compilation; whoever asks then waits for that."""
    job = studio.submit(request(seed=1))
    until(lambda: job.state is JobState.RUNNING)
    job.stop()
    assert job.state is JobState.STOPPED
    seconds = job.seconds
    other = studio.submit(request(seed=2))
    assert (other.state, studio.before(other)) == (JobState.WAITING, 1)
    model.go.release(100)
    until(lambda: other.state is JobState.DONE)
    assert job.state is JobState.STOPPED and job.seconds == seconds and job.names == []


def test_a_request_ends_when_nobody_waits_for_it_any_more(studio, model):
    job, left, reloaded = studio.submit(request(seed=1)), object(), object()
    until(lambda: job.state is JobState.RUNNING)
    job.join(left)
    assert studio.job(job.number) is job
    job.join(reloaded)
    job.leave(left)
    assert job.state is JobState.RUNNING
    job.leave(reloaded)
    assert job.state is JobState.STOPPED
    model.go.release(100)
    following = studio.submit(request(seed=2))
    until(lambda: following.state.over)
    assert (
        studio.job(job.number) is job and job.state is JobState.STOPPED
    )  # whoever comes back sees how it ended


def test_a_server_has_limits(model, tmp_path):
    made = Studio(model, epath.Path(tmp_path), limits=Limits(pictures=2, steps=7))
    with pytest.raises(UserError, match="the number of pictures must be 1 to 2, got 3"):
        made.submit(request(num_images=3))
    with pytest.raises(UserError, match="sr takes at most 7 steps here, got 8"):
        made.submit(request(overrides=(SamplingOverrides(), SamplingOverrides(steps=8))))
    model.go.release(100)
    job = made.submit(request(num_images=2))
    until(lambda: job.state.over)
    assert job.state is JobState.DONE
    made.close()


@pytest.mark.parametrize(
    "flag", ["--max_pictures=0", "--max_pictures=65", "--max_steps=0", "--max_steps=5001", "--max_steps=-1"]
)
def test_limits_that_are_none(flag, model_folder, capsys):
    assert main(["serve", f"--model={model_folder}", "--port=0", flag]) == 1
    assert flag.replace("=", " ") + ": must be 1 to" in capsys.readouterr().err


@pytest.mark.parametrize("temporary", [False, True])
def test_the_gallery_has_an_end(model, tmp_path, monkeypatch, temporary):
    """What leaves it stays on disk, unless the folder is the server's own."""
    monkeypatch.setattr(studio_module, "MAX_SHOWN", 3)
    model.go.release(100)
    made = Studio(model, epath.Path(tmp_path), temporary=temporary)
    for seed in range(5):
        job = made.submit(request(seed=seed))
        until(lambda: job.state.over)  # noqa: B023
    assert [each.record.seed for each in made.gallery()] == [4, 3, 2]
    assert len(list(tmp_path.glob("*.png"))) == (3 if temporary else 5)
    made.close()
    again = Studio(model, epath.Path(tmp_path))
    # Files do not say what was asked for together: following seeds of a prompt count as that.
    assert [each.record.seed for each in again.gallery()] == [2, 3, 4]
    again.close()


def test_files_of_strangers_are_named_and_passed_over(model, tmp_path):
    for name in ("grid.png", "preview.png", "photo.png"):
        save_png(tmp_path / name, np.zeros((4, 4, 3), np.uint8))
    save_png(tmp_path / "new.png", np.zeros((4, 4, 3), np.uint8), {"format": 99})
    (tmp_path / "broken.png").write_bytes(b"none")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    made = Studio(model, epath.Path(tmp_path))
    assert made.gallery() == []
    said = sorted(made.passed_over)
    assert [line.split(":")[0].split()[0] for line in said] == [
        str(tmp_path / f"{name}.png") for name in ("broken", "new", "photo")
    ]
    made.close()


def test_a_failure_is_one_line_and_the_next_request_is_drawn(studio, model, capsys):
    job = studio.submit(request())
    model.failure = RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwith a long story")
    model.go.release()
    until(lambda: job.state is JobState.FAILED)
    assert "memory is too small" in job.message and "\n" not in job.message
    assert capsys.readouterr().err == ""
    model.failure = KeyError("something else")
    broken = studio.submit(request())
    model.go.release()
    until(lambda: broken.state is JobState.FAILED)
    assert broken.message.startswith("KeyError: 'something else'")
    assert "Traceback" in capsys.readouterr().err
    model.failure = None
    model.go.release(4)
    last = studio.submit(request())
    until(lambda: last.state is JobState.DONE)


def test_what_cannot_be_drawn_is_refused_at_once(studio):
    off = (SamplingOverrides(guidance_weight=1.0),) * 2
    with pytest.raises(UserError, match="needs guidance"):
        studio.submit(request(negative_prompt="x", overrides=off))
    with pytest.raises(UserError, match="steps must be at least 1"):
        studio.submit(request(overrides=(SamplingOverrides(steps=0), SamplingOverrides())))
    assert studio.gallery() == []


def test_the_page_says_what_the_stages_do_not_see(studio, model):
    assert studio.submit(request()).warnings == []
    job = studio.submit(request("two green triangles and a purple ring"))
    unknown, cut = job.warnings
    assert unknown.endswith("words unknown to the text encoder: and, purple, ring")
    assert cut.endswith("is cut to the 6 tokens of base and sr; left out: 'purple ring'")


def test_a_picture_that_is_there_is_not_drawn_again(studio, model, tmp_path):
    model.go.release(100)
    changed = request(seed=5, overrides=(SamplingOverrides(steps=7), SamplingOverrides()))
    for each in (request(seed=5), changed, request(seed=5)):
        job = studio.submit(each)
        until(lambda: job.state.over)  # noqa: B023
        assert job.state is JobState.DONE and len(job.names) == 1
    assert len(model.drawn) == 2 and len(list(tmp_path.iterdir())) == 2
    front, other = studio.gallery()
    assert (front.again, other.again) == (request(seed=5), changed)
    # Another server over the same folder shows the same, and passes over what is no picture of its own.
    (tmp_path / "broken.png").write_bytes(b"none")
    again = Studio(model, epath.Path(tmp_path))
    assert {each.name: each.again for each in again.gallery()} == {
        each.name: each.again for each in studio.gallery()
    }
    again.close()

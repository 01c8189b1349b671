"""One set of good inputs for all entry points, and what has to come of a bad one: one line, nothing written."""

import contextlib
import dataclasses
import faulthandler
import importlib.util
import io
import json
import os
import pkgutil
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import traceback
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

TEXT_WIDTH = 16
CAPTIONS = ("a red circle", "a blue square", "two green triangles", "a yellow star")
SECONDS = 30  # beyond which a case hangs, on a machine that has other work too
WITH_PAGE = importlib.util.find_spec("nicegui") is not None  # what `imagen_jax[serve]` brings
MEMORY = 2 * 2**30  # bytes that a test may ask for

CONFIG = """
def get_config(variant=""):
    return {
        "stage": {
            "name": "base8",
            "resolution": 8,
            "max_text_length": 8,
            "network": {
                "kind": "unet",
                "channels": [4],
                "num_res_blocks": [1],
                "self_attention": [False],
                "text_attention": [True],
                "head_channels": 4,
                "embedding_width": 64,
                "text_width": 16,
            },
            "prediction": "v",
        },
        "data": {"path": RECORDS, "batch_size": 8, "num_threads": 1},
        "train": {"steps": 4, "log_every": 1, "checkpoint_every": 2, "sample_every": 0},
    }
"""


class HangsError(BaseException):
    """A case takes too long; no error that anybody catches."""


class ReachedError(BaseException):
    """The command found nothing wrong and would begin its work now."""


@contextlib.contextmanager
def limited_memory():
    """What asks for endless memory gets a MemoryError, before the machine kills it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(autouse=True)
def limits(good):
    """A case that waits for ever, or asks for memory without end, fails."""

    def ring(number, frame):
        raise HangsError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    with limited_memory():
        yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class _FakeEncoder:
    """Embeddings without a network: nothing has to be compiled."""

    width = TEXT_WIDTH

    def __init__(self, name):
        self.name = name

    @property
    def identity(self):
        from imagen_jax.data.encoder_identity import EncoderIdentity

        return EncoderIdentity(width=TEXT_WIDTH, tokenizer="fake", sketches=())

    def encode(self, captions, *, max_length):
        return [np.ones((2, TEXT_WIDTH), np.float32) for _ in captions]

    def count_tokens(self, captions, *, max_length):
        from imagen_jax.text.store import TokenCounts

        return TokenCounts(unknown=(0,) * len(captions), useful=2, computed=2)


def png(seed=0, side=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()


def _make_sources(root):
    pictures = root / "pictures"
    pictures.mkdir()
    lines = []
    for number, caption in enumerate(CAPTIONS * 2):
        (pictures / f"{number}.png").write_bytes(png(number))
        lines.append(json.dumps({"file_name": f"{number}.png", "caption": caption}))
    (pictures / "captions.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copytree(pictures, root / "plain")
    (root / "plain" / "captions.jsonl").unlink()
    for number, caption in enumerate(CAPTIONS * 2):
        (root / "plain" / f"{number}.txt").write_text(caption)
    (root / "tars").mkdir()
    with tarfile.open(root / "tars" / "0.tar", "w") as tar:
        for number, caption in enumerate(CAPTIONS):
            members = (("png", png(number)), ("txt", caption.encode()), ("json", b'{"caption": "x"}'))
            for extension, content in members:
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "rows").mkdir()
    columns = {"image": [png(i) for i in range(4)], "caption": list(CAPTIONS)}
    pq.write_table(pa.table(columns), root / "rows" / "0.parquet")


def _make_records(root):
    from imagen_jax.text.precompute import PrecomputeConfig, precompute

    for name, only in (("records", False), ("embeddings", True)):
        precompute(
            PrecomputeConfig(
                source=f"folder:{root / 'pictures'}",
                text_encoder=str(root / "encoder"),
                out=str(root / name),
                embeddings_only=only,
            ),
            encoder=_FakeEncoder(str(root / "encoder")),
        )


def _make_model(root, random_params):
    from imagen_jax.config import build
    from imagen_jax.models.configs import StageConfig
    from imagen_jax.sampling.model_folder import ModelIndex, save_index, save_stage

    network = {
        "channels": [4],
        "num_res_blocks": [1],
        "self_attention": [False],
        "text_attention": [True],
        "head_channels": 4,
        "embedding_width": 64,
        "text_width": TEXT_WIDTH,
    }
    for name, kind, resolution, low in (("base8", "unet", 8, None), ("sr16", "efficient_unet", 16, 8)):
        values = {
            "name": name,
            "resolution": resolution,
            "low_resolution": low,
            "max_text_length": 8,
            "network": {"kind": kind, **network},
            "prediction": "v",
            "sampling": {"sampler": {"steps": 2}, "guidance_weight": 2.0},
        }
        stage = build(StageConfig, values, name)
        save_stage(root / "model", stage, random_params(stage))
    shutil.copytree(root / "encoder", root / "model" / "text_encoder")
    save_index(root / "model", ModelIndex(stages=("base8", "sr16"), text_encoder="text_encoder"))


def _make_picture(root):
    from imagen_jax.sampling.cascade import Imagen
    from imagen_jax.sampling.drawing import Drawing
    from imagen_jax.sampling.pictures import save_png

    record = Imagen.load(root / "model", cache="off").record(Drawing.of(CAPTIONS[:1]))
    save_png(root / "like.png", np.zeros((16, 16, 3), np.uint8), record.to_metadata())


def _make_run(root):
    """A work directory with one checkpoint, of zeros: drawing weights would be compiled."""
    import jax

    from imagen_jax.parallel.mesh import make_mesh
    from imagen_jax.training.checkpoint import Checkpoints
    from imagen_jax.training.config import load_config
    from imagen_jax.training.config_file import write_config
    from imagen_jax.training.keep import Keep
    from imagen_jax.training.run import Run

    config, workdir = load_config(str(root / "config.py")), epath.Path(root / "run")
    state = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
        Run.of(config, make_mesh(config.mesh)).abstract,
    )
    write_config(workdir, config)
    checkpoints = Checkpoints(workdir, keep=Keep())
    checkpoints.save(2, state._replace(step=state.step + 2), examples=16, config=config)
    checkpoints.wait()
    checkpoints.close()
    (workdir / "init_from.json").write_text(json.dumps({"init_from": "model", "weights": "", "changed": []}))
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n')


def _make_pipeline(root):
    from imagen_jax.convert.deepfloyd.exporting import export_pipeline
    from imagen_jax.models.stage import StageNetwork
    from imagen_jax.text.small import make_small_encoder
    from imagen_jax.training.config import load_config

    encoder = make_small_encoder(root / "encoder96", vocabulary_texts=CAPTIONS, width=96, layers=1)
    stage = load_config("deepfloyd/stage1.py:tiny").stage
    abstract = StageNetwork(stage).abstract_params
    params = {name: np.zeros(leaf.shape, np.float32) for name, leaf in abstract.items()}
    export_pipeline(root / "pipeline", stage, params, text_encoder=str(encoder))


@pytest.fixture(scope="session")
def good(tmp_path_factory, random_params):
    """A folder with a good input of every kind; nobody changes it. Makes it without compiling a network."""
    from imagen_jax.text.small import make_small_encoder

    for name in _WORK:  # imported now, when no alarm is set
        pkgutil.resolve_name(name)
    root = tmp_path_factory.mktemp("hostile") / "good"
    root.mkdir()
    make_small_encoder(root / "encoder", vocabulary_texts=CAPTIONS, width=TEXT_WIDTH, layers=1)
    (root / "config.py").write_text(f"RECORDS = {str(root / 'records')!r}\n{CONFIG}")
    (root / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
    _make_sources(root)
    _make_records(root)
    _make_model(root, random_params)
    _make_picture(root)
    _make_run(root)
    _make_pipeline(root)
    return root


class Place:
    """A copy of the good inputs in which a test may spoil what it likes; the current folder of the command."""

    def __init__(self, good: Path, root: Path):
        self.good, self.root = good, root
        # Links: what spoils a file puts another one in its place.
        shutil.copytree(good, root, copy_function=os.link, symlinks=True)

    def __truediv__(self, name):
        return self.root / name

    def restore(self, name: str) -> None:
        """The good file or folder again."""
        path, good = self.root / name, self.good / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if good.is_dir():
            shutil.copytree(good, path, copy_function=os.link, symlinks=True)
        else:
            os.link(good, path)

    def state(self) -> dict[str, tuple[int, ...]]:
        """All that is there, by name: a file that is written, if only to the same bytes, differs."""
        found = {}
        for folder, folders, names in os.walk(self.root):
            for name in (*folders, *names):
                path = os.path.join(folder, name)
                about = os.lstat(path)
                size = 0 if name in folders else about.st_size
                times = 0 if name in folders else about.st_mtime_ns
                found[os.path.relpath(path, self.root)] = (about.st_mode, about.st_ino, size, times)
        return found


@pytest.fixture
def place(good, tmp_path, monkeypatch):
    made = Place(good, tmp_path / "place")
    monkeypatch.chdir(made.root)
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command did."""

    code: int | None  # None: it raised
    reached: bool = False  # its work: nothing was found wrong
    said: str = ""  # on stderr
    raised: str = ""  # the traceback
    changed: tuple[str, ...] = ()  # names of files that are new, gone or other

    def fault(self, *names: str, may_change: tuple[str, ...] = ()) -> str:
        """What is wrong with it as the answer to a bad input; empty if nothing is.

        Args:
          names: of which the line has to hold one: the flag, the file or the field.
          may_change: beginnings of names of files that the command may write although it fails.
        """
        if self.raised:
            return f"raised {self.raised}"
        if self.reached or self.code == 0:
            return "was not refused"
        # Warnings come before: an older input says less of itself than a new one.
        lines = [each for each in self.said.strip("\n").split("\n") if not each.startswith("warning: ")]
        if not lines:
            return f"said nothing, exit code {self.code}"
        message = lines[-1]
        if self.code not in (1, 2) or (self.code == 1 and len(lines) != 1):
            return f"exit code {self.code}, {len(lines)} lines: {self.said[:600]}"
        if not message.startswith("imagen-jax ") or ": error: " not in message or "Traceback" in self.said:
            return f"no line of an error: {self.said[:600]}"
        if names and not any(name in message for name in names):
            return f"names none of {', '.join(names)}: {message[:600]}"
        changed = (
            [name for name in self.changed if not name.startswith(may_change)] if may_change else self.changed
        )
        return f"changed {', '.join(changed)} and said {message[:300]}" if changed else ""


@contextlib.contextmanager
def _time_limit(state, root):
    """Ends a wait with `HangsError`, also one in a library in another language that heeds no signal."""
    pipes = [os.path.join(root, name) for name, about in state.items() if stat.S_ISFIFO(about[0])]
    # Somebody who opens a pipe for writing ends the wait of those who read it. No thread: they may hold the GIL.
    opener = f"sleep {SECONDS + 1}; for pipe; do : <> $pipe; done"
    helper = subprocess.Popen(["sh", "-c", opener, "sh", *pipes]) if pipes else None
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        if helper is not None:
            helper.kill()
            helper.wait()


def stop(*arguments, **options):
    raise ReachedError


# Where each verb has checked all that it is told, and begins to compute, compile or write.
_WORK = (
    "imagen_jax.sampling.cascade.Imagen.draw",
    "imagen_jax.text.shards.ShardWriter.write",
    "imagen_jax.training.run.Run.init",
    "imagen_jax.training.run.Run.start_from",
    "imagen_jax.training.trainer.MetricsWriter",
    "imagen_jax.training.export.save_stage",
    "imagen_jax.convert.deepfloyd.importing.save_state",
    "imagen_jax.plan.compile.lower",
    "imagen_jax.plan.compile.make_train_step",
    "imagen_jax.quickstart._announce",
    *(("imagen_jax.serving.server.serve",) if WITH_PAGE else ()),
)


@pytest.fixture
def run(place, capsys, monkeypatch):
    """run(argument, …) → Outcome of a command in the current folder, stopped where its work begins."""
    from imagen_jax.cli.main import main

    for name in _WORK:
        monkeypatch.setattr(name, stop)

    def run_one(*arguments):
        before = place.state()
        capsys.readouterr()
        code, reached, raised = None, False, ""
        try:
            with _time_limit(before, place.root):
                code = main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
        except ReachedError:
            reached = True
        except HangsError:
            raised = f"nothing for {SECONDS} s: {traceback.format_exc(limit=-3)}"
        except BaseException:  # noqa: BLE001 - what it is, is the test's finding
            raised = traceback.format_exc(limit=-4)
        said, after = capsys.readouterr().err, place.state()
        changed = tuple(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        for name in changed:
            top = name.split("/")[0]
            if (place.good / top).exists():
                continue
            path = place.root / top
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return Outcome(code=code, reached=reached, said=said, raised=raised, changed=tuple(sorted(changed)))

    return run_one

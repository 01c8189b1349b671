"""Several processes write one folder, and some of them are killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from imagen_jax.data import records
from imagen_jax.data.encoder_identity import EncoderIdentity, sketch
from imagen_jax.data.sources import open_source
from imagen_jax.data.tfrecord import TFRecordReader
from imagen_jax.errors import UserError
from imagen_jax.text import job_folder
from imagen_jax.text import precompute as job
from imagen_jax.text.precompute import PrecomputeConfig, precompute
from imagen_jax.text.store import EmbeddingDtype, TokenCounts
from tests.text.fake_job import contents

SOURCE = "shapes:count=23,resolution=16"

# Imports once and forks for every command: the commands are processes of their own that start in no time.
SERVER = """
import json, os, sys, traceback
from transformers import AutoTokenizer
import imagen_jax.cli.precompute, imagen_jax.text.encoder, imagen_jax.text.precompute
from imagen_jax.cli.main import main
for line in sys.stdin:
    command = json.loads(line)
    if "wait" in command:
        print(os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if not pid:
        log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            code = main(command["run"])
        except BaseException:
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
"""


class Processes:
    def __init__(self, env, log):
        self.log = log
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env={**env, "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _ask(self, **command):
        self._server.stdin.write(json.dumps(command) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def start(self, *argv):
        return self._ask(run=["precompute", *argv], log=str(self.log))

    def wait(self, pid):
        return self._ask(wait=pid)

    def close(self):
        self._server.stdin.close()
        assert self._server.wait(30) == 0


@pytest.fixture
def processes(tmp_path, subprocess_env):
    with contextlib.closing(Processes(subprocess_env(1), tmp_path / "log.txt")) as found:
        yield found


class FakeEncoder:
    name = "fake"
    width = 7
    identity = EncoderIdentity(width=7, tokenizer="lengths", sketches=(sketch(np.arange(7.0)),))

    def encode(self, captions, *, max_length):
        return [np.full((len(caption) % 5 + 1, 7), len(caption), np.float32) for caption in captions]

    def count_tokens(self, captions, *, max_length):
        return TokenCounts(unknown=(0,) * len(captions), useful=1, computed=1)


class Interrupted(FakeEncoder):
    def encode(self, captions, *, max_length):
        raise KeyboardInterrupt


def config(out, **changes):
    values = {"source": SOURCE, "text_encoder": "fake", "out": str(out), "num_shards": 5}
    return PrecomputeConfig(**(values | changes))


def shard_numbers(folder):
    return sorted(int(file.name[-14:-9]) for file in folder.glob("*.tfrecord-*"))


def kill_and_restart(processes, tmp_path, encoder, *, kills, shards, seed, flags=()):
    """Two processes, one of which is killed again and again; compares with one uninterrupted process."""
    rng = np.random.default_rng(seed)
    common = [
        f"--source=shapes:count={6 * shards},resolution=16,objects=1",
        f"--text_encoder={encoder}",
        f"--num_shards={shards}",
        *flags,
    ]
    assert processes.wait(processes.start(*common, f"--out={tmp_path / 'whole'}")) == 0
    out = tmp_path / "shared"

    def start(index):
        return processes.start(*common, f"--out={out}", "--num_processes=2", f"--process_index={index}")

    def complete():
        return len(list((out / "job").glob("captions*.json")))

    running, codes = [start(0), start(1)], []
    for _ in range(kills):
        wanted, deadline = min(complete() + int(rng.integers(0, 3)), shards), time.monotonic() + 300
        while complete() < wanted:
            assert time.monotonic() < deadline, processes.log.read_text()
            time.sleep(0.001)
        time.sleep(rng.exponential(0.02))
        victim = int(rng.integers(2))
        os.kill(running[victim], signal.SIGKILL)
        codes.append(processes.wait(running[victim]))
        running[victim] = start(victim)
    assert [processes.wait(pid) for pid in running] == [0, 0], processes.log.read_text()
    # One that has run ahead of the other may be done before it is to be killed.
    assert set(codes) <= {-signal.SIGKILL, 0} and codes.count(-signal.SIGKILL) >= kills // 2
    assert contents(out) == contents(tmp_path / "whole")
    builder = tfds.builder_from_directory(str(out))
    assert builder.info.splits["train"].num_examples == 6 * shards
    assert builder.info.splits["train"].num_shards == shards
    keys = [
        builder.info.features.deserialize_example_np(reader[i])["key"].decode()
        for reader in map(TFRecordReader, builder.info.splits["train"].filepaths)
        for i in range(len(reader))
    ]
    assert keys == [f"train-{i:08d}" for i in range(6 * shards)]


def test_killed_processes_leave_the_same_bytes(processes, tmp_path, text_encoder):
    kill_and_restart(processes, tmp_path, text_encoder, kills=3, shards=12, seed=0)


@pytest.mark.kill
@pytest.mark.parametrize("flags", [(), ("--dtype=int8",), ("--embeddings_only",)])
def test_killed_twenty_times(processes, tmp_path, text_encoder, flags):
    kill_and_restart(processes, tmp_path, text_encoder, kills=20, shards=80, seed=len(flags), flags=flags)


@pytest.mark.parametrize("embeddings_only", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_each_process_writes_its_shards_and_the_last_one_finishes(tmp_path, order, embeddings_only):
    changes = {"embeddings_only": embeddings_only}
    precompute(config(tmp_path / "whole", **changes), encoder=FakeEncoder())
    out, there = tmp_path / "shared", set()
    for index in order:
        settings = config(out, num_processes=3, process_index=index, **changes)
        summary = precompute(settings, encoder=FakeEncoder())
        there |= set(range(index, 5, 3))
        assert shard_numbers(out) == sorted(there)
        assert (summary.num_shards, summary.num_complete) == (5, len(there))
        assert (out / "dataset_info.json").exists() == summary.complete == (index == order[-1])
        assert 0 < summary.written < 23
    assert summary.captions == 23
    assert contents(out) == contents(tmp_path / "whole")


def test_more_processes_than_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_load_encoder", lambda name: pytest.fail("loaded"))
    summary = precompute(config(tmp_path, num_processes=9, process_index=7))
    assert (summary.captions, summary.num_complete, summary.complete) == (0, 0, False)


def test_an_early_process_says_what_is_missing(processes, tmp_path, text_encoder):
    flags = [
        f"--source={SOURCE}",
        f"--text_encoder={text_encoder}",
        "--num_shards=5",
        f"--out={tmp_path / 'o'}",
    ]
    assert processes.wait(processes.start(*flags, "--num_processes=2", "--process_index=1")) == 0
    assert "shards of other processes are not complete yet: 3 of 5" in processes.log.read_text()
    assert processes.wait(processes.start(*flags, "--num_processes=2", "--process_index=0")) == 0
    assert "23 captions" in processes.log.read_text()


def test_processes_make_the_small_encoder_at_the_same_moment(processes, tmp_path):
    flags = [
        f"--source={SOURCE}",
        f"--text_encoder={tmp_path / 'enc'}",
        "--make_small_encoder",
        "--num_shards=4",
    ]
    flags += [f"--out={tmp_path / 'out'}", "--num_processes=2"]
    pids = [processes.start(*flags, f"--process_index={index}") for index in range(2)]
    assert [processes.wait(pid) for pid in pids] == [0, 0], processes.log.read_text()
    assert records.read_folder_info(tmp_path / "out").split("train").shard_lengths == (5, 6, 6, 6)
    assert not list(tmp_path.rglob("incomplete.*"))


def test_another_number_of_processes_goes_on_with_the_folder(tmp_path):
    precompute(config(tmp_path / "whole"), encoder=FakeEncoder())
    precompute(config(tmp_path / "out", num_processes=4, process_index=3), encoder=FakeEncoder())
    assert precompute(config(tmp_path / "out"), encoder=FakeEncoder()).complete
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    precompute(config(tmp_path / "whole"), encoder=FakeEncoder())
    out = tmp_path / "out"
    precompute(config(out, num_processes=2, process_index=0), encoder=FakeEncoder())
    shard = records.shard_name("captions", "train", 1, 5)
    leftovers = [out / f"incomplete.{shard}", out / "job" / f"incomplete.{shard}.json"]
    leftovers += [out / "incomplete.job.json.0123", out / "incomplete.incomplete.features.json.4567"]
    being_written = out / f"incomplete.{records.shard_name('captions', 'test', 0, 5)}"
    for file in (*leftovers, being_written):
        file.write_text("{cut off")
    precompute(config(out, num_processes=2, process_index=1), encoder=FakeEncoder())
    being_written.unlink()  # it is another split's, and stays
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("embeddings_only", [False, True])
def test_all_finish_at_the_same_moment(tmp_path, embeddings_only):
    settings = config(tmp_path, embeddings_only=embeddings_only)
    precompute(settings, encoder=FakeEncoder())
    before = contents(tmp_path)
    failed = []

    def finish():
        try:
            for _ in range(10):
                precompute(settings)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=finish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert contents(tmp_path) == before


def test_all_start_at_the_same_moment(tmp_path):
    precompute(config(tmp_path / "whole"), encoder=FakeEncoder())
    out, failed, barrier = tmp_path / "out", [], threading.Barrier(5)

    def start(index):
        try:
            barrier.wait()
            precompute(config(out, num_processes=5, process_index=index), encoder=FakeEncoder())
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=start, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert contents(out) == contents(tmp_path / "whole")


def test_temporary_file_removed_by_another_process(tmp_path, monkeypatch):
    """Twice, right before it takes the name that all share."""
    calls = []
    kind = type(epath.Path(tmp_path))
    replace = kind.replace

    def removed_first(self, target):
        calls.append(self)
        if len(calls) <= 2:
            self.unlink()
        return replace(self, target)

    monkeypatch.setattr(kind, "replace", removed_first)
    records.write_shared(tmp_path / "a.json", lambda: [b"one", b"two"])
    assert (tmp_path / "a.json").read_bytes() == b"onetwo"
    assert len(calls) == len(set(calls)) == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_of_two_different_jobs_one_stops(tmp_path):
    """The other job claims the folder while this one writes its first shard."""

    class Slow(FakeEncoder):
        def encode(self, captions, *, max_length):
            other = job._Job(config(tmp_path, dtype=EmbeddingDtype.INT8), open_source(SOURCE))
            job_folder.claim_folder(other.out, "train", other.description)
            return super().encode(captions, max_length=max_length)

    with pytest.raises(UserError, match="--dtype was 'int8', now 'bfloat16'"):
        precompute(config(tmp_path), encoder=Slow())
    assert not list((tmp_path / "job").iterdir())
    assert precompute(config(tmp_path, dtype=EmbeddingDtype.INT8), encoder=FakeEncoder()).complete


def test_split_that_another_split_has_pushed_out(tmp_path):
    class Slow(FakeEncoder):
        def encode(self, captions, *, max_length):
            (tmp_path / "job.json").write_text(json.dumps({**description, "splits": {"test": {}}}))
            return super().encode(captions, max_length=max_length)

    with contextlib.suppress(KeyboardInterrupt):
        precompute(config(tmp_path), encoder=Interrupted())
    description = json.loads((tmp_path / "job.json").read_text())
    with pytest.raises(UserError, match="was taken by another job"):
        precompute(config(tmp_path), encoder=Slow())


def test_embeddings_only_holds_no_pictures(tmp_path):
    for dtype in EmbeddingDtype:
        out = tmp_path / dtype.value
        summary = precompute(config(out, embeddings_only=True, dtype=dtype), encoder=FakeEncoder())
        builder = tfds.builder_from_directory(str(out))
        wanted = {"caption", "key", "text_embedding"}
        assert set(builder.info.features) == wanted | (
            {"text_embedding_scale"} if dtype is EmbeddingDtype.INT8 else set()
        )
        assert builder.info.splits["train"].num_examples == summary.captions == 23
        info = records.read_folder_info(out)
        assert (info.encoder.images, info.encoder.dtype) == (False, dtype.value)
        index = records.KeyIndex(out, "train")
        for number, reader in enumerate(map(TFRecordReader, info.shards("train"))):
            for position in range(len(reader)):
                data = reader[position]
                key = records.parse(data, 7, "here", images=False).key
                found = sum(info.splits["train"].shard_lengths[:number]) + position
                assert index.numbers(key) == [found]
        assert index.numbers("no such key") == []


def test_key_index_that_was_lost_is_made_again(tmp_path):
    settings = config(tmp_path, embeddings_only=True)
    precompute(settings, encoder=FakeEncoder())
    before = contents(tmp_path)
    (tmp_path / "keys-train.npy").unlink()
    with pytest.raises(UserError, match=r"keys-train\.npy: no such file"):
        records.KeyIndex(tmp_path, "train")
    (tmp_path / "job" / f"{records.shard_name('captions', 'train', 2, 5)}.keys").write_bytes(b"12345678")
    precompute(settings, encoder=FakeEncoder())
    assert contents(tmp_path) == before


def test_the_same_key_twice_is_refused(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "a.txt").write_text("a caption")
    for name in ("1.tar", "2.tar"):
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.add(folder / "a.png", "a.png")
            tar.add(folder / "a.txt", "a.txt")
    settings = {"source": f"webdataset:{tmp_path}/*.tar", "num_shards": None}
    with pytest.raises(
        UserError, match=r"the key 'a' occurs twice \(in .*-00000-of-00002 and in .*-00001-of"
    ):
        precompute(config(tmp_path / "out", embeddings_only=True, **settings), encoder=FakeEncoder())
    assert not (tmp_path / "out" / "dataset_info.json").exists()


def test_different_keys_may_share_a_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "key_hash", lambda key: int(key[-1]) % 3)
    precompute(config(tmp_path, embeddings_only=True), encoder=FakeEncoder())
    numbers = records.KeyIndex(tmp_path, "train").numbers("train-00000004")
    assert sorted(numbers) == [i for i in range(23) if i % 10 % 3 == 1]


class Twice(FakeEncoder):
    """Starts the same job again while it writes its first shard."""

    def __init__(self, second):
        self.second, self.errors = second, []

    def encode(self, captions, *, max_length):
        if not self.errors:
            self.errors.append(None)
            with pytest.raises(UserError) as caught:
                precompute(self.second, encoder=FakeEncoder())
            self.errors.append(str(caught.value))
        return super().encode(captions, max_length=max_length)


@pytest.mark.parametrize("changes", [{}, {"num_processes": 2, "process_index": 1}])
def test_the_same_job_twice_at_once_is_refused(tmp_path, changes):
    precompute(config(tmp_path / "whole"), encoder=FakeEncoder())
    out = tmp_path / "out"
    encoder = Twice(config(out, **changes))
    precompute(config(out, **changes), encoder=encoder)
    line = encoder.errors[1]
    assert line.startswith(f"--out {out}: another run") and f"pid {os.getpid()}" in line and "\n" not in line
    assert precompute(config(out), encoder=FakeEncoder()).complete
    assert contents(out) == contents(tmp_path / "whole")


def test_other_numbers_of_processes_at_once_hurt_nobody(tmp_path):
    """They write the same shards, with temporary files of their own."""
    precompute(config(tmp_path / "whole"), encoder=FakeEncoder())
    out = tmp_path / "out"

    class Both(FakeEncoder):
        def encode(self, captions, *, max_length):
            if not list(out.glob("*.tfrecord-*")):
                precompute(config(out, num_processes=5, process_index=0), encoder=FakeEncoder())
            return super().encode(captions, max_length=max_length)

    assert precompute(config(out), encoder=Both()).complete
    assert contents(out) == contents(tmp_path / "whole")


def test_a_killed_job_leaves_no_lock(tmp_path, subprocess_env):
    precompute(config(tmp_path / "whole"), encoder=FakeEncoder())
    out = tmp_path / "out"
    names = [job_folder.lock_name("train", process) for process in ("0-of-1", "3-of-4")]
    code = "import sys, time; from imagen_jax.lock import FolderLock\n"
    code += f"locks = [FolderLock({str(out)!r}, flag='--out', name=name) for name in {names}]\n"
    code += "print('held', flush=True); time.sleep(1000)"
    (out / "job").mkdir(parents=True)
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=subprocess_env()
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"another run is going on in it \(host .*, pid {other.pid}\)"):
        precompute(config(out), encoder=FakeEncoder())
    other.kill()
    other.wait()
    assert precompute(config(out), encoder=FakeEncoder()).complete
    assert contents(out) == contents(tmp_path / "whole")

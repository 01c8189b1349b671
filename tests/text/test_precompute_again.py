"""The same job a second time: after an end at any moment, with another encoder, over a foreign folder."""

import dataclasses
import errno
import json
import os

import pytest

from imagen_jax import files
from imagen_jax.data import records
from imagen_jax.errors import UserError
from imagen_jax.text import precompute as job
from imagen_jax.text.precompute import precompute
from imagen_jax.text.store import EmbeddingDtype
from tests.text.fake_job import DiesAfter, FakeEncoder, config, contents


@pytest.mark.parametrize("lost", [[0], [1, 3], [0, 1, 2, 3]])
def test_restart_writes_only_what_is_missing_with_the_same_bytes(tmp_path, source, lost):
    settings = config(tmp_path, source)
    precompute(settings, encoder=FakeEncoder())
    before = contents(tmp_path / "out")
    for number in lost:
        (tmp_path / "out" / records.shard_name("captions", "train", number, 4)).unlink()
    encoder = FakeEncoder()
    summary = precompute(settings, encoder=encoder)
    assert contents(tmp_path / "out") == before
    assert summary.captions == 17
    assert summary.written == sum([4, 4, 4, 5][number] for number in lost)
    assert 0 < len(encoder.asked) <= summary.written


def test_shard_of_another_size_is_written_again(tmp_path, source):
    settings = config(tmp_path, source)
    precompute(settings, encoder=FakeEncoder())
    before = contents(tmp_path / "out")
    os.truncate(tmp_path / "out" / records.shard_name("captions", "train", 2, 4), 100)
    precompute(settings, encoder=FakeEncoder())
    assert contents(tmp_path / "out") == before


def test_complete_folder_needs_no_encoder(tmp_path, source, monkeypatch):
    settings = config(tmp_path, source)
    precompute(settings, encoder=FakeEncoder())
    monkeypatch.setattr(job, "_load_encoder", lambda name: pytest.fail("loaded"))
    summary = precompute(settings)
    assert (summary.captions, summary.written, summary.captions_per_second) == (17, 0, 0)


def test_interrupted_anywhere_ends_with_the_same_bytes(tmp_path, source):
    precompute(config(tmp_path, source), encoder=FakeEncoder())
    other = config(tmp_path, source, out=str(tmp_path / "other"))
    for calls in (0, 2, 1):
        with pytest.raises(KeyboardInterrupt):
            precompute(other, encoder=DiesAfter(calls))
        assert not list((tmp_path / "other").glob("incomplete.*"))
        assert not (tmp_path / "other" / "dataset_info.json").exists()
    precompute(other, encoder=FakeEncoder())
    assert contents(tmp_path / "other") == contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_length": 3}, "--max_length was 128, now 3"),
        ({"text_encoder": "other"}, "--text_encoder was 'fake', now 'other'"),
        ({"num_shards": 3}, "--num_shards was 4, now 3"),
        ({"limit": 8}, "--limit was None, now 8"),
        ({"name": "other"}, "--name was 'captions', now 'other'"),
        ({"source": "shapes:count=3"}, "--source was 'webdataset:"),
        ({"dtype": EmbeddingDtype.INT8}, "--dtype was 'bfloat16', now 'int8'"),
        ({"embeddings_only": True}, "--embeddings_only was False, now True"),
    ],
)
def test_another_configuration_is_refused(tmp_path, source, changes, named):
    precompute(config(tmp_path, source), encoder=FakeEncoder())
    before = contents(tmp_path / "out")
    with pytest.raises(UserError) as info:
        encoder = FakeEncoder(changes.get("text_encoder", "fake"))
        precompute(config(tmp_path, source, **changes), encoder=encoder)
    assert named in str(info.value)
    assert str(tmp_path / "out") in str(info.value)
    assert "\n" not in str(info.value)
    assert contents(tmp_path / "out") == before


def test_changed_source_is_refused(tmp_path, source):
    precompute(config(tmp_path, source), encoder=FakeEncoder())
    (tmp_path / "tars" / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"the files of --source .* have changed"):
        precompute(config(tmp_path, source), encoder=FakeEncoder())


def test_another_encoder_under_the_same_name_is_refused(tmp_path, source):
    precompute(config(tmp_path, source), encoder=FakeEncoder())
    (tmp_path / "out" / records.shard_name("captions", "train", 1, 4)).unlink()
    other = FakeEncoder()
    other.width = 9
    with pytest.raises(UserError, match="--text_encoder: 'fake' of width 9 is not"):
        precompute(config(tmp_path, source), encoder=other)


def test_wrong_encoder_may_be_corrected_before_the_first_shard(tmp_path, source):
    with pytest.raises(KeyboardInterrupt):
        precompute(config(tmp_path, source, text_encoder="typo"), encoder=DiesAfter(0))
    precompute(config(tmp_path, source), encoder=FakeEncoder())
    assert json.loads((tmp_path / "out" / "job.json").read_text())["text_encoder"] == "fake"


def test_foreign_data_set_is_not_overwritten(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="another origin"):
        precompute(config(tmp_path, source), encoder=FakeEncoder())


@pytest.mark.parametrize("method", ["write", "commit"])
@pytest.mark.parametrize("which", ["-00002-of-", "features.json", "skipped.jsonl", "job.json"])
def test_full_disk_then_the_same_command_again(tmp_path, source, monkeypatch, method, which):
    """The disk fills on one file, anywhere; what is complete stays and the second run ends the job."""
    precompute(config(tmp_path, source, out=str(tmp_path / "whole")), encoder=FakeEncoder())
    original = getattr(files.AtomicFile, method)

    def full(self, *args):
        if which in self.path.name:
            with files._naming_file(self.path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(self, *args)

    monkeypatch.setattr(files.AtomicFile, method, full)
    with pytest.raises(UserError, match=rf"{which}.*No space left on device") as info:
        precompute(config(tmp_path, source), encoder=FakeEncoder())
    assert "\n" not in str(info.value)
    out = tmp_path / "out"
    assert not list(out.rglob("incomplete.*"))
    complete = sorted(out.glob("*.tfrecord-*"))
    assert len(complete) == {"-00002-of-": 2, "features.json": 4, "skipped.jsonl": 4, "job.json": 0}[which]
    monkeypatch.setattr(files.AtomicFile, method, original)
    stamps = {file: file.stat().st_mtime_ns for file in complete}
    precompute(config(tmp_path, source), encoder=FakeEncoder())
    assert contents(out) == contents(tmp_path / "whole")
    assert {file: file.stat().st_mtime_ns for file in complete} == stamps


def without_identity(path, key="identity"):
    """As it was written before text encoders had an identity."""
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("embeddings_only", [False, True])
def test_an_encoder_that_was_replaced_in_its_place_is_refused(tmp_path, source, embeddings_only):
    settings = config(tmp_path, source, embeddings_only=embeddings_only)
    precompute(settings, encoder=FakeEncoder())
    assert records.read_folder_info(tmp_path / "out").encoder.identity == FakeEncoder().identity
    (tmp_path / "out" / records.shard_name("captions", "train", 1, 4)).unlink()
    before, other = contents(tmp_path / "out"), FakeEncoder("replaced")
    # In the same folder, and for another split of it.
    for changes in ({}, {"split": "test"}):
        again = dataclasses.replace(settings, **changes)
        with pytest.raises(UserError) as caught:
            precompute(again, encoder=other)
        message = str(caught.value)
        assert "--text_encoder: 'fake'" in message and str(tmp_path / "out") in message
        assert "embeddings differ" in message and "\n" not in message
        assert not other.asked
    job_json = tmp_path / "out" / "job.json"
    changed = {k: v for k, v in contents(tmp_path / "out").items() if before.get(k) != v}
    assert set(changed) <= {job_json.name}
    precompute(settings, encoder=FakeEncoder())


def test_the_same_encoder_under_another_name_goes_on(tmp_path, source, monkeypatch):
    precompute(config(tmp_path, source), encoder=FakeEncoder())
    (tmp_path / "out" / records.shard_name("captions", "train", 1, 4)).unlink()
    before = records.read_folder_info(tmp_path / "out")
    other = FakeEncoder()
    other.name = "copy"
    moved = config(tmp_path, source, text_encoder="elsewhere/copy")
    assert precompute(moved, encoder=other).written == 4
    after = records.read_folder_info(tmp_path / "out")
    assert after.encoder == dataclasses.replace(before.encoder, text_encoder="elsewhere/copy")
    # What else differs is said without opening the encoder.
    monkeypatch.setattr(job, "_load_encoder", lambda name: pytest.fail("loaded"))
    with pytest.raises(UserError, match="--max_length was 128, now 3"):
        precompute(dataclasses.replace(moved, max_length=3, text_encoder="third"))


def test_an_older_job_goes_on_with_one_warning(tmp_path, source, capsys):
    settings = config(tmp_path, source)
    precompute(settings, encoder=FakeEncoder())
    for report in (tmp_path / "out" / "job").glob("*.json"):
        without_identity(report)
    without_identity(tmp_path / "out" / "metadata.json")
    (tmp_path / "out" / records.shard_name("captions", "train", 1, 4)).unlink()
    with pytest.raises(
        UserError, match="--text_encoder was 'fake', now 'other'"
    ):  # nothing says it is the same
        precompute(config(tmp_path, source, text_encoder="other"), encoder=FakeEncoder())
    capsys.readouterr()
    precompute(settings, encoder=FakeEncoder())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and str(tmp_path / "out") in said[0]
    assert records.read_folder_info(tmp_path / "out").encoder.identity == FakeEncoder().identity


def test_two_encoders_at_the_same_moment_are_noticed_at_the_end(tmp_path, source):
    """Two processes of a job, between whose starts the encoder was replaced; neither saw a shard of the other."""

    class Slow(FakeEncoder):
        def encode(self, captions, *, max_length):
            if not self.asked:
                parallel = dataclasses.replace(settings, num_processes=2, process_index=1)
                precompute(parallel, encoder=FakeEncoder("replaced"))
            return super().encode(captions, max_length=max_length)

    settings = config(tmp_path, source)
    with pytest.raises(
        UserError, match=r"00000-of-00004 and .*00001-of-00004 were made with different encod"
    ):
        precompute(dataclasses.replace(settings, num_processes=2), encoder=Slow())
    assert not (tmp_path / "out" / "dataset_info.json").exists()

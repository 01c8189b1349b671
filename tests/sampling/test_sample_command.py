"""`imagen-jax sample` as a user meets it, on a tiny model."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli.main import main
from imagen_jax.parallel.jax_internals import reset_cache
from imagen_jax.sampling import output
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.sampling.pictures import read_metadata
from imagen_jax.sampling.record import read_record

CIRCLE, SQUARE = "a red circle", "a blue square"


@pytest.fixture(scope="module", autouse=True)
def programs_once(tmp_path_factory):
    """These runs share compiled programs, as a user's do."""
    folder = tmp_path_factory.mktemp("cache")
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: jax.config.values[name] for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGEN_JAX_CACHE", str(folder))
        jax.config.update("jax_compilation_cache_dir", None)
        reset_cache()  # JAX would keep the folder that it was first told
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()
    assert len(list((folder / "xla").iterdir())) > 2


@pytest.fixture
def sample(model_folder, tmp_path, capsys):
    """sample(argument, …, code=0) → what it said; pictures go to tmp_path / "out" unless told otherwise."""

    def run(*arguments, out="out", model=model_folder, code=0):
        capsys.readouterr()
        flags = [f"--out={tmp_path / out}", "--batch_size=1", *([f"--model={model}"] if model else [])]
        assert main(["sample", *map(str, arguments), *flags]) == code
        said = capsys.readouterr()
        return said.err if code else said.out + said.err

    return run


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_files_and_resuming(sample, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = (CIRCLE, SQUARE, "--num_images=2", "--seed=5")
    # Interrupted after three of four pictures.
    saved, save = [], output.save_picture

    def interrupted(place, picture):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(place.path.name)
        save(place, picture)

    with monkeypatch.context() as patch:
        patch.setattr(output, "save_picture", interrupted)
        assert "the same command goes on" in sample(*command, code=130)
    names = [f"00000-a-red-circle-{seed}.png" for seed in (5, 6)] + [
        f"00001-a-blue-square-{seed}.png" for seed in (5, 6)
    ]
    assert sorted(path.name for path in out.iterdir()) == names[:3] == saved
    before = {name: (out / name).stat().st_mtime_ns for name in saved}
    said = sample(*command)
    assert "3 of 4 pictures are there already" in said and "4 pictures in" in said
    assert sorted(path.name for path in out.iterdir()) == [*names, "grid.png", "index.html"]
    assert {name: (out / name).stat().st_mtime_ns for name in saved} == before
    assert pixels(out / "grid.png").shape == (2 * 18 + 2, 2 * 18 + 2, 3)
    # As if it had never been interrupted.
    sample(*command, out="whole")
    for name in names:
        np.testing.assert_array_equal(pixels(out / name), pixels(tmp_path / "whole" / name))


def test_a_picture_says_all_that_makes_it_again(sample, tmp_path, model_folder, stages):
    flags = ("--guidance=3,", "--sampler=,dpmpp", "--grid=,karras", "--steps=4,3", "--aug_level=,0.1")
    sample(CIRCLE, "--seed=9", *flags, "--negative_prompt", SQUARE, "--threshold=static,")
    path = tmp_path / "out" / "00000-a-red-circle-9.png"
    told = read_metadata(path)
    base, sr = (each["sampling"] for each in told["stages"])
    assert (told["prompt"], told["seed"], told["negative_prompt"]) == (CIRCLE, 9, SQUARE)
    assert (base["guidance_weight"], base["sampler"]["steps"], base["threshold"]["kind"]) == (
        3.0,
        4,
        "static",
    )
    assert (sr["sampler"]["kind"], sr["sampler"]["grid"]["kind"], sr["aug_level"]) == ("dpmpp", "karras", 0.1)
    assert told["version"] and len(told["text_encoder"]) == 16 and json.dumps(told)
    # It alone is enough, among others and by name of the model in it.
    sample(f"--like={path}", out="again", model=None)
    np.testing.assert_array_equal(pixels(tmp_path / "again" / path.name), pixels(path))
    # From Python, through what the record says.
    record = read_record(path)
    sampling = {each.name: each.sampling for each in record.stages}
    (made,) = Imagen.load(model_folder).pictures(
        [record.prompt], seed=record.seed, sampling=sampling, negative_prompt=record.negative_prompt
    )
    assert np.abs(made.pixels.astype(int) - pixels(path)).max() <= 1
    # Flags beside --like replace what it says; everything else stays.
    sample(f"--like={path}", "--seed=10", "--guidance=,2", out="changed")
    changed = read_record(tmp_path / "changed" / "00000-a-red-circle-10.png")
    assert [each.sampling.guidance_weight for each in changed.stages] == [3.0, 2.0]
    assert changed.stages[0] == record.stages[0] and changed.negative_prompt == SQUARE


def test_like_refuses_another_model(sample, tmp_path, model_folder, random_params, stages):
    from imagen_jax.sampling.model_folder import save_stage

    sample(CIRCLE, "--until=8")
    path = tmp_path / "out" / "00000-a-red-circle-0.png"
    assert pixels(path).shape == (8, 8, 3)
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    # The stage that the picture never saw may differ.
    params = random_params(stages[1])
    save_stage(other, stages[1], {name: value + 1 for name, value in params.items()})
    sample(f"--like={path}", model=other, out="fine")
    np.testing.assert_array_equal(pixels(tmp_path / "fine" / path.name), pixels(path))
    params = random_params(stages[0])
    save_stage(other, stages[0], {name: value + 1e-3 for name, value in params.items()})
    said = sample(f"--like={path}", model=other, out="refused", code=1)
    assert (
        said.count("\n") == 1 and "is not the model that made the picture" in said and "base8 differs" in said
    )
    assert not (tmp_path / "refused").exists()


def test_other_settings_go_beside(sample, tmp_path):
    first = sample(CIRCLE, "--until=8")
    assert "otherwise" not in first
    before = (tmp_path / "out" / "00000-a-red-circle-0.png").read_bytes()
    said = sample(CIRCLE, "--until=8", "--guidance=5")
    assert "base8.guidance_weight: 2.0 → 5.0" in said and "00000-a-red-circle-0-2.png" in said
    assert (tmp_path / "out" / "00000-a-red-circle-0.png").read_bytes() == before
    assert "1 of 1 picture is there already" in sample(CIRCLE, "--until=8", "--guidance=5")


def test_prompts_from_a_file_and_from_standard_input(sample, tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text(f"\ufeff{CIRCLE}\n\n  一个红色的圆形  \n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{SQUARE}\n"))
    sample("two green triangles", "-", f"--prompts_file={tmp_path / 'list.txt'}", "--until=8")
    made = sorted((tmp_path / "out").glob("0*.png"))
    assert [read_metadata(path)["prompt"] for path in made] == [
        "two green triangles",
        SQUARE,
        CIRCLE,
        "一个红色的圆形",
    ]
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe")
    assert "is not UTF-8 text" in sample(f"--prompts_file={tmp_path / 'list.txt'}", code=1)


def test_previews_and_progress(sample, tmp_path):
    said = sample(CIRCLE, "--preview")
    assert pixels(tmp_path / "out" / "preview.png").shape == (20, 20, 3)
    assert "base8: 100%" in said and "3/3" in said and "sr16: 100%" in said


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--until=32"], "--until 32: the stages make pictures of 8, 16 pixels"),
        (["--rows=3,x"], "--rows 3,x: give one whole number, or one for each of the 2 stages"),
        (["--fsdp=3"], "--fsdp 3 and --rows 1 do not divide the 8 devices"),
        (["--like=gone.png"], "--like gone.png: there is no such file"),
        (["--batch_size=0"], "--batch_size 0"),
        (["--negative_prompt=x", "--guidance=1"], "needs guidance"),
        (["--grid=cosine"], "--grid cosine: 'cosine' is not time, log_snr, karras"),
    ],
)
def test_what_is_wrong_is_named(flags, part, model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["sample", CIRCLE, f"--model={model_folder}", f"--out={out}", *flags]) == 1
    said = capsys.readouterr().err
    assert part in said and said.count("\n") == 1
    assert not out.exists()


def test_without_a_model(capsys, tmp_path):
    assert main(["sample", CIRCLE, f"--out={tmp_path}"]) == 1
    assert "--model is missing" in capsys.readouterr().err


def test_words_without_quotation_marks_are_noticed(sample):
    said = sample("a", "red", "circle", "--until=8")
    assert '3 prompts of one word; a caption of several goes in quotation marks: "a red circle"' in said
    assert "quotation marks" not in sample(CIRCLE, SQUARE, "red", "--until=8")


def test_a_file_in_the_folders_place_is_said(sample, tmp_path):
    (tmp_path / "out").touch()
    assert "is a file; a folder is wanted" in sample(CIRCLE, code=1)


def test_the_model_in_the_package_is_offered_where_it_is_misspelt(sample):
    assert "demmo: there is no such folder (did you mean 'demo'?)" in sample(CIRCLE, model="demmo", code=1)

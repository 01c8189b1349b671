"""Pictures with two sides through a cascade: commands, records and programs."""

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli.main import main
from imagen_jax.errors import UserError
from imagen_jax.sampling import opened
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.sampling.drawing import Drawing
from imagen_jax.sampling.record import read_record
from imagen_jax.sizes import Size, parse_size

PROMPTS = ("a red circle", "a blue square")
WIDE = Size(16, 24)


@pytest.fixture(scope="module")
def imagen(model_folder):
    return Imagen.load(model_folder, cache="off")


def test_the_command_draws_that_size_and_draws_it_again(model_folder, tmp_path):
    flags = [f"--model={model_folder}", "--seed=3"]
    assert main(["sample", PROMPTS[0], f"--out={tmp_path / 'a'}", "--size=24x16", *flags]) == 0
    path = tmp_path / "a" / "00000-a-red-circle-3.png"
    with Image.open(path) as image:
        assert image.size == (24, 16)
    assert read_record(path).size == (24, 16)
    assert main(["sample", f"--like={path}", f"--out={tmp_path / 'b'}", f"--model={model_folder}"]) == 0
    assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
    # Another size is another picture, and the square one says nothing of sizes.
    assert main(["sample", PROMPTS[0], f"--out={tmp_path / 'a'}", *flags]) == 0
    square = read_record(tmp_path / "a" / "00000-a-red-circle-3-2.png")
    assert square.size is None and "size" not in square.to_metadata()


def test_each_stage_draws_its_share_and_a_size_is_compiled_once(imagen, monkeypatch):
    specs = []
    prepare = opened.prepare
    monkeypatch.setattr(opened, "prepare", lambda spec: specs.append(spec) or prepare(spec))
    for _ in range(2):
        pictures = imagen.pictures(PROMPTS, size=WIDE, batch_size=2)
        assert [picture.pixels.shape for picture in pictures] == 2 * [(16, 24, 3)]
    assert [(spec.stage.name, spec.size) for spec in specs] == [("base8", Size(8, 12)), ("sr16", WIDE)]
    imagen.pictures(PROMPTS, size=Size(24, 16), batch_size=2)
    assert len(specs) == 4
    stopped = imagen.pictures(PROMPTS[:1], size=Size(8, 12), until=8, batch_size=2)
    assert stopped[0].pixels.shape == (8, 12, 3)


def test_a_size_that_is_the_square_draws_the_square(imagen):
    plain = imagen.pictures(PROMPTS, seed=5, batch_size=2)
    same = imagen.pictures(PROMPTS, seed=5, size=Size(16, 16), batch_size=2)
    for one, other in zip(plain, same, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)


def test_neither_the_batch_nor_devices_have_a_say(imagen, model_folder):
    from imagen_jax.parallel.mesh import MeshConfig, make_mesh

    together = imagen.pictures(PROMPTS, seed=5, size=WIDE, batch_size=2, keep_x0=True)
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    split = Imagen.load(model_folder, mesh=mesh, cache="off")
    rows = Imagen.load(model_folder, mesh=mesh, rows={"sr16": 2}, cache="off")
    for made in (
        imagen.pictures(PROMPTS, seed=5, size=WIDE, batch_size=1, keep_x0=True),
        split.pictures(PROMPTS, seed=5, size=WIDE, batch_size=2, keep_x0=True),
        rows.pictures(PROMPTS, seed=5, size=WIDE, batch_size=2, keep_x0=True),
    ):
        for one, other in zip(made, together, strict=True):
            np.testing.assert_allclose(one.x0, other.x0, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (Size(16, 21), r"--size 21x16: stage 'base8' .* multiples of 2"),
        (Size(0, 16), r"--size 16x0"),
    ],
)
def test_sizes_that_no_stage_draws_are_refused(imagen, size, message):
    with pytest.raises(UserError, match=message):
        imagen.check(Drawing.of(PROMPTS, size=size))


def test_rows_of_a_size_have_to_be_divided_too(model_folder):
    from imagen_jax.parallel.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    model = Imagen.load(model_folder, mesh=mesh, rows={"sr16": 4}, cache="off")
    with pytest.raises(UserError, match="stage 'sr16': 20 rows cannot be split over 4 devices"):
        model.check(Drawing.of(PROMPTS, size=Size(20, 16)))


@pytest.mark.parametrize(
    "text", ["16", "16x", "x16", "-8x16", "1e3x2", "16x16x3", "0x16", "٣x16", "9999999999x1"]
)
def test_texts_that_are_no_size(text):
    with pytest.raises(UserError, match="--size"):
        parse_size(text, "--size")
    assert parse_size(" 96x64 ", "--size") == parse_size("96×64", "--size") == Size(64, 96)

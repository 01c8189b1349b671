"""From a user's picture, in Python and as a command, on a tiny model."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from imagen_jax.cli.main import main
from imagen_jax.errors import UserError
from imagen_jax.sampling.cascade import Imagen
from imagen_jax.sampling.drawing import Drawing, nearest_size
from imagen_jax.sampling.given import GivenPicture, enlarged, read_mask, read_picture
from imagen_jax.sampling.record import read_record
from imagen_jax.sizes import Size

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def imagen(model_folder, tmp_path_factory):
    return Imagen.load(model_folder, cache=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def half():
    """The right half is to be painted."""
    mask = np.zeros((16, 16), bool)
    mask[:, 8:] = True
    return mask


def arrays(pictures):
    return [np.asarray(picture).astype(int) for picture in pictures]


def test_strength_is_how_much_is_changed(imagen, pixels):
    """Of the last stage alone, by a sampler of enough steps; at full strength nothing of the picture is left."""
    stage = imagen.stages[-1]
    sampler = dataclasses.replace(stage.sampling.sampler, steps=50)
    sampling = {stage.name: dataclasses.replace(stage.sampling, sampler=sampler)}
    picture, away = Image.fromarray(pixels), []
    for strength in (0.02, 0.5, 1.0):
        (drawn,) = imagen.edit(picture, PROMPT, strength=strength, seed=1, sampling=sampling)
        away.append(np.abs(np.asarray(drawn).astype(int) - pixels).mean())
    assert away[0] < 6 and away[0] < away[1] < away[2], away
    fresh = imagen.generate([PROMPT], seed=1, sampling=sampling)
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(fresh[0]))


def test_what_is_known_comes_out_to_the_byte(imagen, pixels, half):
    given = GivenPicture(pixels=pixels, mask=half)
    drawn = arrays(imagen.edit(given, PROMPT, num_images=3, batch_size=2))
    for picture in drawn:
        np.testing.assert_array_equal(picture[:, :8], pixels[:, :8])
    assert np.abs(drawn[0] - drawn[1])[:, 8:].mean() > 1
    # A variation depends on its seed, not on what is drawn beside it.
    again = arrays(imagen.edit(given, PROMPT, seed=2))
    assert np.abs(again[0] - drawn[2]).max() <= 1


def test_the_base_paints_wherever_a_part_of_its_pixel_is_to_be_painted(pixels):
    mask = np.zeros((16, 16), bool)
    mask[5, 9] = True
    small = GivenPicture(pixels=pixels, mask=mask).mask_at(Size(8, 8))
    expected = np.zeros((8, 8, 1))
    expected[2, 4] = 1
    np.testing.assert_array_equal(small, expected)


def test_margins_are_painted_around_the_picture(imagen, pixels):
    (drawn,) = arrays(imagen.edit(enlarged(pixels[:8], 0, 4, 8, 4), PROMPT))
    assert drawn.shape == (16, 24, 3)
    np.testing.assert_array_equal(drawn[4:12, :16], pixels[:8])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((16, 16), (16, 16)),
        ((16, 24), (16, 24)),
        ((17, 16), (16, 16)),
        ((400, 200), (22, 12)),
        ((1, 1), (16, 16)),
    ],
)
def test_a_size_that_the_stages_draw(stages, size, expected):
    """Multiples of 2 here: the base is half as large."""
    found = nearest_size(Size(*size), stages)
    assert found == Size(*expected)


def test_the_command_and_its_record(model_folder, tmp_path, pixels, half, capsys):
    Image.fromarray(pixels).save(tmp_path / "x.png")
    Image.fromarray(half).save(tmp_path / "mask.png")
    flags = [f"--model={model_folder}", "--cache=off", "--batch_size=1"]
    command = ["edit", str(tmp_path / "x.png"), PROMPT, f"--mask={tmp_path / 'mask.png'}", "--seed=4"]
    assert main([*command, f"--out={tmp_path / 'a'}", *flags]) == 0
    said = capsys.readouterr().err
    assert "base8: begins with noise alone, step 0 of 3; 9 network calls" in said
    path = tmp_path / "a" / "00000-a-red-circle-4.png"
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image)[:, :8], pixels[:, :8])
    record = read_record(path)
    assert record.given_file == str(tmp_path / "x.png") and record.mask_file == str(tmp_path / "mask.png")
    assert main(["edit", f"--like={path}", f"--out={tmp_path / 'b'}", *flags]) == 0
    assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()
    # The same command finds its work done.
    assert main([*command, f"--out={tmp_path / 'a'}", *flags]) == 0
    assert "1 of 1 picture is there already" in capsys.readouterr().err
    assert main(["sample", f"--like={path}", f"--out={tmp_path / 'c'}", *flags]) == 1
    assert "imagen-jax edit --like makes it again" in capsys.readouterr().err
    Image.fromarray(255 - pixels).save(tmp_path / "x.png")
    assert main(["edit", f"--like={path}", f"--out={tmp_path / 'c'}", *flags]) == 1
    assert "is not the picture that it was made of" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_sigma_is_said_and_made_again(model_folder, tmp_path, pixels, capsys):
    Image.fromarray(pixels).save(tmp_path / "x.png")
    flags = [f"--model={model_folder}", "--cache=off", "--batch_size=1"]
    command = ["edit", str(tmp_path / "x.png"), PROMPT, "--steps=4", "--strength=0.5,0.25", *flags]
    assert main([*command, f"--out={tmp_path / 'a'}"]) == 0
    said = capsys.readouterr().err
    assert "base8: begins with the picture with noise of sigma 0.707, step 2 of 4; 2 network calls" in said
    assert "sr16: begins with the picture with noise of sigma 0.383, step 3 of 4; 1 network calls" in said
    path = tmp_path / "a" / "00000-a-red-circle-0.png"
    assert main(["edit", f"--like={path}", f"--out={tmp_path / 'b'}", *flags]) == 0
    assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def png(**options):
    buffer = io.BytesIO()
    Image.new(options.pop("mode", "RGB"), (16, 16), **options).save(buffer, "PNG")
    return buffer.getvalue()


BAD = {
    "no picture": ({}, ["there.png", PROMPT], "PICTURE there.png: there is no such file"),
    "no prompt": ({"x.png": png()}, ["x.png"], "give a picture and a prompt"),
    "text": ({"x.png": b"hello"}, ["x.png", PROMPT], "PICTURE x.png is no picture that can be read"),
    "strength 0": ({"x.png": png()}, ["x.png", PROMPT, "--strength=0"], "--strength 0.0: must be above 0"),
    "strength 2": ({"x.png": png()}, ["x.png", PROMPT, "--strength=2"], "--strength 2.0: must be above 0"),
    "strength nan": (
        {"x.png": png()},
        ["x.png", PROMPT, "--strength=nan"],
        "--strength nan: must be above 0",
    ),
    "strength word": ({"x.png": png()}, ["x.png", PROMPT, "--strength=much"], "'much' is not a number"),
    "three strengths": (
        {"x.png": png()},
        ["x.png", PROMPT, "--strength=1,1,1"],
        "one for each of the 2 stages",
    ),
    "another size": (
        {"x.png": png(), "m.png": b""},
        ["x.png", PROMPT, "--mask=m.png"],
        "--mask is of 8×8 pixels and the picture of 16×16",
    ),
    "black": (
        {"x.png": png(), "n.png": png()},
        ["x.png", PROMPT, "--mask=n.png"],
        "--mask is black everywhere",
    ),
    "white": (
        {"x.png": png(), "n.png": png(color="white")},
        ["x.png", PROMPT, "--mask=n.png"],
        "--mask is white everywhere",
    ),
    "transparent": (
        {"x.png": png(), "n.png": png(mode="RGBA", color=(255, 255, 255, 0))},
        ["x.png", PROMPT, "--mask=n.png"],
        "--mask is black everywhere",
    ),
    "both": (
        {"x.png": png()},
        ["x.png", PROMPT, "--mask=x.png", "--outpaint=1,1,1,1"],
        "--mask and --outpaint: give one of them",
    ),
    "margins": (
        {"x.png": png()},
        ["x.png", PROMPT, "--outpaint=1,2"],
        "--outpaint 1,2: give four whole numbers",
    ),
    "no margin": (
        {"x.png": png()},
        ["x.png", PROMPT, "--outpaint=0,0,0,0"],
        "margins must be 0 or more pixels",
    ),
    "inward": (
        {"x.png": png()},
        ["x.png", PROMPT, "--outpaint=-1,0,0,0"],
        "margins must be 0 or more pixels",
    ),
    "resamplings": (
        {"x.png": png()},
        ["x.png", PROMPT, "--resamplings=2"],
        "--resamplings 2: goes with --mask or --outpaint",
    ),
    "no resamplings": (
        {"x.png": png()},
        ["x.png", PROMPT, "--outpaint=2,2,2,2", "--resamplings=0"],
        "--resamplings 0: resamplings must be at least 1, got 0",
    ),
    "like a sampled one": ({"x.png": png()}, ["--like=x.png"], "--like x.png does not say how it was made"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_edited_is_said_in_one_line(case, model_folder, tmp_path, monkeypatch, capsys):
    files, arguments, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        if name == "m.png":
            Image.new("L", (8, 8), 255).save(name)
        else:
            (tmp_path / name).write_bytes(content)
    assert main(["edit", *arguments, f"--model={model_folder}", "--cache=off", "--out=out"]) == 1
    said = capsys.readouterr().err.strip()
    assert message in said.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_mask_is_read_by_brightness_and_what_is_transparent_is_kept(tmp_path):
    image = Image.new("RGBA", (3, 1), (255, 255, 255, 255))
    image.putpixel((1, 0), (255, 255, 255, 0))
    image.putpixel((2, 0), (10, 10, 10, 255))
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), [[True, False, False]])


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "P", "LA"])
def test_pictures_of_all_kinds_are_read(tmp_path, mode):
    image = Image.new(mode, (4, 2), 0) if mode == "I;16" else Image.new("RGB", (4, 2), "black").convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    found = read_picture(path, "PICTURE")
    assert found.shape == (2, 4, 3) and found.max() == 0


def test_a_turned_photograph_is_edited_as_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (4, 2)).save(tmp_path / "x.jpg", exif=exif)
    assert read_picture(tmp_path / "x.jpg", "PICTURE").shape == (4, 2, 3)


def test_a_picture_beyond_the_limit_is_refused_before_it_is_decoded(tmp_path):
    header = bytearray(png())
    header[16:24] = (100_000).to_bytes(4, "big") * 2
    (tmp_path / "x.png").write_bytes(header)
    with pytest.raises(UserError, match=r"PICTURE .*x\.png is no picture that can be read"):
        read_picture(tmp_path / "x.png", "PICTURE")


def test_given_pictures_are_checked(pixels, half):
    masked, plain = GivenPicture(pixels=pixels, mask=half), GivenPicture(pixels=pixels)
    with pytest.raises(UserError, match="1 pictures are given for 2 wanted"):
        Drawing(wanted=((PROMPT, 0), (PROMPT, 1)), given=(plain,))
    with pytest.raises(UserError, match="some have a mask and some have none"):
        Drawing(wanted=((PROMPT, 0), (PROMPT, 1)), given=(plain, masked))
    assert masked.sha256 != plain.sha256

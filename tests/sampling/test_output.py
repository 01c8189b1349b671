"""Files of pictures, and the page that shows them, read with Pillow and an HTML parser."""

import base64
import dataclasses
import html.parser
import io

import numpy as np
import pytest
from etils import epath
from PIL import Image

from imagen_jax.errors import UserError
from imagen_jax.models.configs import SamplingConfig
from imagen_jax.sampling.output import beside, find_place, save_picture, slug, write_contact_sheet, write_grid
from imagen_jax.sampling.pictures import save_png
from imagen_jax.sampling.record import PictureRecord, StageRecord, check_same_model, read_record

RECORD = PictureRecord(
    prompt="a red circle",
    seed=3,
    stages=(StageRecord(name="base", identity="aa", sampling=SamplingConfig()),),
    text_encoder="ee",
    model="model",
)


def picture(side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red circle, on blue!", "a-red-circle-on-blue"),
        ("一个红色的圆形。", "一个红色的圆形"),
        ("../../etc/passwd", "etc-passwd"),
        ("🎨", "empty"),
        ("", "empty"),
        ("word " * 40, "word-" * 9 + "wor"),
    ],
)
def test_names_say_the_prompt_and_stay_in_the_folder(prompt, expected):
    assert slug(prompt) == expected


def test_a_picture_that_is_there_is_found(tmp_path):
    folder = epath.Path(tmp_path)
    place = find_place(folder, 7, RECORD)
    assert (place.path.name, place.there) == ("00007-a-red-circle-3.png", False)
    save_picture(place, picture())
    assert find_place(folder, 7, RECORD).there
    # The folder of the model may have moved; the model is known by its hashes.
    assert find_place(folder, 7, dataclasses.replace(RECORD, model="elsewhere")).there
    # Cut in the middle, it is as if it were not there.
    content = place.path.read_bytes()
    place.path.write_bytes(content[: len(content) // 2])
    again = find_place(folder, 7, RECORD)
    assert (again.path, again.there) == (place.path, False)


def test_pictures_made_otherwise_stay(tmp_path):
    folder = epath.Path(tmp_path)
    first = find_place(folder, 0, RECORD)
    save_picture(first, picture())
    stronger = StageRecord(name="base", identity="aa", sampling=SamplingConfig(guidance_weight=4.0))
    other = dataclasses.replace(RECORD, stages=(stronger,))
    place = find_place(folder, 0, other)
    assert (place.path.name, place.there) == ("00000-a-red-circle-3-2.png", False)
    assert beside(place) == ["base.guidance_weight: 1.35 → 4.0"] and beside(first) == []
    save_picture(place, picture(seed=1))
    assert find_place(folder, 0, other).there and find_place(folder, 0, RECORD).path == first.path
    third = find_place(folder, 0, dataclasses.replace(RECORD, negative_prompt="blue"))
    assert third.path.name == "00000-a-red-circle-3-3.png" and beside(third) == ["negative_prompt"]


class Page(html.parser.HTMLParser):
    """Tags with attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_contact_sheet_stands_alone_and_quotes_prompts(tmp_path):
    folder, prompts = epath.Path(tmp_path), ['<script>alert("x")</script> & "more"', "一个红色的圆形"]
    places = []
    for i, prompt in enumerate(prompts):
        for seed in (3, 4):
            places.append(find_place(folder, i, dataclasses.replace(RECORD, prompt=prompt, seed=seed)))
            save_picture(places[-1], picture(8 if i else 300, seed))
    write_contact_sheet(folder / "index.html", places)
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert "script" not in {tag for tag, _ in page.tags} and "link" not in {tag for tag, _ in page.tags}
    assert [each["alt"] for each in images] == [prompt for prompt in prompts for _ in range(2)]
    assert all(prompt in page.text for prompt in prompts) and page.text.count("seed 3") == 2
    from urllib.parse import unquote

    assert [unquote(link) for link in links] == [place.path.name for place in places]
    assert not any(unquote(link).startswith(("/", "http")) for link in links)
    sizes = []
    for each, place in zip(images, places):
        kind, data = each["src"].split(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            sizes.append(image.size)
            if kind == "data:image/png":
                np.testing.assert_array_equal(np.asarray(image), picture(8, place.record.seed))
    assert sizes == [(256, 256), (256, 256), (8, 8), (8, 8)]


def test_large_grids_are_made_of_thumbnails(tmp_path, monkeypatch):
    monkeypatch.setattr("imagen_jax.sampling.output._GRID_SIDE", 700)
    folder, places = epath.Path(tmp_path), []
    for seed in range(2):
        places.append(find_place(folder, 0, dataclasses.replace(RECORD, seed=seed)))
        save_picture(places[-1], picture(400, seed))
    assert write_grid(folder / "grid.png", places, 2) == 2
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (2 * 258 + 2, 260)
    assert write_grid(folder / "grid.png", places[:1], None) == 1
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (404, 404)


def test_records_of_other_pictures(tmp_path):
    save_png(tmp_path / "plain.png", picture())
    save_png(tmp_path / "old.png", picture(), {"prompt": "a", "seed": 1, "model": "m"})
    save_png(tmp_path / "odd.png", picture(), {**RECORD.to_metadata(), "sead": 1})
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (
        ("gone.png", "there is no such file"),
        ("plain.png", "is not a PNG of imagen-jax sample"),
        ("old.png", "did not write its settings down"),
        ("odd.png", r"sead is not a field \(did you mean 'seed'\?\)"),
        ("text.png", "not a readable picture"),
    ):
        with pytest.raises(UserError, match=f"--like {tmp_path / name}.*{message}"):
            read_record(tmp_path / name)
    save_png(tmp_path / "good.png", picture(), RECORD.to_metadata())
    assert read_record(tmp_path / "good.png") == RECORD


def test_another_model_is_named():
    check_same_model(RECORD, {"base": "aa", "sr": "bb"}, "ee", "here")
    with pytest.raises(UserError, match=r"--model here is not the model .* \(model\): base differs"):
        check_same_model(RECORD, {"base": "ab"}, "ee", "here")
    with pytest.raises(UserError, match=r"base and text encoder differ$"):
        check_same_model(RECORD, {"other": "aa"}, "ef", "here")

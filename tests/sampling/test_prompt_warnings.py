"""What of a prompt the stages do not see is said, on the terminal and in Python."""

import warnings

import numpy as np
import pytest

from imagen_jax.cli.main import main
from imagen_jax.errors import CutTextWarning, UnknownTokensWarning
from imagen_jax.sampling.cascade import Imagen, Picture
from imagen_jax.sampling.drawing import Drawing

LONG = "a red circle a red circle a red circle a blue square"


@pytest.fixture
def blank_pictures(monkeypatch):
    """Pictures are not drawn."""

    def draw(self, drawing, **_):
        for index, (prompt, seed) in enumerate(drawing.wanted):
            yield Picture(index=index, prompt=prompt, seed=seed, pixels=np.zeros((16, 16, 3), np.uint8))

    monkeypatch.setattr(Imagen, "draw", draw)


def test_the_command_says_it_once_a_prompt(model_folder, tmp_path, capsys, blank_pictures):
    flags = ["--negative_prompt=quagga", "--guidance=2", "--num_images=2", f"--out={tmp_path / 'out'}"]
    command = ["sample", LONG, "a red circle", "zebra", "a red circle", f"--model={model_folder}", *flags]
    for _ in range(2):  # the second time the pictures are there, and lack as much
        assert main(command) == 0
        said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
        prefix = "warning: prompt"
        assert said == [
            f"{prefix} {LONG!r} is cut to the 6 tokens of base8 and sr16; left out: "
            "'circle a red circle a blue square'",
            f"{prefix} 'zebra': words unknown to the text encoder: zebra",
            f"{prefix} 'quagga': words unknown to the text encoder: quagga",
        ]


def test_python_warns(model_folder, blank_pictures):
    model = Imagen.load(model_folder)
    with pytest.warns(CutTextWarning, match="is cut to the 6 tokens of base8 and sr16"):
        model.generate([LONG])
    with pytest.warns(UnknownTokensWarning, match="unknown to the text encoder: zebra"):
        model.generate(["a zebra"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(["a red circle"])
    # Each stage has a length of its own.
    eight = "a red circle a red circle a"
    assert model.text_warnings(Drawing.of([eight], until=8)) == []
    [warning] = model.text_warnings(Drawing.of([eight]))
    assert str(warning).endswith("is cut to the 6 tokens of sr16; left out: 'circle a'")
    [warning] = model.text_warnings(Drawing.of(["a red circle " * 100]))
    assert len(str(warning)) < 400 and "\n" not in str(warning)

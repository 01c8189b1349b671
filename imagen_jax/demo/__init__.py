"""The model in the box: a small cascade, installed with the package, that draws the embedded data's captions."""

import os

from etils import epath

NAME = "demo"  # in the place of a model folder, or of a text encoder's
FOLDER = epath.Path(__file__).parent


def packaged(model: epath.PathLike) -> epath.PathLike:
    """The model in the box where "demo" is asked for and there is no folder of that name, else `model`."""
    if os.fspath(model) == NAME and not os.path.isdir(NAME) and (FOLDER / "model_index.json").exists():
        return FOLDER
    return model

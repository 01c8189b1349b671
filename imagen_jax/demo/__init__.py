"""The model in the box: a small cascade, installed with the package, that draws what the embedded data's captions say.

README.md in this folder says how it was trained and what it knows.
"""

import os

from etils import epath

NAME = "demo"  # in the place of a model folder, or of a text encoder's


def packaged(model: epath.PathLike) -> epath.PathLike:
    """The model in the box where "demo" is asked for and there is no folder of that name, else `model`."""
    if os.fspath(model) == NAME and not os.path.isdir(NAME):
        return epath.Path(__file__).parent
    return model

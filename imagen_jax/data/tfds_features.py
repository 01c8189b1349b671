"""What a prepared TFDS data set may make TFDS import: nothing but TFDS's own kinds of features.

TFDS imports the modules that features.json names, wherever they are found: the working directory is one such place.
"""

import itertools
from typing import Any

from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.files import read_json

_OWN = "tensorflow_datasets.core.features."
# In the folder itself, and in VERSION and CONFIG/VERSION below it.
_PLACES = ("features.json", "*/features.json", "*/*/features.json")
_CLASS_FIELDS = ("pythonClassName", "type", "python_class_name")


def check_features(folder: epath.PathLike) -> None:
    """Refuses a data set with a feature of a class that is not TFDS's.

    Args:
      folder: with features.json, or with versions and configs of the data set below it.

    Raises:
      UserError: there is one, or the file is no JSON object; names file and class.
    """
    top = epath.Path(folder)
    for path in itertools.chain.from_iterable(map(top.glob, _PLACES)):
        stack: list[Any] = [read_json(path)]
        while stack:
            value = stack.pop()
            if isinstance(value, list):
                stack += value
            if not isinstance(value, dict):
                continue
            stack += value.values()
            for name in _CLASS_FIELDS:
                if isinstance(found := value.get(name), str) and not found.startswith(_OWN):
                    raise UserError(
                        f"--source: {path}: {name} {found!r} is not one of TFDS's own features, and code of "
                        "others is never run"
                    )

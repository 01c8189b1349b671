"""The config of a work directory, config.json: what the run was started with, in full.

The local paths in it are seen from the work directory, so that they lead to the data from anywhere, and also when
both have been moved together.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from imagen_jax.config import build, differences, to_dict
from imagen_jax.demo import NAME as DEMO
from imagen_jax.errors import UserError
from imagen_jax.files import is_cloud, json_object, make_folder, path_from, read_json, seen_from, write_text
from imagen_jax.training.config import RENAMEABLE, RESUMABLE, TrainConfig

_PATHS = ("path", "embeddings", "text_encoder")  # of config.data
_RELATIVE = "relative_paths"  # beside the config's groups: which of them are seen from the work directory


def _local(name: str, place: str | None) -> bool:
    """Whether the field of that name says a local path."""
    if place is None or is_cloud(place):
        return False
    # Another text encoder than a folder is the hub's, or the one in the box.
    return name != "text_encoder" or (os.path.isdir(os.path.expanduser(place)) and place != DEMO)


def write_config(workdir: epath.Path, config: TrainConfig) -> None:
    """Writes the resolved config as WORKDIR/config.json, by renaming a complete file, unless it is there."""
    make_folder(workdir)
    content = to_dict(config)
    data, relative = content["data"], {}
    for name in _PATHS:
        if _local(name, data[name]) and (seen := path_from(workdir, data[name])) is not None:
            relative[name] = seen
    if relative:
        content |= {"data": data | relative, _RELATIVE: [*relative]}
    path, text = workdir / "config.json", json.dumps(content, indent=2) + "\n"
    if path.exists() and path.read_text() == text:
        return
    write_text(path, text)


def read_config(workdir: epath.PathLike) -> Mapping[str, Any]:
    """The resolved config of a work directory, its paths seen from where the process runs.

    Raises:
      UserError: if there is none, or it is no JSON or none of this kind.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir} is not a work directory of a training run: it has no config.json")
    content = dict(read_json(path))
    names = content.pop(_RELATIVE, [])  # missing: paths are as they were given
    data = dict(json_object(content.get("data", {}), f"{path}: data"))
    for name in names if isinstance(names, list) else ():
        if name in _PATHS and isinstance(data.get(name), str):
            data[name] = seen_from(workdir, data[name])
    return content | ({"data": data} if "data" in content else {})


def _same_paths(config: TrainConfig) -> dict[str, Any]:
    """The config as a dictionary, whose paths can be compared whatever the working directory."""
    content = to_dict(config)
    for name in _PATHS:
        if _local(name, place := content["data"][name]):
            content["data"][name] = os.path.abspath(os.path.expanduser(place))
    return content


def check_same_config(workdir: epath.Path, config: TrainConfig, *, same_encoder: bool = False) -> None:
    """Refuses to go on with a run of another config.

    Args:
      workdir: of the run.
      config: to go on with.
      same_encoder: whether the text encoder is known to be the same one, so that it may be found elsewhere.

    Raises:
      UserError: naming the first field that differs, among those that a resumed run must keep, or that is
        unknown.
    """
    # Through the dataclass: fields that are newer than the run have their defaults, which is how it ran.
    before = build(TrainConfig, read_config(workdir), f"{workdir}/config.json")
    lines = differences(_same_paths(before), _same_paths(config))
    changed = [line for line in lines if not line.startswith(RESUMABLE)]
    if same_encoder:
        changed = [line for line in changed if not line.startswith(RENAMEABLE) or line.endswith("→ None")]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"--workdir {workdir} holds a run of another config: {changed[0]}{more}; "
            "take another --workdir or the old config"
        )

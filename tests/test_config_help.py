"""The help of a config: every field, its default and what is written beside it."""

import dataclasses
import typing

import pytest

from imagen_jax.cli.main import main
from imagen_jax.config_help import _choices, describe, field_comments
from imagen_jax.training.config import TrainConfig


def groups(cls):
    """A dataclass and all that its fields may hold."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for choice in _choices(hint):
            yield from groups(choice)


@pytest.mark.parametrize(
    "cls", sorted(set(groups(TrainConfig)), key=lambda cls: cls.__name__), ids=lambda c: c.__name__
)
def test_every_field_is_described(cls):
    comments = field_comments(cls)
    for field in dataclasses.fields(cls):
        held = _choices(typing.get_type_hints(cls)[field.name])
        assert len(comments[field.name]) >= 4 or held, f"{cls.__name__}.{field.name} has no comment"
    assert cls.__doc__


def test_help_config_prints_fields_defaults_and_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help_config"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "config.seed = 0    (int)\n    of initial weights",
        "config.optimizer.decay = cosine    (constant | cosine | inverse_sqrt)\n",
        "config.data.path = required    (str)\n    folder of records",
        "config.stage.network.kind=efficient_unet: ",
        "config.train.ema_decays = []    ([float, …])",
        "config.optimizer.clip_norm = 1.0    (float | null)\n    largest global gradient norm",
    ):
        assert part in text, part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """Held."""

    # Above it,
    # in two lines.
    size: int = 3
    long: str = "a # b"  # inside


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(Inner):
    """Holds."""

    size: int = 4  # own
    inner: Inner = Inner()  # another
    on: bool = False  # whether


def test_comments_are_found_beside_above_and_in_the_parent():
    assert field_comments(Inner) == {"size": "Above it, in two lines.", "long": "inside"}
    assert field_comments(Outer) == {"size": "own", "long": "inside", "inner": "another", "on": "whether"}
    assert describe(Outer, "o").splitlines() == [
        "o: Holds.",
        "o.size = 4    (int)",
        "    own",
        "o.long = a # b    (str)",
        "    inside",
        "",
        "o.inner: another",
        "o.inner.size = 3    (int)",
        "    Above it, in two lines.",
        "o.inner.long = a # b    (str)",
        "    inside",
        "o.on = false    (bool)",
        "    whether",
    ]

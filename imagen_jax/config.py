"""From nested dictionaries (config files, JSON) to frozen dataclasses and back.

A dataclass that is one choice of several (a network, a schedule) has a class variable `KIND`; its dictionary
carries that name under "kind". One that had more fields once lists them in a class variable `RETIRED`, with the value
that means what is now always so, or `ANY` where none changed a result: dictionaries that say this value still open.
One whose dictionaries had another form once has a class method `from_former` which gives them in today's, and None for
all others.
"""

import dataclasses
import difflib
import enum
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from imagen_jax.errors import UserError
from imagen_jax.limits import shown

T = TypeVar("T")
ANY = object()  # of a retired field: it may have had any value


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A hint " (did you mean 'x'?)" for a misspelt name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def build(cls: type[T], values: Any, where: str) -> T:
    """Builds a dataclass from a dictionary, checking names and types all the way down.

    Args:
      cls: a dataclass; fields may be dataclasses, unions of dataclasses with a `KIND`, enums, tuples, numbers,
        strings, booleans, and any of these or None.
      values: the dictionary; missing fields take their defaults.
      where: what to call the dictionary in messages, such as "config.stage".

    Raises:
      UserError: if it is no dictionary, or for an unknown or missing field or a value of the wrong type,
        naming it in full.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a group of fields, got {shown(values)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    given = {name: value for name, value in values.items() if not (name == "kind" and hasattr(cls, "KIND"))}
    for name, only in getattr(cls, "RETIRED", {}).items():
        if name in given and (value := given.pop(name)) != only and only is not ANY:
            raise UserError(f"{where}.{name} is no field any more and means {only!r} always, got {value!r}")
    for name in given:
        if name not in fields:
            raise UserError(f"{where}.{name} is not a field{nearest(name, fields)}")
    for name, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if no_default and name not in given:
            raise UserError(f"{where}.{name} is missing")
    converted = {name: _value(hints[name], value, f"{where}.{name}") for name, value in given.items()}
    try:
        return cls(**converted)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    """Checks one value against its type hint; gives it in the type of the hint."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(typing.get_args(hint), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} must be a list, got {shown(value)}")
        item = typing.get_args(hint)[0]
        return tuple(_value(item, each, f"{where}[{i}]") for i, each in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            names = ", ".join(str(member.value) for member in hint)
            raise UserError(f"{where} must be one of {names}; got {shown(value)}") from None
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _finite(value, where)
    if hint is int and isinstance(value, int) and value.bit_length() > 63:
        raise UserError(f"{where} must be a number of at most 63 bits, got {shown(value)}")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} must be of type {hint.__name__}, got {shown(value)}")
    return value


def _finite(value: int | float, where: str) -> float:
    """JSON as Python reads it has NaN, Infinity and whole numbers of any length; no config means any of them."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{where} must be a finite number, got {shown(value)}")
    return number


def _union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(option for option in options if option is not type(None))
    kinds = {option.KIND: option for option in options if hasattr(option, "KIND")}
    if not kinds:
        return _value(options[0], value, where)
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a group of fields, got {shown(value)}")
    for option in options:
        if hasattr(option, "from_former") and (translated := option.from_former(value)) is not None:
            value = translated
    kind = value.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{where}.kind must be one of {', '.join(sorted(kinds))}; got {shown(kind)}")
    return build(kinds[kind], value, where)


def to_dict(config: Any) -> Any:
    """The plain dictionary (JSON types only) that `build` makes the same dataclass of."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = {"kind": config.KIND} if hasattr(config, "KIND") else {}
        return values | {
            field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)
        }
    if isinstance(config, enum.Enum):
        return config.value
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    return config


def differences(old: Any, new: Any, where: str = "config") -> list[str]:
    """Lines "name: old → new" for every leaf in which two nested dictionaries differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for name in sorted(old.keys() | new.keys()):
            lines += differences(old.get(name), new.get(name), f"{where}.{name}")
        return lines
    return [] if old == new else [f"{where}: {old!r} → {new!r}"]

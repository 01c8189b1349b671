"""Prints what the fields of a config mean: names, defaults, and the comments written beside them in the source."""

import ast
import dataclasses
import enum
import functools
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from typing import Any

from imagen_jax.config import to_dict

WIDTH = 110  # characters of a line


@functools.cache
def field_comments(cls: type) -> dict[str, str]:
    """The comment of each field of a dataclass: beside it, or in whole lines right above it."""
    comments: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if dataclasses.is_dataclass(each):
            comments |= _own_comments(textwrap.dedent(inspect.getsource(each)))
    return comments


def _own_comments(source: str) -> dict[str, str]:
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    beside: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokens:
        if token.type == tokenize.COMMENT:
            whole_line = not token.line[: token.start[1]].strip()
            (alone if whole_line else beside)[token.start[0]] = token.string.lstrip("# ")
    found = {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        first, last = node.lineno, node.end_lineno or node.lineno
        above = first
        while above - 1 in alone:
            above -= 1
        texts = [alone[line] for line in range(above, first)]
        texts += [beside[line] for line in range(first, last + 1) if line in beside]
        found[node.target.id] = " ".join(texts)
    return found


def _choices(hint: Any) -> list[type]:
    """The dataclasses that a field may hold."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]


def _hint_name(hint: Any) -> str:
    """A type as the user is to read it."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return " | ".join(str(member.value) for member in hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_hint_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"[{_hint_name(typing.get_args(hint)[0])}, …]"
    return "null" if hint is type(None) else hint.__name__


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = to_dict(field.default)
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    if field.default_factory is not dataclasses.MISSING:
        return str(to_dict(field.default_factory()))
    return "required"


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _lines(cls: type, path: str) -> Iterator[str]:
    hints, comments = typing.get_type_hints(cls), field_comments(cls)
    for field in dataclasses.fields(cls):
        name, hint = f"{path}.{field.name}", hints[field.name]
        choices = _choices(hint)
        if not choices:
            yield f"{name} = {_default(field)}    ({_hint_name(hint)})"
            yield from textwrap.wrap(
                comments[field.name], WIDTH, initial_indent="    ", subsequent_indent="    "
            )
            continue
        kinds = [choice.KIND for choice in choices if hasattr(choice, "KIND")]
        yield ""
        yield f"{name}: {comments[field.name] or _summary(choices[0])}"
        if type(None) in typing.get_args(hint):
            yield f"    null unless set; {name}.… = makes it"
        for choice in choices:
            if kinds:
                yield f"\n{name}.kind={choice.KIND}: {_summary(choice)}"  # type: ignore[attr-defined]
            yield from _lines(choice, name)


def describe(cls: type, path: str = "config") -> str:
    """All fields of a dataclass, of the dataclasses in it and so on, one paragraph a field.

    Args:
      cls: the dataclass.
      path: what its fields' names are to begin with.
    """
    return "\n".join([f"{path}: {_summary(cls)}", *_lines(cls, path)])

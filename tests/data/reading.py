"""Reading a source whole."""

import pytest

from imagen_jax.data.examples import Example
from imagen_jax.data.sources import open_source

pa = pytest.importorskip("pyarrow")

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def read_all(spec, count=None, **options):
    source = open_source(spec, **options)
    return [item for unit in source.units(count) for item in source.read(unit)]


def outcomes(items):
    """Keys; of skips with the reason."""
    return [item.key if isinstance(item, Example) else (item.key, item.reason) for item in items]

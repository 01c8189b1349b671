import os

import pytest

from imagen_jax.errors import UserError
from imagen_jax.plan import environment


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    before = dict(os.environ)
    with pytest.raises(UserError, match="pip install libtpu"):
        environment.find_compiler()
    assert dict(os.environ) == before

"""The plan of the house in CONTRIBUTING.md: who imports whom, how long files are, which names of JAX are used where."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "imagen_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# Modules of no folder that every folder may use.
EVERYWHERE = {"config", "errors", "files", "limits", "lock", "progress", "sizes"}


def imports(path):
    """Modules of this package that a file imports, as tuples without the package's name."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "imagen_jax":
            module = tuple(node.module.split(".")[1:])
            for name in node.names:
                whole = (*module, name.name)
                exists = (PACKAGE.joinpath(*whole).with_suffix(".py")).exists()
                if exists or module:
                    yield whole if exists else module
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("imagen_jax."):
                    yield tuple(name.name.split(".")[1:])


def allowed():
    """Of each folder in the table of CONTRIBUTING.md, which others it may import."""
    rows = re.findall(r"^\| `(\w+)/` \| [^|]+ \| ([^|]+) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    return {folder: set(re.findall(r"`(\w+)(?:/|\.py)`", others)) for folder, others in rows}


def test_every_folder_is_in_the_table():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(allowed()) == folders


@pytest.mark.parametrize("folder", allowed())
def test_folders_import_what_the_table_says(folder):
    other = {
        f"{path.relative_to(PACKAGE)}: {'.'.join(module)}"
        for path in (PACKAGE / folder).rglob("*.py")
        for module in imports(path)
        if module[0] not in EVERYWHERE | {folder} | allowed()[folder]
    }
    assert not other


def test_no_import_is_a_circle():
    graph = {
        path.relative_to(PACKAGE).with_suffix("").parts: {
            module for module in imports(path) if PACKAGE.joinpath(*module).with_suffix(".py").exists()
        }
        for path in FILES
        if path.name != "__init__.py"
    }
    open_modules, done = [], set()

    def visit(module):
        assert module not in open_modules, " → ".join(".".join(each) for each in [*open_modules, module])
        if module in done or module not in graph:
            return
        open_modules.append(module)
        for other in sorted(graph[module]):
            visit(other)
        done.add(open_modules.pop())

    for module in graph:
        visit(module)


def test_files_are_not_long():
    long = {
        str(path.relative_to(ROOT)): count
        for path in FILES
        if (count := len(path.read_text().splitlines())) > 450
    }
    assert not long


def test_private_and_experimental_names_of_jax_are_in_one_module():
    names = re.compile(r"jax\._src|jax\.experimental|xla_client|execute_sharded")
    kernels = re.compile(
        r"^ *from jax\.experimental(\.pallas)? import (pallas as pl|tpu as pltpu).*$"
        r"|^ *from jax\.experimental\.pallas\.ops\.tpu\.\w+ import .*$",
        re.M,
    )
    other = [
        str(path.relative_to(ROOT))
        for folder in ("imagen_jax", "benchmarks", "tests", "configs", "launch")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("jax_internals.py", Path(__file__).name)
        and names.search(kernels.sub("", path.read_text()))
    ]
    assert not other

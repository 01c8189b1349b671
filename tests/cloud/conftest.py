"""An object store in memory behind gs://: nothing of a file before it is closed, no folders, no appending."""

import datetime
import importlib
from typing import ClassVar

import pytest
from etils.epath import backend
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class StoredObject(AbstractBufferedFile):
    def _initiate_upload(self):
        self.parts = []

    def _upload_chunk(self, final=False):
        self.parts.append(self.buffer.getvalue())
        if final:
            self.fs.objects[self.path] = b"".join(self.parts)
        return True

    def _fetch_range(self, start, end):
        return self.fs.objects[self.path][start:end]


class ObjectStore(AbstractFileSystem):
    protocol = ("gcs", "gs")
    cachable = False
    objects: ClassVar[dict[str, bytes]] = {}

    def _open(self, path, mode="rb", block_size=2**20, **options):
        # As gcsfs: "a" overwrites.
        return StoredObject(self, path, mode.replace("a", "w"), block_size=block_size)

    def ls(self, path, detail=True, **options):
        path = self._strip_protocol(path)
        modified = datetime.datetime(2026, 1, 1)
        found = {}
        for name, content in self.objects.items():
            if name == path:
                found[name] = {"name": name, "size": len(content), "type": "file", "mtime": modified}
            elif name.startswith(f"{path}/"):
                first, deeper, _ = name.removeprefix(f"{path}/").partition("/")
                kind, size = ("directory", 0) if deeper else ("file", len(content))
                inside = {"name": f"{path}/{first}", "size": size, "type": kind, "mtime": modified}
                found[inside["name"]] = inside
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def cp_file(self, path1, path2, **options):
        self.objects[self._strip_protocol(path2)] = self.objects[self._strip_protocol(path1)]

    def _rm(self, path):
        self.objects.pop(self._strip_protocol(path), None)

    def makedirs(self, path, exist_ok=False):
        raise AssertionError(f"object stores have no folders: {path}")

    def mkdir(self, path, create_parents=True, **options):
        raise AssertionError(f"object stores have no folders: {path}")


@pytest.fixture
def store(monkeypatch):
    """Its objects by name, "bucket/…"; cloud paths that begin with gs:// lead there."""
    monkeypatch.setattr(ObjectStore, "objects", {})
    registry = importlib.import_module("fsspec.registry")  # fsspec.registry is something in it
    monkeypatch.setitem(registry._registry, "gcs", ObjectStore)
    monkeypatch.setitem(registry._registry, "gs", ObjectStore)
    type(backend.fsspec_backend)._get_filesystem.cache_clear()
    yield ObjectStore.objects
    type(backend.fsspec_backend)._get_filesystem.cache_clear()

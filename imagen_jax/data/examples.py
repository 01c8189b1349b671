"""What every source of captioned pictures offers: examples by unit, damaged ones named instead of raised."""

import abc
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A captioned picture as it lies in the source."""

    file: str  # where it comes from, for messages
    key: str  # unique within the source
    image: bytes  # encoded, not yet checked
    captions: tuple[str, ...]  # at least one, none of them empty


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A sample that cannot be used."""

    file: str  # of the source
    key: str  # of the sample; empty if the file as a whole is meant
    reason: str  # the kind of fault in a few words, the same for all samples that share it
    detail: str = ""  # what is particular to this one


class Source(abc.ABC):
    """Captioned pictures, divided into units that are read independently of each other.

    What a unit holds depends on the source and the number of units only, so that each can be read again,
    by any process, with the same result.
    """

    @abc.abstractmethod
    def units(self, count: int | None = None) -> Sequence[Any]:
        """Divides the source into `count` units, in order; None: a count that suits its size."""

    @abc.abstractmethod
    def read(self, unit: Any) -> Iterator[Example | Skipped]:
        """The samples of one unit, in the order of the source."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A short text that changes when the source's files do."""

    @property
    @abc.abstractmethod
    def size(self) -> int | None:
        """Number of samples, where it is known without reading everything."""


def clean_captions(captions: Sequence[Any]) -> tuple[str, ...]:
    """The captions that are text and not empty, without white space around them."""
    return tuple(caption.strip() for caption in captions if isinstance(caption, str) and caption.strip())


def even_ranges(size: int, count: int) -> list[range]:
    """Divides `range(size)` into `count` consecutive ranges whose lengths differ by one at most."""
    bounds = [size * i // count for i in range(count + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]

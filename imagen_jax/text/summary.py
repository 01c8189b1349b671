"""What the embedding job says when it is done."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a split of a record folder holds, and how fast this run was."""

    captions: int  # records of the complete shards
    tokens: int  # of all captions
    unknown: int  # of these, tokens that the encoder's vocabulary lacks
    cut: int  # captions with more tokens than are stored
    encoded: int  # tokens of the captions that were encoded: those distinct within a shard
    computed: int  # tokens the encoder computed for them, padding included
    skipped: Mapping[str, int]  # samples by reason
    samples: (
        int | None
    )  # of the complete shards, used or skipped; None: some shards were made without counting
    num_shards: int  # in all
    num_complete: int  # shards; fewer than num_shards: other processes are not done
    num_bytes: int  # of all complete shards
    written: int  # captions written by this run, the others were there or came from other processes
    seconds: float  # wall time of writing them

    @property
    def complete(self) -> bool:
        """Whether the split is complete, its metadata included."""
        return self.num_complete == self.num_shards

    @property
    def captions_per_second(self) -> float:
        """Captions written by this run per second; 0 if there was nothing left to write."""
        return self.written / self.seconds if self.written else 0.0

    @property
    def bytes_per_caption(self) -> float:
        """Size of a record, pictures included, on average."""
        return self.num_bytes / self.captions if self.captions else 0.0

    @property
    def useful_share(self) -> float:
        """Of the tokens computed, those that are not padding; 0 to 1."""
        return self.encoded / self.computed if self.computed else 1.0

    @property
    def unknown_share(self) -> float:
        """Of all tokens, those that the encoder's vocabulary lacks; 0 to 1."""
        return self.unknown / self.tokens if self.tokens else 0.0

"""Captions encoded beside the training, on its mesh, in place of stored embeddings."""

import collections
import functools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.data.encoder_identity import EncoderIdentity
from imagen_jax.data.pipeline import CUT_TEXTS, Batch, Batches, TextCount
from imagen_jax.parallel.mesh import batch_sharding
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.store import WHOLE_LENGTH

PADDING = -1  # no id of a token
_SHORTEST = (
    8  # tokens: lengths that are compiled are this, doubled until it is max_length, and for longer texts on
)


class OnlineText:
    """A frozen text encoder on the mesh that trains.

    Every process encodes its own examples on its own devices, over which the encoder's parameters are spread:
    no process waits for another, and each may pad to its own batch's longest caption.

    Args:
      encoder: loaded on `mesh.local_mesh`.
      max_length: tokens of the training step's text.
      mesh: of the training.
      padded: whether text is as `StageConfig.padded_text` has it.
    """

    def __init__(self, encoder: TextEncoder, *, max_length: int, mesh: Mesh, padded: bool = False):
        self._encoder, self._max_length, self._padded = encoder, max_length, padded
        self._local = batch_sharding(mesh.local_mesh)
        self._global = batch_sharding(mesh)
        self._finish = jax.jit(functools.partial(_finish, max_length, padded), out_shardings=self._local)

    @classmethod
    def load(
        cls,
        folder_or_hub_id: str | os.PathLike,
        *,
        dtype: str,
        max_length: int,
        mesh: Mesh,
        padded: bool = False,
    ) -> "OnlineText":
        """Opens the encoder.

        Args:
          folder_or_hub_id: see `TextEncoder.load`.
          dtype: float32 or bfloat16: of its parameters, matrix products and embeddings.
          max_length: tokens of the training step's text.
          mesh: of the training.
          padded: whether text is as `StageConfig.padded_text` has it.

        Raises:
          UserError: no such encoder.
        """
        encoder = TextEncoder.load(folder_or_hub_id, dtype=dtype, mesh=mesh.local_mesh)
        return cls(encoder, max_length=max_length, mesh=mesh, padded=padded)

    @functools.cached_property
    def null_text(self) -> Float[np.ndarray, "max_length width"] | None:
        """Embeddings of the empty caption, where that is the null text; else None: it is zeros."""
        return self._encoder.encode_padded([""], length=self._max_length)[0] if self._padded else None

    def add_null_text(self, batch: dict[str, Any], examples: int) -> None:
        """Sets `null_text` of a batch, the same for each example, where the null text is the empty caption."""
        if self.null_text is not None:
            batch["null_text"] = np.broadcast_to(self.null_text, (examples, *self.null_text.shape))

    @property
    def identity(self) -> EncoderIdentity:
        """What tells the encoder from others."""
        return self._encoder.identity

    @property
    def width(self) -> int:
        """Of one token's embedding."""
        return self._encoder.width

    def tokenize(
        self, captions: Sequence[str]
    ) -> tuple[Int[np.ndarray, "batch length"], Bool[np.ndarray, "batch max_length"]]:
        """Token ids, padded with `PADDING` to one of few lengths, and the mask at the training step's length.

        Texts are whole, up to `WHOLE_LENGTH` tokens: it is their embeddings that are cut. The length is a function
        of the captions only, so that a batch has the same embeddings whenever it is made.
        """
        if self._padded:
            captions = [caption.lower().strip() for caption in captions]
        # DeepFloyd cuts tokens, and its padding, which counts as text, has to be there.
        rows = self._encoder.tokenize(captions, self._max_length if self._padded else WHOLE_LENGTH)
        longest = max(map(len, rows))
        length = self._max_length if self._padded else min(_SHORTEST, self._max_length)
        while length < longest:
            # No longer than the training step's where that is enough.
            length = min(2 * length, self._max_length if length < self._max_length else WHOLE_LENGTH)
        tokens = np.full((len(rows), length), PADDING, np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        mask = np.arange(self._max_length) < np.array([[len(ids)] for ids in rows])
        return tokens, mask

    def count_cut(self, captions: Sequence[str]) -> int:
        """How many captions have more tokens than the training step's text."""
        return sum(self._encoder.tokenizer.is_longer(captions, self._max_length))

    def embed(
        self, tokens: Int[np.ndarray, "local_batch length"], mask: Bool[np.ndarray, "local_batch max_length"]
    ) -> Float[Array, "batch max_length width"]:
        """Embeddings of this process's examples as its part of the global batch, zero at padding.

        Returns without waiting for the devices.
        """
        ids, whole, kept = jax.device_put((np.maximum(tokens, 0), tokens != PADDING, mask), self._local)
        text = self._finish(self._encoder.encode_tokens(ids, whole), whole, kept)
        if jax.process_count() == 1:
            return text
        shape = (text.shape[0] * jax.process_count(), *text.shape[1:])
        parts = [shard.data for shard in text.addressable_shards]
        return jax.make_array_from_single_device_arrays(shape, self._global, parts)

    def encode(
        self, captions: Sequence[str]
    ) -> tuple[Float[np.ndarray, "batch max_length width"], Bool[np.ndarray, "batch max_length"]]:
        """Embeddings of any number of captions on the host, zero at padding unless that counts, and their mask."""
        if self._padded:
            lower = [caption.lower().strip() for caption in captions]
            text = self._encoder.encode_padded(lower, length=self._max_length)
            return text, np.ones(text.shape[:2], bool)
        rows = self._encoder.encode(captions, max_length=self._max_length, dtype="float32")
        text = np.zeros((len(rows), self._max_length, self.width), np.float32)
        for padded, embedding in zip(text, rows, strict=True):
            padded[: len(embedding)] = embedding
        return text, np.arange(self._max_length) < np.array([[len(row)] for row in rows])


def _finish(
    max_length: int,
    padded: bool,
    text: Float[Array, "batch length width"],
    whole: Bool[Array, "batch length"],
    mask: Bool[Array, "batch max_length"],
) -> Float[Array, "batch max_length width"]:
    """Pads, with zeros as stored embeddings are, or cuts to the length of the training step; not if padding counts."""
    if padded:
        return text
    length = text.shape[1]
    if length > max_length:  # as `cut_embedding`: the end token comes last
        last = jnp.maximum(jnp.sum(whole, axis=1), max_length) - 1
        ends = jnp.take_along_axis(text, last[:, None, None], axis=1)
        text = jnp.concatenate([text[:, : max_length - 1], ends], axis=1)
    longer = jnp.pad(text, ((0, 0), (0, max(0, max_length - length)), (0, 0)))
    return jnp.where(mask[:, :, None], longer, 0)


class TokenizedBatches(Iterator[Batch]):
    """Batches whose captions a thread turns into `tokens` and `text_mask`, ahead of the training step.

    Args:
      batches: with captions; closed together with this.
      online: whose tokenizer.
      ahead: batches made ahead.

    Attributes:
      texts: those of the batches that were taken.
    """

    def __init__(self, batches: Batches, online: OnlineText, *, ahead: int):
        self._batches, self._online, self._ahead = batches, online, ahead
        self.count = batches.count
        self.texts = TextCount()
        # One thread: the order of the batches is theirs.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._waiting: collections.deque[Future[Batch]] = collections.deque()

    def __next__(self) -> Batch:
        while len(self._waiting) < self._ahead + 1:
            self._waiting.append(self._pool.submit(self._make))
        batch = self._waiting.popleft().result()
        self.texts.add(batch)
        return batch

    def _make(self) -> Batch:
        batch: dict[str, Any] = dict(next(self._batches))
        batch.pop("text", None)  # of the encoder that made the records, if there was one
        captions = batch.pop("caption")
        batch["tokens"], batch["text_mask"] = self._online.tokenize(captions)
        batch[CUT_TEXTS] = self._online.count_cut(captions)
        return batch

    def close(self) -> None:
        """Stops the thread and the batches."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._batches.close()

    def __enter__(self) -> "TokenizedBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
from imagen_jax.models.text_form import Text, TextForm, zero_text
from imagen_jax.parallel.mesh import batch_sharding
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.store import WHOLE_LENGTH
from imagen_jax.text.tokenizer import cut_tokens

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
      form: of the stage's texts.
      mesh: of the training.
    """

    def __init__(self, encoder: TextEncoder, *, form: TextForm, mesh: Mesh):
        self._encoder, self._form = encoder, form
        self._local = batch_sharding(mesh.local_mesh)
        self._global = batch_sharding(mesh)
        self._finish = jax.jit(functools.partial(_finish, form), out_shardings=self._local)

    @classmethod
    def load(
        cls,
        folder_or_hub_id: str | os.PathLike,
        *,
        dtype: str,
        form: TextForm,
        mesh: Mesh,
    ) -> "OnlineText":
        """Opens the encoder.

        Args:
          folder_or_hub_id: see `TextEncoder.load`.
          dtype: float32 or bfloat16: of its parameters, matrix products and embeddings.
          form: of the stage's texts.
          mesh: of the training.

        Raises:
          UserError: no such encoder.
        """
        encoder = TextEncoder.load(folder_or_hub_id, dtype=dtype, mesh=mesh.local_mesh, copied=False)
        return cls(encoder, form=form, mesh=mesh)

    @functools.cached_property
    def null_text(self) -> Text:
        """The form's, encoded where it is a caption."""
        if self._form.null_caption is None:
            return zero_text(self._form.length, self.width)
        text, mask = self.encode([self._form.null_caption])
        return Text(text[0], mask[0])

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
    ) -> tuple[Int[np.ndarray, "batch length"], Bool[np.ndarray, "batch max_length"], int]:
        """Token ids, padded with `PADDING` to one of few lengths, what of the step's text counts, and how many are cut.

        Texts are whole, up to `WHOLE_LENGTH` tokens: it is their embeddings that are cut. The length is a function
        of the captions only, so that a batch has the same embeddings whenever it is made.
        """
        form, most = self._form, self._form.length
        rows = self._encoder.tokenize([form.normalise(caption) for caption in captions], WHOLE_LENGTH + 1)
        cut = sum(len(ids) > most for ids in rows)
        # DeepFloyd cuts tokens, and its padding, which counts as text, has to be there.
        rows = [cut_tokens(ids, most if form.padded else WHOLE_LENGTH) for ids in rows]
        longest = max(map(len, rows))
        length = most if form.padded else min(_SHORTEST, most)
        while length < longest:
            # No longer than the training step's where that is enough.
            length = min(2 * length, most if length < most else WHOLE_LENGTH)
        tokens = np.full((len(rows), length), PADDING, np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        return tokens, form.mask(np.array([len(ids) for ids in rows])), cut

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

    def encode(self, captions: Sequence[str]) -> Text:
        """Any number of captions on the host, zero at padding unless that counts."""
        return Text(*self._encoder.encode_form(captions, self._form))


def _finish(
    form: TextForm,
    text: Float[Array, "batch length width"],
    whole: Bool[Array, "batch length"],
    mask: Bool[Array, "batch max_length"],
) -> Float[Array, "batch max_length width"]:
    """Pads, with zeros as stored embeddings are, or cuts to the length of the training step; not if padding counts."""
    if form.padded:
        return text
    length, max_length = text.shape[1], form.length
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
        batch["tokens"], batch["text_mask"], batch[CUT_TEXTS] = self._online.tokenize(captions)
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

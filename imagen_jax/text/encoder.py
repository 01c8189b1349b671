"""Captions to embeddings: a Hugging Face tokenizer and the frozen T5 encoder behind one object."""

import collections
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from imagen_jax.data.embeddings import cut_embedding
from imagen_jax.data.encoder_identity import EncoderIdentity
from imagen_jax.demo import packaged
from imagen_jax.errors import UserError
from imagen_jax.models.t5 import T5Config, encode
from imagen_jax.models.t5_weights import load_t5
from imagen_jax.models.text_form import Text, TextForm
from imagen_jax.progress import elapsed
from imagen_jax.text.encoder_folder import copy_encoder, find_encoder, parts
from imagen_jax.text.identity import identify
from imagen_jax.text.store import WHOLE_LENGTH, TokenCounts
from imagen_jax.text.tokenizer import CaptionTokenizer, cut_tokens

# Padded lengths, close where captions are frequent. Beyond the last one, multiples of it.
_BUCKETS = (4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 192, 256)
# Tokens (padding included) of a batch at most: enough for an accelerator's matrix units, and small enough
# that a 4096-wide encoder's activations stay below a gigabyte.
_TOKENS_PER_BATCH = 4096
# Rows of a batch: few, because each pair of rows and length is compiled, and far enough apart that the few
# long captions of a window are not padded to a batch of many.
_ROWS = (1, 8, 32, 128)
# What starting a batch costs, in tokens: more than the padding it may save.
_BATCH_COST = 64
# Parameters are copied to every device where they leave it this share of its memory, for a batch and its program.
# On v5e:2x4 T5-XXL is predicted to take 3 % longer where they are not (benchmarks/compile_t5.py).
_FREE_SHARE = 0.35


class TextEncoder:
    """A tokenizer and a frozen T5 encoder. Made by `load`.

    Attributes:
        folder: where the encoder's files are.
        name: the folder's name or the hub id it was loaded under.
        width: channels of an embedding.
        vocab_size: number of token ids.
        dtype: of the matrix products and, unless `encode` is told otherwise, of the embeddings.
        tokenizer: of its captions.
    """

    folder: epath.Path
    name: str
    width: int
    vocab_size: int
    dtype: str
    tokenizer: CaptionTokenizer

    def __init__(
        self,
        *,
        folder: epath.Path,
        name: str,
        tokenizer: CaptionTokenizer,
        config: T5Config,
        params: dict[str, jax.Array],
        dtype: str,
        mesh: jax.sharding.Mesh | None = None,
        copied: bool = False,
        progress: bool = False,
    ):
        self.folder, self.name, self.dtype = folder, name, dtype
        self.width, self.vocab_size = config.width, config.vocab_size
        self.tokenizer, self._params, self._mesh = tokenizer, params, mesh
        self._copied, self._devices = copied, 1 if mesh is None else mesh.size
        self._encode = jax.jit(
            functools.partial(_encode_as, config, dtype), static_argnames=("dtype", "mesh")
        )
        self._progress, self._compiled = progress, set[tuple[int, ...]]()  # shapes of batches
        self._tokenized: tuple[list[str], list[list[int]]] | None = None

    @classmethod
    def load(
        cls,
        folder_or_hub_id: str | os.PathLike,
        *,
        dtype: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        copied: bool | None = None,
        progress: bool = False,
    ) -> "TextEncoder":
        """Opens an encoder from a local folder or from the hub.

        Args:
            folder_or_hub_id: a folder with config.json, weights and the tokenizer's files; a
                pipeline folder with `text_encoder` and `tokenizer` in it; a hub id such as
                "google/t5-v1_1-small"; or "demo", the encoder of the model in the box.
            dtype: of the parameters and of the matrix products (norms and softmax are float32); None: bfloat16 on
                accelerators, whose memory T5-XXL in float32 would not fit, and float32 on CPUs.
            mesh: of this process's devices, which share each batch; None: one device does everything.
            copied: whether every device of the mesh holds all parameters, or they are spread over them and `encode`
                gathers a layer's when it runs; None: what their memory has room for.
            progress: whether to say how long it compiles.

        Raises:
            UserError: no such folder or hub id, no network, quantised weights, not a T5 encoder, or a
                tokenizer that is not its own or would run code.
        """
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        folder = find_encoder(folder_or_hub_id)
        is_local = epath.Path(packaged(folder_or_hub_id)).is_dir()
        name = folder.name if is_local else os.fspath(folder_or_hub_id)
        model, tokenizer_folder = parts(folder)

        def placement(abstract: dict[str, jax.ShapeDtypeStruct]) -> Any:
            nonlocal copied
            if mesh is None:
                # Even for one device: it spares JAX a small program for each shape.
                return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            copied = _fits(mesh, abstract) if copied is None else copied
            whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            return whole if copied else _spread(mesh, abstract)

        config, params = load_t5(model, dtype=_check_dtype(dtype), shardings=placement)
        return cls(
            folder=model,
            name=name,
            tokenizer=CaptionTokenizer.load(tokenizer_folder, model, rows=config.vocab_size),
            config=config,
            params=params,
            dtype=dtype,
            mesh=mesh,
            copied=bool(copied),
            progress=progress,
        )

    @functools.cached_property
    def identity(self) -> EncoderIdentity:
        """What tells it from other encoders, whatever its name; a few texts are encoded when first asked for."""
        return identify(self)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The tokenizer's pieces and their ids."""
        return self.tokenizer.get_vocab()

    def tokenize(self, captions: Sequence[str], max_length: int) -> list[list[int]]:
        """Token ids of each caption, ending with </s>, at most `max_length` of them, without padding.

        An empty caption is </s> alone.
        """
        return self.tokenizer.tokenize(captions, max_length)

    def count_tokens(self, captions: Sequence[str], *, max_length: int = 128) -> TokenCounts:
        """What `encode` has to do for these captions, how many tokens the vocabulary lacks, and which are cut."""
        kept = min(max_length, WHOLE_LENGTH)
        longer = self._rows(captions)
        rows = [tuple(cut_tokens(ids, WHOLE_LENGTH)) for ids in longer]
        plan = _plan([len(row) for row in dict.fromkeys(rows)], self._devices)
        return TokenCounts(
            unknown=tuple(
                sum(number in self.tokenizer.unknown for number in row[: kept - 1]) for row in rows
            ),
            useful=sum(len(row) for row in set(rows)),
            computed=sum(size * length for _, size, length in plan),
            cut=tuple(len(ids) > kept for ids in longer),
        )

    def encode(
        self,
        captions: Sequence[str],
        *,
        max_length: int = 128,
        dtype: str | None = None,
        progress: bool = False,
    ) -> list[np.ndarray]:
        """Embeddings of captions: of the real tokens only, </s> included.

        Captions are encoded whole, up to `WHOLE_LENGTH` tokens, and longer ones than `max_length` are cut
        afterwards (`cut_embedding`).

        Captions are grouped by length into few compiled shapes; identical ones are encoded once. The
        batches, and so the bytes of the result, depend on the captions of the call only. An
        embedding does not depend on the other captions of the call, up to float32 rounding.

        Args:
            captions: any texts.
            max_length: tokens kept of each, </s> included; beyond `WHOLE_LENGTH` none are.
            dtype: of the result; None: the encoder's. bfloat16 is that of ml_dtypes.
            progress: whether to show a progress bar.

        Returns:
            In the order given, arrays (n_tokens, width). Equal captions share one array.
        """
        wanted = _check_dtype(dtype or self.dtype)
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        rows = [tuple(cut_tokens(ids, WHOLE_LENGTH)) for ids in self._rows(captions)]
        found: dict[tuple[int, ...], np.ndarray] = {}
        waiting: collections.deque[tuple[list[tuple[int, ...]], jax.Array]] = collections.deque()

        def finish_one() -> int:
            done, result = waiting.popleft()
            host = np.asarray(result)
            for i, ids in enumerate(done):
                found[ids] = cut_embedding(host[i, : len(ids)], max_length).copy()
            return len(done)

        with tqdm(total=len(set(rows)), unit="caption", desc="text encoder", disable=not progress) as bar:
            for batch, tokens, mask in _batches(rows, self._devices):
                waiting.append((batch, self._run(tokens, mask, wanted)))
                # One batch runs while the one before it is copied back.
                if len(waiting) > 1:
                    bar.update(finish_one())
            while waiting:
                bar.update(finish_one())
        return [found[ids] for ids in rows]

    def _rows(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids, longer by one than is encoded, so that it shows which are cut; of the last captions once."""
        if self._tokenized is None or self._tokenized[0] != list(captions):
            self._tokenized = list(captions), self.tokenize(captions, WHOLE_LENGTH + 1)
        return self._tokenized[1]

    def encode_form(self, captions: Sequence[str], form: TextForm) -> Text:
        """Captions as a stage has them, float32 (captions, length, width), and what of them counts."""
        captions = [form.normalise(caption) for caption in captions]
        if form.padded:
            text = self.encode_padded(captions, length=form.length)
            return Text(text, np.ones(text.shape[:2], bool))
        rows = self.encode(captions, max_length=form.length, dtype="float32")
        return form.pad(rows, self.width)

    def encode_padded(
        self, captions: Sequence[str], *, length: int
    ) -> Float[np.ndarray, "captions {length} width"]:
        """Embeddings of captions at every position, padding included, as DeepFloyd IF takes them.

        Padding sees the caption's tokens and is seen by none. Each caption is encoded alone: in a larger batch its
        embeddings would depend, by a rounding error, on the captions beside it.

        Args:
            captions: any texts.
            length: tokens that each is padded or cut to, </s> included.

        Returns:
            float32.
        """
        made = []
        for ids in self.tokenize(captions, length):
            tokens = np.zeros((1, length), np.int32)  # 0 is the padding of every T5 tokenizer
            tokens[0, : len(ids)] = ids
            mask = np.arange(length)[None] < len(ids)
            made.append(np.asarray(self._run(tokens, mask, np.dtype(np.float32)))[0])
        return np.stack(made) if made else np.zeros((0, length, self.width), np.float32)

    def encode_tokens(
        self, tokens: Int[jax.Array, "batch length"], mask: Bool[jax.Array, "batch length"]
    ) -> Float[jax.Array, "batch length width"]:
        """Embeddings of one batch that is already on the devices; nothing is copied back.

        Args:
            tokens: ids, padded with any id of the vocabulary.
            mask: True at real tokens.

        Returns:
            In the encoder's dtype; what stands at padding is finite and means nothing. One program is compiled
            per shape.
        """
        return self._encode(self._params, tokens, mask, dtype=jnp.dtype(self.dtype))

    def save_copy(self, folder: epath.PathLike) -> None:
        """Copies config.json, the weights and the tokenizer's files, so that `load(folder)` works."""
        copy_encoder(self.folder, folder)

    def _run(self, tokens: np.ndarray, mask: np.ndarray, dtype: np.dtype) -> jax.Array:
        """Embeddings of one batch, on the devices."""
        new = tokens.shape not in self._compiled
        self._compiled.add(tokens.shape)
        size, length = tokens.shape
        what = f"compiling the text encoder for {size} captions of {length} tokens"
        with elapsed(what, enabled=new and self._progress):
            return self._dispatch(tokens, mask, dtype)

    def _dispatch(self, tokens: np.ndarray, mask: np.ndarray, dtype: np.dtype) -> jax.Array:
        if self._mesh is None:
            return self._encode(self._params, tokens, mask, dtype=dtype)
        shared = tokens.shape[0] % self._mesh.size == 0
        spec = jax.sharding.PartitionSpec(self._mesh.axis_names if shared else None)
        placed = jax.device_put((tokens, mask), jax.sharding.NamedSharding(self._mesh, spec))
        gathers = self._mesh if shared and not self._copied else None
        return self._encode(self._params, *placed, dtype=dtype, mesh=gathers)


def _check_dtype(name: str) -> np.dtype:
    if name not in ("float32", "bfloat16"):
        raise UserError(f"text encoder dtype {name!r}: expected float32 or bfloat16")
    return jnp.dtype(name)


def _encode_as(
    config: T5Config,
    compute_dtype: str,
    params: dict[str, Array],
    tokens: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    *,
    dtype: Any,
    mesh: jax.sharding.Mesh | None = None,
) -> Float[Array, "batch length width"]:
    return encode(config, params, tokens, mask, dtype=compute_dtype, mesh=mesh).astype(dtype)


def _batches(
    rows: Sequence[tuple[int, ...]], devices: int
) -> Iterator[
    tuple[list[tuple[int, ...]], Int[np.ndarray, "batch length"], Bool[np.ndarray, "batch length"]]
]:
    """Distinct rows, the longest first, in batches of few shapes."""
    distinct = sorted(dict.fromkeys(rows), key=len, reverse=True)
    start = 0
    for count, size, length in _plan([len(ids) for ids in distinct], devices):
        batch = distinct[start : start + count]
        start += count
        tokens = np.zeros((size, length), np.int32)
        mask = np.zeros((size, length), np.bool_)
        for i, ids in enumerate(batch):
            tokens[i, : len(ids)] = ids
            mask[i, : len(ids)] = True
        yield batch, tokens, mask


def _plan(lengths: Sequence[int], devices: int = 1) -> list[tuple[int, int, int]]:
    """How to batch texts: (texts in the batch, its rows, its padded length), the longest texts first.

    Among all ways to cut the sorted texts into batches of `_ROWS` rows for every device, the one with the fewest
    tokens computed by each, a batch counting `_BATCH_COST` more: shortest path over the texts.
    """
    ordered = sorted(lengths, reverse=True)
    total = len(ordered)
    costs: list[float] = [0.0] + [float("inf")] * total
    steps: list[tuple[int, int, int]] = [(0, 0, 0)] * (total + 1)
    for start, longest in enumerate(ordered):
        length = _padded_length(longest)
        for rows in _ROWS:
            if rows > _ROWS[1] and rows * length > _TOKENS_PER_BATCH:
                break
            end = min(start + rows * devices, total)
            cost = costs[start] + rows * length + _BATCH_COST
            if cost < costs[end]:
                costs[end], steps[end] = cost, (end - start, rows * devices, length)
            if end == total:
                break
    plan = []
    while total:
        plan.append(steps[total])
        total -= steps[total][0]
    return plan[::-1]


def _padded_length(length: int) -> int:
    for bucket in _BUCKETS:
        if length <= bucket:
            return bucket
    return -(-length // _BUCKETS[-1]) * _BUCKETS[-1]


def _fits(mesh: jax.sharding.Mesh, abstract: dict[str, jax.ShapeDtypeStruct]) -> bool:
    """Whether a copy of all parameters leaves each device of the mesh enough; False where it does not say."""
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in abstract.values())
    for device in mesh.devices.flat:
        stats = device.memory_stats() or {}
        free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
        if needed > (1.0 - _FREE_SHARE) * free:
            return False
    return True


def _spread(mesh: jax.sharding.Mesh, abstract: dict[str, jax.ShapeDtypeStruct]) -> Any:
    """Each parameter over all devices of the mesh, along its largest axis that divides evenly."""

    def sharding(leaf: jax.ShapeDtypeStruct) -> jax.sharding.NamedSharding:
        spec: list[Any] = [None] * len(leaf.shape)
        # The first axis is the vocabulary, or the layers, which the scan would have to gather.
        dividing = [i for i in range(1, len(spec)) if leaf.shape[i] % mesh.size == 0]
        if dividing:
            spec[max(dividing, key=lambda i: leaf.shape[i])] = mesh.axis_names
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return jax.tree.map(sharding, abstract)

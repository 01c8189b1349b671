"""A small text encoder learns what captions say: contrastively, against their pictures (arXiv 2103.00020, section 2.3).

Its captions and pictures are embedded in one space, in which those that belong together are near. What tells a
caption from the others of a batch has to be in its embedding then: with captions in the batch that differ in one
thing, also which adjective goes with which noun. Where a picture has several captions, such as one a language, two
of them are drawn near one another as well: which words belong together is told by that long before a small picture
encoder sees it, and in all languages alike; where things are is told by the pictures alone. The encoder is used frozen
afterwards, as any other.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from tqdm import tqdm

from imagen_jax.data.examples import Example, Source
from imagen_jax.data.pictures import decode_picture, resize
from imagen_jax.data.sources import open_source
from imagen_jax.errors import UserError
from imagen_jax.limits import MAX_BATCH, MAX_SEED, check_numbers
from imagen_jax.models.layers import to_patches
from imagen_jax.models.stage import unit_pictures
from imagen_jax.models.t5 import T5Config, encode
from imagen_jax.models.t5_weights import hub_tensors, load_t5
from imagen_jax.models.weights import save_state
from imagen_jax.sizes import Size
from imagen_jax.text.tokenizer import CaptionTokenizer

_SIDE = 32  # pixels of a picture's side as it is looked at
_WIDTH = 128  # of the space that both are embedded in
_LONGEST = 64  # tokens of a caption that are read
_SCALE, _MAX_LOG_SCALE = 14.0, 4.6  # logits over cosines at the start (1 / 0.07), and their logarithm at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """From what the encoder learns, and how."""

    source: str  # captioned pictures, as `--source` names them; read from the beginning again when they end
    split: str = "train"  # of the source
    steps: int = 3000
    batch_size: int = 128  # consecutive examples of the source
    learning_rate: float = 1e-3  # peak, with a cosine to 0
    warmup_steps: int = 100
    seed: int = 0  # of the picture encoder's weights, and of which of a picture's captions are read

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_numbers(self, batch_size=MAX_BATCH, seed=MAX_SEED)


class PictureEncoder(nnx.Module):
    """A few convolutions: pictures to vectors, only for the encoder of their captions to learn."""

    def __init__(self, *, rngs: nnx.Rngs):
        def conv(inputs: int, outputs: int, stride: int) -> nnx.Conv:
            return nnx.Conv(inputs, outputs, (3, 3), strides=stride, rngs=rngs)

        self.convs = nnx.List([conv(12, 48, 1), conv(48, 96, 2), conv(96, 96, 1), conv(96, 128, 2)])
        self.norms = nnx.List([nnx.LayerNorm(channels, rngs=rngs) for channels in (48, 96, 96, 128)])
        self.out = nnx.Linear(128 * (_SIDE // 8) ** 2, _WIDTH, rngs=rngs)

    def __call__(
        self, pictures: UInt8[Array, "batch height width 3"]
    ) -> Float[Array, "batch embedding_width"]:
        """Vectors of pictures of 32×32 pixels."""
        x = to_patches(unit_pictures(pictures), 2)  # (N, 16, 16, 12)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))  # (N, 16, 16, 48), (N, 8, 8, 96), (N, 8, 8, 96), (N, 4, 4, 128)
        return self.out(x.reshape(len(x), -1))


def contrastive_loss(
    these: Float[Array, "batch embedding_width"],
    others: Float[Array, "batch embedding_width"],
    log_scale: Float[Array, ""],
) -> Float[Array, ""]:
    """Cross-entropy of finding the partner of a vector among the batch's, from both sides, in mean.

    Args:
        these: vectors, such as of captions, of any length above 0.
        others: their partners, such as of the captions' pictures.
        log_scale: natural logarithm of what cosines are multiplied by.
    """
    cosines = _unit(these) @ _unit(others).T
    logits = jnp.exp(jnp.minimum(log_scale, _MAX_LOG_SCALE)) * cosines
    labels = jnp.arange(len(logits))
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(table, labels).mean() for table in (logits, logits.T)
    ]
    return jnp.mean(jnp.stack(losses))


def _unit(vectors: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def pretrain(folder: epath.PathLike, config: PretrainingConfig) -> float:
    """Trains the encoder of a folder that `make_small_encoder` wrote, and writes its weights there.

    The same config and number of processor cores give the same weights. Progress is shown on stderr.

    Args:
        folder: of the encoder.
        config: from what it learns, and how.

    Returns:
        The share of captions whose pictures were found among those of their batch, in the last tenth of the steps.

    Raises:
        UserError: the source has no captioned picture, or the folder no T5 encoder.
    """
    folder = epath.Path(folder)
    source = open_source(config.source, split=config.split, limit=None)
    t5, encoder = load_t5(folder)
    pictures_graph, pictures = nnx.split(PictureEncoder(rngs=nnx.Rngs(config.seed)))
    head = jax.random.normal(jax.random.key(config.seed), (t5.width, _WIDTH)) / t5.width**0.5
    params = {"t5": encoder, "head": head, "pictures": pictures, "log_scales": jnp.full(2, jnp.log(_SCALE))}
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, min(config.warmup_steps, config.steps), config.steps + 1
    )
    optimizer = optax.adam(rate, b2=0.99)

    def loss(params, tokens, pixels):
        flat = tokens.reshape(-1, tokens.shape[-1])  # (captions · N, L)
        text = (_sentence(t5, params["t5"], flat) @ params["head"]).reshape(*tokens.shape[:2], -1)
        seen = nnx.merge(pictures_graph, params["pictures"])(pixels)
        with_picture, with_caption = params["log_scales"]
        losses = [contrastive_loss(captions, seen, with_picture) for captions in text]
        if len(text) == 2:
            losses.append(contrastive_loss(text[0], text[1], with_caption))
        right = (_unit(text[0]) @ _unit(seen).T).argmax(axis=-1) == jnp.arange(len(seen))
        return jnp.mean(jnp.stack(losses)), right.mean()

    @jax.jit
    def step(params, state, tokens, pixels):
        (value, right), gradient = jax.value_and_grad(loss, has_aux=True)(params, tokens, pixels)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value, right

    state, rights = optimizer.init(params), []
    batches = _ahead(_batches(folder, source, config))
    with tqdm(total=config.steps, desc="text encoder", unit="step") as bar:
        for tokens, pixels in itertools.islice(batches, config.steps):
            params, state, value, right = step(params, state, tokens, pixels)
            rights.append(float(right))
            bar.set_postfix_str(f"loss={float(value):.3f}, {100 * rights[-1]:.0f} % right", refresh=False)
            bar.update()
    tensors = hub_tensors(t5, params["t5"])
    save_state(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return float(np.mean(rights[-max(1, config.steps // 10) :]))


def _sentence(
    config: T5Config, params: dict[str, Array], tokens: Int[Array, "batch length"]
) -> Float[Array, "batch width"]:
    """The mean of a caption's embeddings, padding (id 0) left out."""
    mask = tokens != 0
    embeddings = encode(config, params, tokens, mask)
    weights = mask.astype(jnp.float32)[..., None]
    return (embeddings * weights).sum(axis=1) / weights.sum(axis=1)


def _batches(
    folder: epath.Path, source: Source, config: PretrainingConfig
) -> Iterator[tuple[Int[np.ndarray, "captions batch length"], UInt8[np.ndarray, "batch height width 3"]]]:
    """Token ids, padded with 0, and pictures of consecutive examples, without end.

    Two captions a picture (twice the same where it has one only), or one where no picture of the batch has more.
    """
    tokenizer = CaptionTokenizer.load(folder, folder, rows=T5Config.from_folder(folder).vocab_size)
    random = np.random.default_rng(config.seed)
    examples = _examples(source)
    while True:
        chosen = list(itertools.islice(examples, config.batch_size))
        several = min(2, max(len(example.captions) for example in chosen))
        drawn = [
            [example.captions[i] for i in random.permutation(len(example.captions))[:several]]
            for example in chosen
        ]
        captions = [texts[min(i, len(texts) - 1)] for i in range(several) for texts in drawn]
        rows = tokenizer.tokenize(captions, _LONGEST)
        # Few lengths: every one is compiled.
        length = -(-max(map(len, rows)) // 16) * 16
        tokens = np.zeros((len(rows), length), np.int32)
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        side = Size(_SIDE, _SIDE)
        yield (
            tokens.reshape(several, len(chosen), length),
            np.stack([_pixels(example, side) for example in chosen]),
        )


def _pixels(example: Example, size: Size) -> UInt8[np.ndarray, "height width 3"]:
    return resize(decode_picture(example.image), size)


def _examples(source: Source) -> Iterator[Example]:
    """The source's captioned pictures, again and again."""
    while True:
        count = 0
        for unit in source.units():
            for example in source.read(unit):
                if isinstance(example, Example):
                    count += 1
                    yield example
        if not count:
            raise UserError("the text encoder cannot learn from a source without a captioned picture")


def _ahead(items: Iterator) -> Iterator:
    """The same items, the next one made while one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items)
        while True:
            item = coming.result()
            coming = pool.submit(next, items)
            yield item

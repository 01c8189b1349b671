"""The T5 encoder, one implementation for its whole family, driven by the checkpoint's config.json.

T5 v1.0 (arXiv:1910.10683), v1.1 (gated GELU, arXiv:2002.05202), mT5 (arXiv:2010.11934), ByT5
(arXiv:2105.13626) and umT5 (a relative bias in every layer, arXiv:2304.09151). The layers are equal, so
their parameters are stacked along a leading axis and run under `jax.lax.scan`: one layer is compiled,
whatever the depth.

The residual stream, the norms and the softmax are always float32; `dtype` is that of the operands of the
matrix products. Large T5 encoders reach residuals above 1e4, where bfloat16's 8 bits lose whole updates.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.config import build
from imagen_jax.errors import UserError
from imagen_jax.files import json_field, read_json
from imagen_jax.limits import MAX_BLOCKS, MAX_CHANNELS, MAX_VOCABULARY, check_numbers
from imagen_jax.models.weight_files import check_config_is_plain
from imagen_jax.models.weights import flatten_names

# Added to the logits of padding: its exponential is exactly 0 in float32, and a row that is all padding
# stays finite.
_MASKED = -1e9


class Activation(enum.Enum):
    """Non-linearity of the feed-forward layer."""

    RELU = "relu"
    GELU = "gelu"  # exact, with erf
    GELU_TANH = "gelu_new"  # the tanh approximation: what "gated-gelu" means in every T5 config
    SILU = "silu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """Shape of a T5 encoder."""

    vocab_size: int  # rows of the token embedding
    width: int  # d_model: channels of the residual stream
    head_dim: int  # d_kv: channels of one head
    num_heads: int  # heads * head_dim need not be the width
    feed_forward_width: int  # d_ff
    num_layers: int
    activation: Activation = Activation.GELU_TANH
    gated: bool = True  # v1.1 and later: act(x W_gate) * (x W_up)
    bias_per_layer: bool = False  # umT5: every layer has its own relative bias
    num_buckets: int = 32  # relative positions, both directions together
    max_distance: int = 128  # tokens; farther ones share the last bucket
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        for field in ("vocab_size", "width", "head_dim", "num_heads", "feed_forward_width", "num_layers"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise ValueError(f"num_buckets must be a multiple of 4, got {self.num_buckets}")
        check_numbers(
            self,
            vocab_size=MAX_VOCABULARY,
            num_layers=MAX_BLOCKS,
            **dict.fromkeys(("width", "head_dim", "num_heads", "num_buckets"), MAX_CHANNELS),
            feed_forward_width=8 * MAX_CHANNELS,
        )
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(f"max_distance must exceed num_buckets / 4, got {self.max_distance}")
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f"norm_epsilon must be positive and below 1, got {self.norm_epsilon}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "T5Config":
        """From the contents of a Hugging Face config.json.

        Raises:
            UserError: not a T5 encoder, its weights are quantised, or a field is missing or not supported.
        """
        check_config_is_plain(config)
        kind = config.get("model_type")
        if kind not in ("t5", "mt5", "umt5"):
            raise UserError(f"config.json: model_type {kind!r} is not a T5 encoder (t5, mt5 or umt5)")
        fields = ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_layers")
        for field in fields:
            if not isinstance(config.get(field), int) or isinstance(config[field], bool):
                raise UserError(f"config.json: {field} is {config.get(field)!r}, expected a whole number")
        projection = json_field(
            config,
            "feed_forward_proj",
            str,
            "config.json",
            default="relu" if kind == "t5" else "gated-gelu",
        )
        gated = projection.startswith("gated-")
        name = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
        if name not in [activation.value for activation in Activation]:
            raise UserError(f"config.json: feed_forward_proj {projection!r} is not supported")
        values = {
            "vocab_size": config["vocab_size"],
            "width": config["d_model"],
            "head_dim": config["d_kv"],
            "num_heads": config["num_heads"],
            "feed_forward_width": config["d_ff"],
            "num_layers": config["num_layers"],
            "activation": name,
            "gated": gated,
            "bias_per_layer": kind == "umt5",
            "num_buckets": config.get("relative_attention_num_buckets", 32),
            "max_distance": config.get("relative_attention_max_distance", 128),
            "norm_epsilon": config.get("layer_norm_epsilon", 1e-6),
        }
        return build(cls, values, "config.json")

    @classmethod
    def from_folder(cls, folder: epath.PathLike) -> "T5Config":
        """From the config.json of a folder; see `from_dict`."""
        path = epath.Path(folder) / "config.json"
        if not path.exists():
            raise UserError(f"{folder}: no config.json; expected a Hugging Face model folder")
        config = read_json(path)
        try:
            return cls.from_dict(config)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error


_FUNCTIONS = {
    Activation.RELU: jax.nn.relu,
    Activation.GELU: lambda x: jax.nn.gelu(x, approximate=False),
    Activation.GELU_TANH: lambda x: jax.nn.gelu(x, approximate=True),
    Activation.SILU: jax.nn.silu,
}


def relative_position_buckets(
    length: int, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "length length"]:
    """Bucket of each key position relative to each query position, both directions.

    Half of the buckets are for keys after the query; of each half, one half is exact and the other
    logarithmic up to `max_distance` (arXiv:1910.10683, section 2.1). In float32, as the published models
    were trained: in float64 some powers of two fall into the neighbouring bucket.

    Returns:
        (query, key) buckets in [0, num_buckets).
    """
    positions = np.arange(length)
    relative = positions[None, :] - positions[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    scaled = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + scaled.astype(np.int64), half - 1)
    return (np.where(relative > 0, half, 0) + np.where(distance < exact, distance, far)).astype(np.int32)


def _rms_norm(
    x: Float[Array, "batch length width"], scale: Float[Array, " width"], epsilon: float
) -> Float[Array, "batch length width"]:
    """Root mean square norm (arXiv:1910.07467) without mean or bias, in float32."""
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + epsilon) * scale.astype(jnp.float32)[None, None]


class T5Layers(nnx.Module):
    """The encoder's layers: every parameter has a leading axis over them.

    Merged from one layer's slice of the state, the same module computes that layer.
    """

    def __init__(self, config: T5Config, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        depth, width = config.num_layers, config.width
        inner, hidden = config.num_heads * config.head_dim, config.feed_forward_width

        def kernel(*shape: int, std: float) -> nnx.Param:
            # Matrices are (out, in), as they are stored: a large encoder opens several times as fast so.
            return nnx.Param(std * jax.random.normal(rngs.params(), (depth, *shape), param_dtype))

        # The initialisation of the paper's code: T5 has no 1/sqrt(d) in its attention, so the query has it.
        self.attention_norm = nnx.Param(jnp.ones((depth, width), param_dtype))
        self.query = kernel(inner, width, std=(width * config.head_dim) ** -0.5)
        self.key = kernel(inner, width, std=width**-0.5)
        self.value = kernel(inner, width, std=width**-0.5)
        self.attention_out = kernel(width, inner, std=inner**-0.5)
        if config.bias_per_layer:
            self.relative_bias = kernel(config.num_buckets, config.num_heads, std=width**-0.5)
        self.feed_forward_norm = nnx.Param(jnp.ones((depth, width), param_dtype))
        if config.gated:
            self.feed_forward_gate = kernel(hidden, width, std=width**-0.5)
        self.feed_forward_up = kernel(hidden, width, std=width**-0.5)
        self.feed_forward_down = kernel(width, hidden, std=hidden**-0.5)

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        position_bias: Float[Array, "1 heads length length"] | None,
        mask_bias: Float[Array, "batch 1 1 length"],
        buckets: Int[Array, "length length"],
    ) -> Float[Array, "batch length width"]:
        """One layer; both biases are added to the attention logits (None: the layer has its own)."""
        if position_bias is None:
            position_bias = _position_bias(self.relative_bias[...], buckets)
        normed = _rms_norm(x, self.attention_norm[...], self.config.norm_epsilon)
        x = x + self._attend(normed, position_bias, mask_bias)
        return x + self._feed_forward(_rms_norm(x, self.feed_forward_norm[...], self.config.norm_epsilon))

    def _attend(
        self,
        x: Float[Array, "batch length width"],
        position_bias: Float[Array, "1 heads length length"],
        mask_bias: Float[Array, "batch 1 1 length"],
    ) -> Float[Array, "batch length width"]:
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        query = self._matmul(x, self.query[...]).reshape(heads)
        key = self._matmul(x, self.key[...]).reshape(heads)
        value = self._matmul(x, self.value[...]).reshape(heads)
        logits = self._einsum("bqhd,bkhd->bhqk", query, key)
        weights = jax.nn.softmax(logits + position_bias + mask_bias, axis=-1)
        mixed = self._einsum("bhqk,bkhd->bqhd", weights, value)
        return self._matmul(mixed.reshape(*x.shape[:2], -1), self.attention_out[...])

    def _feed_forward(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        function = _FUNCTIONS[self.config.activation]
        hidden = self._matmul(x, self.feed_forward_up[...])
        if self.config.gated:
            hidden = function(self._matmul(x, self.feed_forward_gate[...])) * hidden
        else:
            hidden = function(hidden)
        return self._matmul(hidden, self.feed_forward_down[...])

    def _matmul(self, x: Array, kernel: Array) -> Array:
        return self._einsum("...i,oi->...o", x, kernel)

    def _einsum(self, formula: str, a: Array, b: Array) -> Array:
        """Operands in `dtype`, sums and result in float32."""
        # Accelerators would round float32 operands to bfloat16 or TF32 unless told otherwise.
        precision = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
        return jnp.einsum(
            formula,
            a.astype(self.dtype),
            b.astype(self.dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )


def _position_bias(
    table: Float[Array, "buckets heads"], buckets: Int[Array, "length length"]
) -> Float[Array, "1 heads length length"]:
    return jnp.moveaxis(table.astype(jnp.float32)[buckets], -1, 0)[None]


class T5Encoder(nnx.Module):
    """Token ids to embeddings, as transformers' T5EncoderModel and its relatives compute them.

    Args:
        config: the encoder's shape.
        dtype: of the operands of the matrix products: float32 or bfloat16.
        param_dtype: of the parameters.
        rngs: the stream "params" is drawn from.
    """

    def __init__(
        self, config: T5Config, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.config = config
        shape = (config.vocab_size, config.width)
        self.token_embedding = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype))
        self.layers = T5Layers(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if not config.bias_per_layer:
            bias = jax.random.normal(rngs.params(), (config.num_buckets, config.num_heads), param_dtype)
            self.relative_bias = nnx.Param(config.width**-0.5 * bias)
        self.final_norm = nnx.Param(jnp.ones((config.width,), param_dtype))

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"],
        mesh: Mesh | None = None,
    ) -> Float[Array, "batch length width"]:
        """Embeds token ids.

        Args:
            tokens: ids in [0, vocab_size).
            mask: True at real tokens. Padding never changes a real token's embedding; what comes out at
                padding is finite and means nothing.
            mesh: whose devices share the texts evenly, while each layer's parameters, which are spread over them,
                are gathered when it runs; None: the compiler decides.

        Returns:
            float32 embeddings, after the final norm.
        """
        config = self.config
        buckets = jnp.asarray(
            relative_position_buckets(tokens.shape[1], config.num_buckets, config.max_distance)
        )
        mask_bias = jnp.where(mask[:, None, None, :], 0.0, _MASKED)
        position_bias = None if config.bias_per_layer else _position_bias(self.relative_bias[...], buckets)
        graph, stacked = nnx.split(self.layers)

        def place(tree: Any, spec: PartitionSpec) -> Any:
            return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))

        split = PartitionSpec(None if mesh is None else mesh.axis_names)

        def step(x: Array, layer: nnx.State) -> tuple[Array, None]:
            x, layer = place(x, split), place(layer, PartitionSpec())
            return nnx.merge(graph, layer)(x, position_bias, mask_bias, buckets), None

        x = self.token_embedding[...][tokens].astype(jnp.float32)
        x, _ = jax.lax.scan(step, x, stacked)
        return _rms_norm(x, self.final_norm[...], config.norm_epsilon)


def abstract_t5(
    config: T5Config, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph and abstract parameters of an encoder; nothing is allocated."""
    return nnx.split(
        nnx.eval_shape(lambda: T5Encoder(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)))
    )


def encode(
    config: T5Config,
    params: Mapping[str, Array],
    tokens: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> Float[Array, "batch length width"]:
    """`T5Encoder.__call__` as a pure function of parameters under dotted names, for `jax.jit`."""
    graph, abstract = abstract_t5(config, dtype=dtype)
    named, tree = flatten_names(abstract)
    state = jax.tree.unflatten(tree, [params[name] for name in named])
    return nnx.merge(graph, state)(tokens, mask, mesh)

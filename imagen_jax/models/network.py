"""What every network is: its configuration, the call that all kinds answer, and what they give.

A kind is one file with a `NetworkConfig` that makes its network, and one entry in `models.kinds`.
"""

import abc
import dataclasses
import enum
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from imagen_jax.limits import MAX_CHANNELS, MAX_IMAGE_CHANNELS, check_numbers

Params = dict[str, Any]  # arrays (or their shapes) under dotted names


class Attention(enum.StrEnum):
    """Which implementation of attention a network runs."""

    # On a mesh of TPUs FLASH where the shapes allow it and pictures lie whole, on one of GPUs CUDNN where dtype and
    # shapes allow it, else XLA.
    AUTO = "auto"
    XLA = "xla"  # `jax.nn.dot_product_attention`
    FLASH = "flash"  # `models.flash_attention`; where there is no TPU its kernels are interpreted, slowly
    CUDNN = "cudnn"  # cuDNN's, through `jax.nn.dot_product_attention`; NVIDIA GPUs only


class Remat(enum.StrEnum):
    """What is kept of a block's forward pass for its backward pass."""

    NONE = "none"  # everything
    PRODUCTS = (
        "products"  # results of convolutions, matrix products and attention; the rest is computed again
    )
    BLOCK = "block"  # the block's input only; all of it is computed again


class Gather(enum.StrEnum):
    """When the weights that fsdp splits are made whole, in the dtype of the computation."""

    BLOCK = "block"  # when their block runs, and again for its backward pass: one block's are whole at a time
    ONCE = "once"  # once a step: half the traffic, none of it inside loops, two bytes a parameter of memory


def exact_gelu(x: Array) -> Array:
    """x·Φ(x) with the Gaussian's own distribution function, not its tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


class Activation(enum.StrEnum):
    """Non-linearity of a network."""

    GELU = "gelu"  # exact, with erf
    SILU = "silu"

    @property
    def function(self) -> Callable[[Array], Array]:
        """The function itself."""
        return exact_gelu if self is Activation.GELU else jax.nn.silu


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOutput:
    """What a stage's network says about a noisy picture."""

    prediction: Float[Array, "batch height width channels"]  # of the stage's prediction type
    # How much noise to add: 0 is the posterior's, 1 the forward step's; None: the network learned no variance.
    variance: Float[Array, "batch height width channels"] | None = None


@runtime_checkable
class Network(Protocol):
    """The call that every kind of network answers."""

    def __call__(
        self,
        x_t: Float[Array, "batch height width channels"],
        time: Float[Array, " batch"],
        text: Float[Array, "batch length text_width"],
        mask: Bool[Array, "batch length"],
        *,
        low_res: Float[Array, "batch low_height low_width low_channels"] | None = None,
        aug_time: Float[Array, " batch"] | None = None,
    ) -> Float[Array, "batch height width outputs"]:
        """The network's output, float32; what it means is the stage's prediction type.

        With a learned variance it has twice the picture's channels: the prediction's, then the variance's in
        [−1, 1]. Modules run by `Execution.current()`.

        Args:
          x_t: noisy pictures; both sides divisible by the config's `side_multiple`.
          time: noise level in [0, 1000] (`models.stage.StageNetwork`).
          text: text embeddings.
          mask: True for real tokens.
          low_res: the low-resolution pictures of a super-resolution network.
          aug_time: their noise level in [0, 1000].
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig(abc.ABC):
    """What every kind of network has, and how it is executed."""

    KIND: ClassVar[str]  # its name in configs
    SEES_MASK: ClassVar[bool] = (
        True  # whether padding is told from text; else captions must be padded as trained
    )
    text_width: int  # width of the text encoder's embeddings
    low_res_channels: int = 0  # channels of the low-resolution input; 0: none, a base stage
    image_channels: int = 3  # of the pictures: red, green, blue
    dtype: str = "float32"  # of the computation: "float32" or "bfloat16"
    param_dtype: str = "float32"  # of parameters in memory; "bfloat16" halves them, for drawing pictures only
    attention: Attention = Attention.AUTO  # kernels where the devices have them, unless told otherwise
    remat: Remat = Remat.NONE  # what the backward pass computes again; memory against time, same numbers
    gather: Gather = Gather.BLOCK  # when weights that chips share are made whole; memory against traffic
    learned_variance: bool = False  # beside each channel's output another, which says how much noise to add

    def __post_init__(self) -> None:
        for name in ("text_width", "image_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.low_res_channels < 0:
            raise ValueError(f"low_res_channels must be at least 0, got {self.low_res_channels}")
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(f"{name} must be float32 or bfloat16, got {getattr(self, name)!r}")
        check_numbers(
            self,
            text_width=MAX_CHANNELS,
            low_res_channels=MAX_IMAGE_CHANNELS,
            image_channels=MAX_IMAGE_CHANNELS,
        )

    @property
    @abc.abstractmethod
    def side_multiple(self) -> int:
        """Pixels; both sides of a picture are multiples of it."""

    @abc.abstractmethod
    def make(self, rngs: nnx.Rngs) -> nnx.Module:
        """The network, a module that answers `Network`'s call, with fresh parameters."""

    def runs_in_float32(self, name: str) -> bool:
        """Whether the parameter of that dotted name is used in float32 whatever `dtype` says."""
        del name
        return False

    @property
    def output_channels(self) -> int:
        """Channels of the network's output."""
        return self.image_channels * (2 if self.learned_variance else 1)

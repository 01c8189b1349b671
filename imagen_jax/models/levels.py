"""The shape that all U-Nets share: levels, each at half the side of the one before."""

import dataclasses
from typing import Any, ClassVar

from imagen_jax.limits import MAX_BLOCKS, MAX_CHANNELS, MAX_LEVELS, MAX_SIDE, check_numbers
from imagen_jax.models.network import NetworkConfig


def check_heads(head_channels: int, channels: int, level: int) -> None:
    """Refuses heads that do not divide a level's channels.

    Raises:
      ValueError: naming them.
    """
    if channels % head_channels:
        raise ValueError(
            f"head_channels {head_channels} does not divide {channels} channels of level {level}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelsConfig(NetworkConfig):
    """Shape of a U-Net. Tuples have one entry a level, from full resolution down by twos."""

    # Of configs before networks were kinds; see `config.build`.
    RETIRED: ClassVar[dict[str, Any]] = {"scan": 0, "deepfloyd": None}
    channels: tuple[int, ...]  # channels of each level; Imagen base: 512, 1024, 1536, 2048
    num_res_blocks: tuple[int, ...]  # residual blocks of each level; Imagen base: 3
    self_attention: tuple[bool, ...]  # whether positions attend to each other at this level
    text_attention: tuple[bool, ...]  # whether positions attend to the text at this level
    head_channels: int = 64  # channels of an attention head
    embedding_width: int | None = None  # width of the time and pooled text embedding; None: 4 × channels[0]
    patch_size: int = (
        1  # pixels; side of the squares that become channels before the first level (2301.11093, 3.2)
    )

    def __post_init__(self) -> None:
        for name in ("channels", "num_res_blocks", "self_attention", "text_attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # configs and JSON give lists
        levels = len(self.channels)
        if not levels or min(self.channels) < 1 or self.channels[0] % 2:
            raise ValueError(f"channels must be positive, the first even, got {self.channels}")
        super().__post_init__()
        for name in ("head_channels", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_res_blocks", "self_attention", "text_attention"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"{name} needs one entry for each of {levels} levels, got {getattr(self, name)}"
                )
        if levels > MAX_LEVELS:
            raise ValueError(f"channels has {levels} levels; at most {MAX_LEVELS}")
        if min(self.num_res_blocks) < 0:
            raise ValueError(f"num_res_blocks must be at least 0, got {self.num_res_blocks}")
        if self.embedding_width is not None and self.embedding_width < 1:
            raise ValueError(f"embedding_width must be at least 1, got {self.embedding_width}")
        check_numbers(
            self,
            **dict.fromkeys(("channels", "head_channels", "embedding_width"), MAX_CHANNELS),
            num_res_blocks=MAX_BLOCKS,
            patch_size=MAX_SIDE,
        )
        self._check_buildable()

    def _check_buildable(self) -> None:
        """Refuses what the layers refuse: heads and groups that do not divide the channels that they share."""
        for level, channels in enumerate(self.channels):
            if self.self_attention[level] or self.text_attention[level]:
                check_heads(self.head_channels, channels, level)
        if self.width % self.embedding_heads:
            raise ValueError(
                f"{self.embedding_heads} heads, which pool the text, do not divide embedding_width {self.width}"
            )

    @property
    def side_multiple(self) -> int:
        """Pixels; both sides of a picture are multiples of it."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    @property
    def channels_in(self) -> int:
        """Channels that the first convolution sees."""
        return (self.image_channels + self.low_res_channels) * self.patch_size**2

    @property
    def channels_out(self) -> int:
        """Channels that the last convolution gives."""
        return self.output_channels * self.patch_size**2

    @property
    def width(self) -> int:
        """Width of the embedding."""
        return self.embedding_width or 4 * self.channels[0]

    @property
    def embedding_heads(self) -> int:
        """Heads of the attention that pools the text in the embedding's width."""
        return max(1, self.width // self.head_channels)

    def runs_in_float32(self, name: str) -> bool:
        """The last convolution's parameters are: its output is the network's."""
        return name.startswith("conv_out.")

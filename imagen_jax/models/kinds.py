"""The table of networks: a new kind is a file of its own and an entry here."""

from imagen_jax.models.deepfloyd import DeepFloydUNetConfig
from imagen_jax.models.efficient_unet import EfficientUNetConfig
from imagen_jax.models.unet import UNetConfig

AnyNetworkConfig = UNetConfig | EfficientUNetConfig | DeepFloydUNetConfig

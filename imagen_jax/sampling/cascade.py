"""The cascade: from prompts to pictures through all stages of a model folder."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from imagen_jax.config import nearest
from imagen_jax.errors import UserError
from imagen_jax.models.stage import Params, SamplingConfig, StageConfig, StageNetwork
from imagen_jax.parallel.mesh import state_shardings
from imagen_jax.sampling.model_folder import ModelFolder
from imagen_jax.sampling.stage_sampler import StageSampler
from imagen_jax.text.encoder import TextEncoder

MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One generated picture and what makes it again."""

    prompt: str
    seed: int
    pixels: np.ndarray  # uint8 (side, side, 3)

    def image(self) -> Image.Image:
        """As a PIL image."""
        return Image.fromarray(self.pixels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedStage:
    """A stage with its weights in memory."""

    config: StageConfig
    params: Params
    sampler: StageSampler


def _check_numbers(seed: int, num_images: int, batch_size: int) -> None:
    if num_images < 1 or batch_size < 1:
        raise UserError(f"num_images and batch_size must be at least 1, got {num_images} and {batch_size}")
    if seed < 0 or seed + num_images - 1 > MAX_SEED:
        raise UserError(f"seeds must lie in 0 … {MAX_SEED}, got {seed} … {seed + num_images - 1}")


class Imagen:
    """A cascade that makes pictures of prompts.

    `Imagen.load(MODEL).generate(["a red circle"], seed=0)` gives PIL images. Stages are read when they are
    first used.
    """

    def __init__(self, folder: ModelFolder, encoder: TextEncoder, *, mesh: Mesh | None = None):
        widths = {stage.name: stage.network.text_width for stage in folder.stages}
        for name, width in widths.items():
            if width != encoder.width:
                raise UserError(
                    f"{folder.path}: stage {name!r} was trained on embeddings of width {width}, but text encoder "
                    f"{encoder.name!r} gives {encoder.width}"
                )
        self.folder, self.encoder, self._mesh = folder, encoder, mesh
        self._stages: dict[str, LoadedStage] = {}

    @classmethod
    def load(cls, model: epath.PathLike, *, mesh: Mesh | None = None) -> "Imagen":
        """Opens a model folder; with a mesh, weights and batches are spread over it.

        Raises:
          UserError: if the folder or its text encoder is missing or broken, naming it.
        """
        folder = ModelFolder(model)
        try:
            encoder = TextEncoder.load(folder.text_encoder())
        except UserError as error:
            raise UserError(f"{folder.path}: {error}") from error
        return cls(folder, encoder, mesh=mesh)

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """The stages, base first."""
        return self.folder.stages

    def _stage(self, config: StageConfig) -> LoadedStage:
        if config.name not in self._stages:
            network = StageNetwork(config)
            shardings = None if self._mesh is None else state_shardings(network.abstract_params, self._mesh)
            params = self.folder.params(network, shardings)
            if shardings is None:
                params = jax.device_put(params)
            self._stages[config.name] = LoadedStage(
                config=config, params=params, sampler=StageSampler(network, self._mesh)
            )
        return self._stages[config.name]

    def encode(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings float32 (N, length, width), zero padded, and their mask bool (N, length)."""
        text = np.zeros((len(prompts), length, self.encoder.width), np.float32)
        mask = np.zeros((len(prompts), length), bool)
        # Rounded as the records are: a picture must not depend on where its embedding came from.
        for i, tokens in enumerate(self.encoder.encode(prompts, max_length=length, dtype="bfloat16")):
            text[i, : len(tokens)] = tokens
            mask[i, : len(tokens)] = True
        return text, mask

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        num_images: int = 1,
        batch_size: int = 16,
        negative_prompt: str | None = None,
        sampling: Mapping[str, SamplingConfig] | None = None,
        progress: bool = False,
    ) -> list[Image.Image]:
        """Pictures of the prompts, as PIL images: all of the first prompt, then all of the second, and so on.

        Arguments as in `pictures`.
        """
        made = self.pictures(
            prompts,
            seed=seed,
            num_images=num_images,
            batch_size=batch_size,
            negative_prompt=negative_prompt,
            sampling=sampling,
            progress=progress,
        )
        return [picture.image() for picture in made]

    def pictures(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        num_images: int = 1,
        batch_size: int = 16,
        negative_prompt: str | None = None,
        sampling: Mapping[str, SamplingConfig] | None = None,
        progress: bool = False,
    ) -> list[Picture]:
        """Pictures of the prompts with their seeds.

        Args:
          prompts: captions.
          seed: image j of every prompt has seed + j, and depends on that and its prompt only.
          num_images: pictures of each prompt.
          batch_size: pictures drawn at a time; the last batch is filled up, so that nothing is compiled twice.
          negative_prompt: what guidance leads away from, for every picture, instead of the null text; stages
            that are not guided do not see it.
          sampling: by stage name, how to sample it; stages left out use their own settings.
          progress: whether to show progress bars.

        Raises:
          UserError: if there is no prompt, a number is out of range, or `sampling` names no stage, or a
            negative prompt is given while no stage is guided.
        """
        if isinstance(prompts, str):  # a sequence of letters, which nobody means
            raise UserError(f"prompts must be a list of captions, got the string {prompts!r}")
        if not prompts:
            raise UserError("there is no prompt to make a picture of")
        known = [stage.name for stage in self.stages]
        for name in sampling or {}:
            if name not in known:
                raise UserError(
                    f"{self.folder.path}: there is no stage {name!r} to sample{nearest(name, known)}"
                )
        _check_numbers(seed, num_images, batch_size)
        choices = {stage.name: (sampling or {}).get(stage.name, stage.sampling) for stage in self.stages}
        if negative_prompt is not None and all(each.guidance_weight == 1.0 for each in choices.values()):
            raise UserError(
                f"negative_prompt {negative_prompt!r} needs guidance, but every stage's guidance weight is 1 (off)"
            )
        wanted = [(prompt, seed + j) for prompt in prompts for j in range(num_images)]
        seeds = np.array([each for _, each in wanted], np.uint32)
        pixels: np.ndarray | None = None
        for config in self.stages:
            text, mask = self.encode([prompt for prompt, _ in wanted], config.max_text_length)
            choice = choices[config.name]
            negative = None
            if negative_prompt is not None and choice.guidance_weight != 1.0:
                negative = self.encode([negative_prompt], config.max_text_length)
            pixels = self._run_stage(
                config, seeds, text, mask, negative, pixels, choice, batch_size, progress
            )
        assert pixels is not None
        return [Picture(prompt=p, seed=s, pixels=pixels[i]) for i, (p, s) in enumerate(wanted)]

    def _run_stage(
        self,
        config: StageConfig,
        seeds: np.ndarray,
        text: np.ndarray,
        mask: np.ndarray,
        negative: tuple[np.ndarray, np.ndarray] | None,
        low_res: np.ndarray | None,
        sampling: SamplingConfig,
        batch_size: int,
        progress: bool,
    ) -> UInt8[np.ndarray, "images side side 3"]:
        """All pictures through one stage, batch by batch."""
        stage, total = self._stage(config), len(seeds)
        size = min(batch_size, total)
        if self._mesh is not None:
            parts = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
            size = -(-size // parts) * parts
        made = []
        if negative is not None:
            negative = (np.repeat(negative[0], size, axis=0), np.repeat(negative[1], size, axis=0))
        calls = sampling.sampler.network_calls
        label = f"{config.name}, {calls} network call{'s' * (calls > 1)} each"
        with tqdm(total=total, unit="image", desc=label, disable=not progress) as bar:
            for start in range(0, total, size):
                chosen = np.arange(start, start + size) % total  # the last batch is filled up from the front
                pixels = stage.sampler(
                    stage.params,
                    seeds=seeds[chosen],
                    text=text[chosen],
                    mask=mask[chosen],
                    negative=negative,
                    low_res=None if low_res is None else low_res[chosen],
                    config=sampling,
                )
                count = min(size, total - start)
                made.append(pixels[:count])
                bar.update(count)
        return np.concatenate(made)

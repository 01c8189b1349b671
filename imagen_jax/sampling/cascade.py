"""The cascade: from prompts to pictures through all stages of a model folder."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypedDict, Unpack

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Bool, Float
from PIL import Image
from tqdm import tqdm

from imagen_jax.cache import cache_folder, enable_compilation_cache
from imagen_jax.config import nearest
from imagen_jax.data.encoder_identity import warn_unknown_encoder
from imagen_jax.errors import UserError
from imagen_jax.limits import MAX_BATCH, MAX_PICTURES, MAX_SEED, shown
from imagen_jax.models.configs import SamplingConfig, StageConfig
from imagen_jax.parallel.spatial import split_rows
from imagen_jax.sampling.batches import Preview, first_not_finite, run_batch
from imagen_jax.sampling.identity import check_encoder, encoder_identity, stage_identity
from imagen_jax.sampling.inputs import StageInputs, not_finite, to_pixels
from imagen_jax.sampling.model_folder import ModelFolder
from imagen_jax.sampling.opened import OpenStages
from imagen_jax.sampling.programs import ProgramSpec
from imagen_jax.sampling.prompts import PromptEncoder, check_prompt, prompt_warnings
from imagen_jax.sampling.record import PictureRecord, StageRecord
from imagen_jax.text.encoder import TextEncoder

# Share of a device's memory beyond which weights that are not in use are freed: the rest is for activations.
_WEIGHTS_SHARE = 0.5
# Batches that go through a stage before the next stage's turn, where weights are read anew at each turn.
_BATCHES_A_TURN = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One generated picture and what makes it again."""

    prompt: str
    seed: int
    index: int  # in what was wanted
    pixels: np.ndarray  # uint8 (side, side, 3)
    x0: np.ndarray | None = None  # float32 (side, side, 3) in [−1, 1], if it was asked for

    def image(self) -> Image.Image:
        """As a PIL image."""
        return Image.fromarray(self.pixels)


class Options(TypedDict, total=False):
    """What `Imagen.draw` takes beside the pictures wanted; see there."""

    batch_size: int
    negative_prompt: str | None
    sampling: Mapping[str, SamplingConfig] | None
    until: int | None
    keep_x0: bool
    progress: bool
    preview: Callable[[Preview], None] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """Checked options of a call."""

    batch_size: int
    stages: tuple[StageConfig, ...]
    sampling: Mapping[str, SamplingConfig]  # of each of these stages
    negative_prompt: str | None
    keep_x0: bool
    progress: bool
    preview: Callable[[Preview], None] | None


def wanted_pictures(prompts: Sequence[str], seed: int, num_images: int) -> list[tuple[str, int]]:
    """(prompt, seed) of every picture: all of the first prompt, then all of the second, and so on.

    Raises:
      UserError: if there is no prompt, or a number is out of range.
    """
    if isinstance(prompts, str):  # a sequence of letters, which nobody means
        raise UserError(f"prompts must be a list of captions, got the string {prompts!r}")
    if not prompts:
        raise UserError("there is no prompt to make a picture of")
    if num_images < 1:
        raise UserError(f"num_images must be at least 1, got {num_images}")
    if num_images * len(prompts) > MAX_PICTURES:
        raise UserError(
            f"num_images {shown(num_images)} of {len(prompts)} prompts: more than {MAX_PICTURES} pictures at once"
        )
    if seed < 0 or seed + num_images - 1 > MAX_SEED:
        raise UserError(
            f"seeds must lie in 0 … {MAX_SEED}, got {shown(seed)} … {shown(seed + num_images - 1)}"
        )
    return [(prompt, seed + j) for prompt in prompts for j in range(num_images)]


class Imagen:
    """A cascade that makes pictures of prompts.

    `Imagen.load(MODEL).generate(["a red circle"], seed=0)` gives PIL images. Stages are read when they are
    first used; each is one compiled program a batch shape and sampling settings.
    """

    def __init__(
        self,
        folder: ModelFolder,
        encoder: TextEncoder,
        *,
        load_encoder: Callable[[], TextEncoder] | None = None,
        mesh: Mesh | None = None,
        rows: Mapping[str, int] | None = None,
        free_stages: bool | None = None,
    ):
        """Arguments as of `load`, but for the opened folder and encoder, and a way to open that again."""
        widths = {stage.name: stage.network.text_width for stage in folder.stages}
        for name, width in widths.items():
            if width != encoder.width:
                raise UserError(
                    f"{folder.path}: stage {name!r} was trained on embeddings of width {width}, but text encoder "
                    f"{encoder.name!r} gives {encoder.width}"
                )
        self.folder, self._text_width, self._encoder_folder = folder, encoder.width, encoder.folder
        self.prompt_encoder = PromptEncoder(encoder, load_encoder)
        self._free_stages = free_stages
        self._encoder_unknown = folder.index.encoder is None  # and nobody has been told so
        self._meshes = _stage_meshes(folder, mesh, rows or {})
        self._opened = OpenStages(folder)

    @classmethod
    def load(
        cls,
        model: epath.PathLike,
        *,
        mesh: Mesh | None = None,
        rows: Mapping[str, int] | None = None,
        free_stages: bool | None = None,
        cache: str | None = None,
    ) -> "Imagen":
        """Opens a model folder.

        Args:
          model: the folder.
          mesh: over which weights and batches are spread; None: one device.
          rows: by stage name, over how many devices each picture's rows are split; 1 where not named.
          free_stages: whether weights leave memory when their stage has had its turn; None: if all together
            take more than half of a device's memory.
          cache: folder of compiled programs, or "off"; None: below the user's cache folder
            (`imagen_jax.cache.cache_folder`).

        Raises:
          UserError: if the folder or its text encoder is missing or broken, naming it, or that is another than the
            stages were trained with.
        """
        folder = ModelFolder(model)
        folder.check_weights()
        enable_compilation_cache(cache_folder(cache))

        def load_encoder() -> TextEncoder:
            try:
                encoder = TextEncoder.load(folder.text_encoder())
                check_encoder(folder, encoder)
                return encoder
            except UserError as error:
                raise UserError(f"{folder.path}: {error}") from error

        return cls(
            folder,
            load_encoder(),
            load_encoder=load_encoder,
            mesh=mesh,
            rows=rows,
            free_stages=free_stages,
        )

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """The stages, base first."""
        return self.folder.stages

    @functools.cached_property
    def identities(self) -> tuple[dict[str, str], str]:
        """Hashes of the stages by name, and of the text encoder."""
        stages = {stage.name: stage_identity(self.folder.path, stage) for stage in self.stages}
        return stages, encoder_identity(self._encoder_folder)

    def encode(
        self, prompts: Sequence[str], length: int, *, padded: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings float32 (N, length, width), zero padded unless `padded`, and their mask bool (N, length)."""
        return self.prompt_encoder(prompts, length, self._text_width, padded=padded)

    def generate(
        self, prompts: Sequence[str], *, seed: int = 0, num_images: int = 1, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Pictures of the prompts, as PIL images; arguments as in `pictures`."""
        made = self.pictures(prompts, seed=seed, num_images=num_images, **options)
        return [picture.image() for picture in made]

    def pictures(
        self, prompts: Sequence[str], *, seed: int = 0, num_images: int = 1, **options: Unpack[Options]
    ) -> list[Picture]:
        """Pictures of the prompts with their seeds: all of the first prompt, then all of the second, and so on.

        Args:
          prompts: captions.
          seed: image j of every prompt has seed + j, and depends on that and its prompt only.
          num_images: pictures of each prompt.
          **options: see `draw`.

        Raises:
          UserError: if there is no prompt, or as `draw`.

        Warns:
          CutTextWarning, UnknownTokensWarning: see `text_warnings`.
        """
        wanted = wanted_pictures(prompts, seed, num_images)
        for warning in self.text_warnings(prompts, **options):
            warnings.warn(warning, stacklevel=2)
        return list(self.draw(wanted, **options))

    def draw(self, wanted: Sequence[tuple[str, int]], **options: Unpack[Options]) -> Iterator[Picture]:
        """Pictures of (prompt, seed) pairs, in this order, each as soon as its group is done.

        Args:
          wanted: prompts and seeds.
          **options: batch_size: pictures drawn at a time (16); the last batch is filled up, so that nothing is
            compiled twice. negative_prompt: what guidance leads away from, for every picture, instead of the
            null text; stages that are not guided do not see it. sampling: by stage name, how to sample it;
            stages left out use their own settings. until: side in pixels of the stage to stop at. keep_x0:
            whether pictures also come as floating-point numbers. progress: whether to show progress bars.
            preview: called every half second with x̂0 as it forms.

        Raises:
          UserError: if a number is out of range, a prompt is no text, `sampling` or `until` names no stage, or a
            negative prompt is given while no stage is guided. After all other pictures: some are not finite; names
            stage, network call and prompt of the first.
        """
        for prompt, _ in wanted:
            check_prompt(prompt)
        job = self._job(**options)  # checked here and not when the first picture is asked for
        if self._encoder_unknown:
            warn_unknown_encoder(f"the stages of {self.folder.path} do")
            self._encoder_unknown = False
        return self._draw(list(wanted), job)

    def text_warnings(self, prompts: Sequence[str], **options: Unpack[Options]) -> list[UserWarning]:
        """What of the prompts, the negative one included, the stages do not see (`prompt_warnings`).

        Options are those of `draw`, which itself says nothing.
        """
        job = self._job(**options)
        negative = [] if job.negative_prompt is None else [job.negative_prompt]
        return prompt_warnings(self.prompt_encoder.tokenizer, [*prompts, *negative], job.stages)

    def check(self, **options: Unpack[Options]) -> None:
        """Raises what `draw` would raise for these options."""
        self._job(**options)

    def _job(
        self,
        *,
        batch_size: int = 16,
        negative_prompt: str | None = None,
        sampling: Mapping[str, SamplingConfig] | None = None,
        until: int | None = None,
        keep_x0: bool = False,
        progress: bool = False,
        preview: Callable[[Preview], None] | None = None,
    ) -> _Job:
        if negative_prompt is not None:
            check_prompt(negative_prompt, "negative prompt")
        known = [stage.name for stage in self.stages]
        for name in sampling or {}:
            if name not in known:
                raise UserError(
                    f"{self.folder.path}: there is no stage {name!r} to sample{nearest(name, known)}"
                )
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if batch_size > MAX_BATCH:
            raise UserError(f"batch_size must be at most {MAX_BATCH}, got {shown(batch_size)}")
        stages = self.stages_until(until)
        chosen = {stage.name: (sampling or {}).get(stage.name, stage.sampling) for stage in stages}
        if negative_prompt is not None and all(each.guidance_weight == 1.0 for each in chosen.values()):
            raise UserError(
                f"negative_prompt {negative_prompt!r} needs guidance, but every stage's guidance weight is 1 (off)"
            )
        return _Job(
            batch_size=batch_size,
            stages=stages,
            sampling=chosen,
            negative_prompt=negative_prompt,
            keep_x0=keep_x0,
            progress=progress,
            preview=preview,
        )

    def stages_until(self, until: int | None) -> tuple[StageConfig, ...]:
        """The stages up to the one that makes pictures of this side; None: all.

        Raises:
          UserError: if none does.
        """
        sides = [stage.resolution for stage in self.stages]
        if until is None:
            return self.stages
        if until not in sides:
            raise UserError(
                f"--until {until}: the stages make pictures of {', '.join(map(str, sides))} pixels"
            )
        return self.stages[: sides.index(until) + 1]

    def record(
        self,
        prompt: str,
        seed: int,
        *,
        negative_prompt: str | None = None,
        sampling: Mapping[str, SamplingConfig] | None = None,
        until: int | None = None,
    ) -> PictureRecord:
        """What makes a picture of `draw` again; arguments as there."""
        stages, encoder = self.identities
        return PictureRecord(
            prompt=prompt,
            seed=seed,
            negative_prompt=negative_prompt,
            stages=tuple(
                StageRecord(
                    name=stage.name,
                    identity=stages[stage.name],
                    sampling=(sampling or {}).get(stage.name, stage.sampling),
                )
                for stage in self.stages_until(until)
            ),
            text_encoder=encoder,
            model=str(self.folder.path),
        )

    @functools.cached_property
    def _frees(self) -> bool:
        """Whether weights leave memory when their stage has had its turn."""
        return self._memory_is_short() if self._free_stages is None else self._free_stages

    def _group(self, job: _Job) -> int:
        """Pictures that go through a stage before the next one's turn."""
        return job.batch_size * (_BATCHES_A_TURN if self._frees else 1)

    def _draw(self, wanted: list[tuple[str, int]], job: _Job) -> Iterator[Picture]:
        free, group = self._frees, self._group(job)
        several, faults = len(wanted) > group, list[str]()
        with tqdm(
            total=len(wanted), unit="picture", desc="all", disable=not (job.progress and several)
        ) as bar:
            for begin in range(0, len(wanted), group):
                part = wanted[begin : begin + group]
                x0: np.ndarray | None = None
                good = np.ones(len(part), bool)
                texts = [*dict.fromkeys(prompt for prompt, _ in part), *filter(None, [job.negative_prompt])]
                for length, padded in {(each.max_text_length, each.padded_text) for each in job.stages}:
                    self.encode([*texts, ""] if padded else texts, length, padded=padded)
                if free:
                    self.prompt_encoder.release()
                for stage in job.stages:
                    x0, found = self._run_stage(stage, part, x0, good, job, leave=not several)
                    faults += found
                    if free:
                        self._opened.free(stage.name)
                assert x0 is not None
                for i in np.flatnonzero(good):
                    yield Picture(
                        prompt=part[i][0],
                        seed=part[i][1],
                        index=begin + int(i),
                        pixels=to_pixels(x0[i]),
                        x0=x0[i] if job.keep_x0 else None,
                    )
                bar.update(len(part))
        if faults:
            raise UserError(
                f"{len(faults)} of {len(wanted)} pictures are none: {faults[0]}; is a weight of that stage not finite, "
                "or a setting too strong for it?"
            )

    def _spec(self, stage: StageConfig, job: _Job, pictures: int) -> ProgramSpec:
        """The program that draws so many pictures of a stage, in batches."""
        sampling, mesh = job.sampling[stage.name], self._meshes[stage.name]
        parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        # The null text of a stage with padded text is the empty caption.
        leads_away = job.negative_prompt is not None or stage.padded_text
        return ProgramSpec(
            stage=stage,
            sampling=sampling,
            batch=-(-min(job.batch_size, pictures) // parts) * parts,
            negative=leads_away and sampling.guidance_weight != 1.0,
            mesh=mesh,
        )

    def _run_stage(
        self,
        stage: StageConfig,
        wanted: list[tuple[str, int]],
        low_res: np.ndarray | None,
        good: Bool[np.ndarray, " pictures"],
        job: _Job,
        *,
        leave: bool,
    ) -> tuple[Float[np.ndarray, "pictures side side channels"], list[str]]:
        """All pictures of a group through one stage, batch by batch; in [−1, 1].

        Those that are not finite are taken out of `good`, and a line says of each where it went wrong; they go on
        as grey, so that the others keep their places.
        """
        spec = self._spec(stage, job, len(wanted))
        prompts, seeds = [prompt for prompt, _ in wanted], np.array([seed for _, seed in wanted], np.uint32)
        text, mask = self.encode(prompts, stage.max_text_length, padded=stage.padded_text)
        negative = None
        if spec.negative:
            away = [job.negative_prompt or ""]
            embedding = self.encode(away, stage.max_text_length, padded=stage.padded_text)
            negative = tuple(np.repeat(each, spec.batch, axis=0) for each in embedding)
        program, params = self._opened.get(spec)
        calls, starts = spec.sampling.sampler.network_calls, range(0, len(wanted), spec.batch)
        made, faults = [], list[str]()
        with tqdm(
            total=calls * len(starts), unit="step", desc=stage.name, disable=not job.progress, leave=leave
        ) as bar:
            for begin in starts:
                chosen = np.arange(begin, begin + spec.batch) % len(wanted)  # filled up from the front
                inputs = StageInputs(
                    seeds=seeds[chosen],
                    text=text[chosen],
                    mask=mask[chosen],
                    low_res=None if low_res is None else low_res[chosen],
                    negative_text=None if negative is None else negative[0],
                    negative_mask=None if negative is None else negative[1],
                )
                count = min(spec.batch, len(wanted) - begin)
                x0 = run_batch(program, params, inputs, count, progress=bar, preview=job.preview)
                bad = not_finite(x0)
                if bad.any():
                    first = first_not_finite(program, params, inputs, count)
                    faults += [
                        f"stage {stage.name!r} gave numbers that are not finite at call {first[i]} of {calls} for "
                        f"{shown(prompts[begin + i])} (seed {seeds[begin + i]})"
                        for i in np.flatnonzero(bad & good[begin : begin + count])
                    ]
                    good[begin : begin + count] &= ~bad
                    x0 = np.where(bad[:, None, None, None], np.float32(0.0), x0)
                made.append(np.clip(x0, -1.0, 1.0))
        return np.concatenate(made), faults

    def _memory_is_short(self) -> bool:
        """Whether the weights of all stages would leave too little for sampling."""
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit is None:
            limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        needed = 0
        for stage in self.stages:
            mesh = self._meshes[stage.name]
            shards = 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["tensor"]
            needed += self.folder.weight_bytes(stage.name) // shards
        needed += sum(path.stat().length for path in self._encoder_folder.glob("*.safetensors"))
        return needed > _WEIGHTS_SHARE * limit


def _stage_meshes(folder: ModelFolder, mesh: Mesh | None, rows: Mapping[str, int]) -> dict[str, Mesh | None]:
    """The mesh of each stage."""
    known = {stage.name: stage for stage in folder.stages}
    for name, count in rows.items():
        if name not in known:
            raise UserError(f"{folder.path}: there is no stage {name!r} to split{nearest(name, known)}")
        if count > 1 and mesh is None:
            raise UserError(f"stage {name!r}: rows can be split over {count} devices only on a mesh")
        if count < 1 or known[name].resolution % (count * known[name].network.side_multiple):
            raise UserError(
                f"stage {name!r}: {known[name].resolution} rows cannot be split over {count} devices evenly at "
                "each of its levels"
            )
    return {
        name: mesh if mesh is None or rows.get(name, 1) == 1 else split_rows(mesh, rows[name])
        for name in known
    }

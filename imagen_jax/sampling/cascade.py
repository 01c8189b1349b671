"""The cascade: from prompts to pictures through all stages of a model folder."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
from etils import epath
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from imagen_jax.cache import cache_folder, enable_compilation_cache
from imagen_jax.config import nearest
from imagen_jax.data.encoder_identity import warn_unknown_encoder
from imagen_jax.errors import UserError
from imagen_jax.limits import MAX_BATCH, shown
from imagen_jax.models.configs import SamplingConfig, StageConfig
from imagen_jax.models.text_form import Text, TextForm, zero_text
from imagen_jax.models.weight_files import weight_bytes
from imagen_jax.parallel.spatial import split_rows
from imagen_jax.sampling import memory
from imagen_jax.sampling.batches import Preview, Watcher
from imagen_jax.sampling.drawing import Drawing, StagePlan
from imagen_jax.sampling.given import GivenPicture
from imagen_jax.sampling.identity import check_encoder, encoder_identity, stage_identity
from imagen_jax.sampling.inputs import to_pixels
from imagen_jax.sampling.model_folder import ModelFolder
from imagen_jax.sampling.opened import OpenStages
from imagen_jax.sampling.overrides import resampled
from imagen_jax.sampling.prompts import PromptEncoder, prompt_warnings
from imagen_jax.sampling.record import PictureRecord, StageRecord
from imagen_jax.sampling.stage_run import StageRun, program_spec
from imagen_jax.sizes import Size
from imagen_jax.text.encoder import TextEncoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One generated picture and what makes it again."""

    prompt: str
    seed: int
    index: int  # in what was wanted
    pixels: np.ndarray  # uint8 (height, width, 3)
    x0: np.ndarray | None = None  # float32 (height, width, 3) in [−1, 1], if it was asked for

    def image(self) -> Image.Image:
        """As a PIL image."""
        return Image.fromarray(self.pixels)


class DrawOptions(TypedDict, total=False):
    """How `Imagen.draw` goes about it: nothing of it changes a picture; see there."""

    batch_size: int
    keep_x0: bool
    progress: bool
    preview: Callable[[Preview], None] | None


class Options(DrawOptions, total=False):
    """What `Imagen.pictures` takes beside prompts and seeds: fields of `Drawing`, and how to go about it."""

    negative_prompt: str | None
    sampling: Mapping[str, SamplingConfig] | None
    until: int | None
    size: Size | None


def _split(options: Options) -> tuple[dict, DrawOptions]:
    """Fields of a drawing, and how to go about it."""
    how = {name: options[name] for name in DrawOptions.__annotations__ if name in options}  # type: ignore[literal-required]
    return {name: value for name, value in options.items() if name not in how}, how  # type: ignore[return-value]


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
        cache: Path | None = None,
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
        self._rows = dict(rows or {})
        self._meshes = _stage_meshes(folder, mesh, self._rows)
        self._opened = OpenStages(folder, cache)

    @classmethod
    def load(
        cls,
        model: epath.PathLike | ModelFolder,
        *,
        mesh: Mesh | None = None,
        rows: Mapping[str, int] | None = None,
        free_stages: bool | None = None,
        cache: str | None = None,
    ) -> "Imagen":
        """Opens a model folder.

        Args:
          model: the folder, "demo" for the model in the box, or what is opened of either already.
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
        folder = model if isinstance(model, ModelFolder) else ModelFolder(model)
        folder.check_weights()
        remembered = cache_folder(cache)
        enable_compilation_cache(remembered)

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
            cache=remembered,
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

    def encode(self, prompts: Sequence[str], form: TextForm) -> Text:
        """Prompts in a stage's form: float32 (N, length, width) and bool (N, length)."""
        return self.prompt_encoder(prompts, form, self._text_width)

    def _leads_away(self, drawing: Drawing, form: TextForm) -> Text:
        """What guidance leads away from, (1, length, width): the negative prompt, or the null text."""
        caption = form.null_caption if drawing.negative_prompt is None else drawing.negative_prompt
        if caption is not None:
            return self.encode([caption], form)
        null = zero_text(form.length, self._text_width)
        return Text(null.embeddings[None], null.mask[None])

    def generate(
        self, prompts: Sequence[str], *, seed: int = 0, num_images: int = 1, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Pictures of the prompts, as PIL images; arguments as in `pictures`."""
        pictures = self.pictures(prompts, seed=seed, num_images=num_images, **options)
        return [picture.image() for picture in pictures]

    def pictures(
        self, prompts: Sequence[str], *, seed: int = 0, num_images: int = 1, **options: Unpack[Options]
    ) -> list[Picture]:
        """Pictures of the prompts with their seeds: all of the first prompt, then all of the second, and so on.

        Args:
          prompts: captions.
          seed: image j of every prompt has seed + j, and depends on that and its prompt only.
          num_images: pictures of each prompt.
          **options: fields of `Drawing`, and what `draw` takes.

        Raises:
          UserError: if there is no prompt, or as `draw`.

        Warns:
          CutTextWarning, UnknownTokensWarning: see `text_warnings`.
        """
        fields, how = _split(options)
        drawing = Drawing.of(prompts, seed=seed, num_images=num_images, **fields)
        for warning in self.text_warnings(drawing):
            warnings.warn(warning, stacklevel=2)
        return list(self.draw(drawing, **how))

    def edit(
        self,
        picture: Image.Image | GivenPicture,
        prompt: str,
        *,
        strength: float | Mapping[str, float] | None = None,
        resamplings: int | None = None,
        seed: int = 0,
        num_images: int = 1,
        **options: Unpack[Options],
    ) -> list[Image.Image]:
        """Variations of a picture that show a prompt, as PIL images.

        Args:
          picture: what to begin with, and perhaps a mask of what is to be painted; it is brought to a size that the
            model draws.
          prompt: what the result shows.
          strength: the schedule's time at which the way begins, in (0, 1], for all stages or by name; 1: with noise
            alone. None: 1 with a mask, else 0.6.
          resamplings: with a mask, how often a stretch of steps is walked (`resampled`).
          seed: variation j has seed + j.
          num_images: variations.
          **options: as of `pictures`.

        Raises:
          UserError: a strength is out of range, or as `draw`.
        """
        fields, how = _split(options)
        given = picture
        if not isinstance(given, GivenPicture):
            given = GivenPicture(pixels=np.asarray(given.convert("RGB")))
        if strength is None:
            strength = given.usual_strength
        if given.mask is not None:
            known = {stage.name: stage.sampling for stage in self.stages}
            fields["sampling"] = resampled({**known, **(fields.get("sampling") or {})}, resamplings)
        if not isinstance(strength, Mapping):
            strength = {stage.name: float(strength) for stage in self.stages}
        drawing = Drawing.of([prompt], seed=seed, num_images=num_images, **fields)
        drawing = drawing.beginning_with(given, self.stages, strength)
        return [drawn.image() for drawn in self.draw(drawing, **how)]

    def draw(
        self,
        drawing: Drawing,
        *,
        batch_size: int = 16,
        keep_x0: bool = False,
        progress: bool = False,
        preview: Callable[[Preview], None] | None = None,
    ) -> Iterator[Picture]:
        """The pictures of a drawing, in its order, each as soon as its group is done.

        Args:
          drawing: what is wanted.
          batch_size: pictures drawn at a time; the last batch is filled up, so that nothing is compiled twice.
          keep_x0: whether pictures also come as floating-point numbers.
          progress: whether to show progress bars.
          preview: called every half second with x̂0 as it forms.

        Raises:
          UserError: `Drawing.plan`, or batch_size is out of range. After all other pictures: some are not finite;
            names stage, network call and prompt of the first.
        """
        self.check(drawing, batch_size=batch_size)  # here and not when the first picture is asked for
        if self._encoder_unknown:
            warn_unknown_encoder(f"the stages of {self.folder.path} do")
            self._encoder_unknown = False
        watcher = Watcher(progress=progress, preview=preview)
        return self._draw(drawing, batch_size, watcher, keep_x0)

    def check(self, drawing: Drawing, *, batch_size: int = 16) -> tuple[StagePlan, ...]:
        """What each stage has to do; raises what `draw` would raise."""
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if batch_size > MAX_BATCH:
            raise UserError(f"batch_size must be at most {MAX_BATCH}, got {shown(batch_size)}")
        plans = drawing.plan(self.stages, str(self.folder.path))
        for plan in plans:
            _check_rows(plan.stage, self._rows.get(plan.stage.name, 1), plan.size)
        return plans

    def text_warnings(self, drawing: Drawing) -> list[UserWarning]:
        """What of a drawing's prompts, the negative one included, the stages do not see (`prompt_warnings`)."""
        stages = drawing.stages(self.stages)
        return prompt_warnings(self.prompt_encoder.tokenizer, drawing.prompts, stages)

    def record(self, drawing: Drawing, index: int = 0) -> PictureRecord:
        """What makes one of a drawing's pictures again."""
        identities, encoder = self.identities
        prompt, seed = drawing.wanted[index]
        return PictureRecord(
            prompt=prompt,
            seed=seed,
            negative_prompt=drawing.negative_prompt,
            stages=tuple(
                StageRecord(
                    name=stage.name,
                    identity=identities[stage.name],
                    sampling=drawing.sampling.get(stage.name, stage.sampling),
                )
                for stage in drawing.stages(self.stages)
            ),
            text_encoder=encoder,
            model=self.folder.name,
            size=None if drawing.size is None else (drawing.size.width, drawing.size.height),
            given=drawing.given[index].sha256 if drawing.given else None,
        )

    @functools.cached_property
    def _frees(self) -> bool:
        """Whether weights leave memory when their stage has had its turn."""
        if self._free_stages is not None:
            return self._free_stages
        encoder = weight_bytes(self._encoder_folder)
        stages = (
            self.folder.weight_bytes(name) // memory.weight_shards(mesh)
            for name, mesh in self._meshes.items()
        )
        return memory.is_short(encoder + sum(stages))

    def _draw(
        self,
        drawing: Drawing,
        batch_size: int,
        watcher: Watcher,
        keep_x0: bool,
    ) -> Iterator[Picture]:
        total, group = len(drawing.wanted), memory.pictures_a_turn(batch_size, self._frees)
        several, faults = total > group, list[str]()
        with tqdm(total=total, unit="picture", desc="all", disable=not (watcher.progress and several)) as bar:
            for begin in range(0, total, group):
                part = drawing.part(range(begin, min(total, begin + group)))
                x0, good = None, np.ones(len(part.wanted), bool)
                plans = part.plan(self.stages, str(self.folder.path))
                self._encode_all(part, plans)
                for plan in plans:
                    run = self._stage_run(part, plan, batch_size, watcher.progress)
                    x0, new_faults = run(x0, good, watcher, leave=not several)
                    faults += new_faults
                    del run
                    if self._frees:
                        self._opened.free(plan.stage.name)
                assert x0 is not None
                for i in np.flatnonzero(good):
                    prompt, seed = part.wanted[i]
                    yield Picture(
                        prompt=prompt,
                        seed=seed,
                        index=begin + int(i),
                        pixels=to_pixels(x0[i]),
                        x0=x0[i] if keep_x0 else None,
                    )
                bar.update(len(part.wanted))
        if faults:
            raise UserError(
                f"{len(faults)} of {total} pictures are none: {faults[0]}; is a weight of that stage not finite, "
                "or a setting too strong for it?"
            )

    def _encode_all(self, drawing: Drawing, plans: Sequence[StagePlan]) -> None:
        """Encodes what the stages will ask for, so that the encoder can leave memory before they come."""
        for form in {plan.stage.text_form for plan in plans}:
            null = [] if form.null_caption is None else [form.null_caption]
            self.encode([*drawing.prompts, *null], form)
        if self._frees:
            self.prompt_encoder.release()

    def _stage_run(self, drawing: Drawing, plan: StagePlan, batch_size: int, progress: bool) -> StageRun:
        """The stage in front of a group of pictures."""
        stage = plan.stage
        spec = program_spec(
            plan,
            batch_size=batch_size,
            pictures=len(drawing.wanted),
            mesh=self._meshes[stage.name],
        )
        form, negative = stage.text_form, None
        if spec.negative:
            away = self._leads_away(drawing, form)
            negative = Text(*(np.repeat(array, spec.batch, axis=0) for array in away))
        program, params = self._opened.get(spec, progress=progress)
        text = self.encode([prompt for prompt, _ in drawing.wanted], form)
        return StageRun(
            drawing=drawing, plan=plan, program=program, params=params, text=text, negative=negative
        )


def _check_rows(stage: StageConfig, devices: int, size: Size) -> None:
    """Raises UserError unless a picture's rows can be split over the devices at each of the stage's levels."""
    if devices < 1 or size.height % (devices * stage.network.side_multiple):
        raise UserError(
            f"stage {stage.name!r}: {size.height} rows cannot be split over {devices} devices evenly at "
            "each of its levels"
        )


def _stage_meshes(folder: ModelFolder, mesh: Mesh | None, rows: Mapping[str, int]) -> dict[str, Mesh | None]:
    """The mesh of each stage."""
    known = {stage.name: stage for stage in folder.stages}
    for name, count in rows.items():
        if name not in known:
            raise UserError(f"{folder.path}: there is no stage {name!r} to split{nearest(name, known)}")
        if count > 1 and mesh is None:
            raise UserError(f"stage {name!r}: rows can be split over {count} devices only on a mesh")
        _check_rows(known[name], count, known[name].size)
    return {
        name: mesh if mesh is None or rows.get(name, 1) == 1 else split_rows(mesh, rows[name])
        for name in known
    }

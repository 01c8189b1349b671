"""From work directories to a model folder: each stage's averaged weights and the text encoder."""

import contextlib
from collections.abc import Callable, Sequence

from etils import epath

from imagen_jax.config import build
from imagen_jax.convert.deepfloyd.exporting import export_diffusers, export_pipeline
from imagen_jax.data.encoder_identity import EncoderIdentity, check_same_encoder, warn_unknown_encoder
from imagen_jax.demo import packaged
from imagen_jax.errors import UserError
from imagen_jax.files import make_folder
from imagen_jax.models.configs import StageConfig
from imagen_jax.models.network import Params
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.sampling.identity import encoder_files
from imagen_jax.sampling.model_folder import INDEX, ModelIndex, check_cascade, save_index, save_stage
from imagen_jax.text.encoder import TextEncoder
from imagen_jax.text.encoder_folder import is_hub_id
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.config import LoopConfig, TrainConfig
from imagen_jax.training.config_file import read_config
from imagen_jax.training.objectives import Objective
from imagen_jax.training.run import Run
from imagen_jax.training.run_encoder import records_encoder


def export(
    workdirs: Sequence[epath.PathLike],
    out: epath.PathLike,
    *,
    text_encoder: str | None = None,
    copy_text_encoder: bool = True,
    ema_decay: float | None = None,
    dtype: str | None = None,
    objective: Callable[[TrainConfig], Objective] | None = None,
) -> tuple[StageConfig, ...]:
    """Writes a model folder from the newest checkpoint of each work directory.

    Args:
      workdirs: one a stage, in any order; they are sorted by resolution.
      out: the model folder.
      text_encoder: folder or hub id; None: the encoder of the first stage's training.
      copy_text_encoder: whether a local encoder is copied into the model folder, else it is referred to.
      ema_decay: which average of the weights, one of `train.ema_decay` and `train.ema_decays` of every stage, or 0
        for the weights as they are; None: `train.ema_decay`.
      dtype: of the stages' stored weights, "float32", "bfloat16", "float16", "int8"; None: as they were trained.
      objective: what a run of that config learned; None: diffusion.

    Returns:
      The stages, base first.

    Raises:
      UserError: if a work directory has no checkpoint, or the stages do not make a cascade, or a run
        keeps no such average, or the stages or the text encoder are not of one encoder.
    """
    configs = {
        epath.Path(workdir): build(TrainConfig, read_config(workdir), f"{workdir}/config.json")
        for workdir in workdirs
    }
    ordered = sorted(configs, key=lambda workdir: configs[workdir].stage.resolution)
    stages = tuple(configs[workdir].stage for workdir in ordered)
    check_cascade(stages)
    for workdir, config in configs.items():
        check_decay(str(workdir), config.train, ema_decay)
    if text_encoder is None:
        data = configs[ordered[0]].data
        text_encoder = data.text_encoder
        if text_encoder is None:
            text_encoder = records_encoder(data.embeddings or data.path)
    out, identity = epath.Path(out), _stages_encoder(ordered)
    encoder = _check_encoder(text_encoder, identity)
    for workdir in ordered:
        params = _averaged(workdir, configs[workdir], ema_decay, objective)
        out = make_folder(out)  # not before: the checkpoint may be damaged
        save_stage(out, configs[workdir].stage, params, dtype=dtype)
        del params  # the next stage's need the memory
    reference, files = text_encoder, None
    if encoder is not None:
        if copy_text_encoder:
            reference = "text_encoder"
            encoder.save_copy(out / reference)
        identity = identity or encoder.identity
        files = encoder_files(out / reference if copy_text_encoder else encoder.folder)
    names = tuple(stage.name for stage in stages)
    index = ModelIndex(stages=names, text_encoder=reference, encoder=identity, encoder_files=files)
    save_index(out, index)
    return stages


def _newest(checkpoints: Checkpoints, workdir: epath.Path) -> int:
    """Step of the newest checkpoint."""
    step = checkpoints.latest_step()
    if step is None:
        raise UserError(f"--from {workdir}: no complete checkpoint in {checkpoints.folder}")
    return step


def _stages_encoder(workdirs: Sequence[epath.Path]) -> EncoderIdentity | None:
    """The text encoder that all runs were trained with, as far as their checkpoints know it.

    Raises:
      UserError: there are several, or a run has no checkpoint.
    """
    known: dict[epath.Path, EncoderIdentity] = {}
    unknown: list[str] = []
    for workdir in workdirs:
        with contextlib.closing(Checkpoints(workdir)) as checkpoints:
            identity = checkpoints.encoder(_newest(checkpoints, workdir))
        if identity is None:
            unknown.append(str(workdir))
            continue
        for other, theirs in known.items():
            check_same_encoder(
                theirs,
                identity,
                f"--from: the stages in {other} and {workdir} were trained with different text encoders",
                "; train one of them anew with the other's",
            )
        known[workdir] = identity
    if unknown:
        warn_unknown_encoder(f"the checkpoints in {', '.join(unknown)} do")
    return next(iter(known.values()), None)


def _check_encoder(text_encoder: str, identity: EncoderIdentity | None) -> TextEncoder | None:
    """The opened encoder; None: it is no local folder, and is looked at when the model is opened.

    Raises:
      UserError: it does not open, or is not the one of this identity.
    """
    if not epath.Path(packaged(text_encoder)).is_dir():
        if not is_hub_id(text_encoder):
            raise UserError(
                f"text encoder {text_encoder}: no such folder; name one, or a hub id, with --text_encoder"
            )
        return None
    encoder = TextEncoder.load(text_encoder)
    if identity is not None:
        check_same_encoder(
            identity,
            encoder.identity,
            f"text encoder {text_encoder} is not the one that the stages were trained with",
            "; name that one with --text_encoder",
        )
    return encoder


def check_decay(workdir: str, config: LoopConfig, decay: float | None) -> None:
    """Raises UserError unless the run keeps the average that --ema_decay asks for."""
    kept = (config.ema_decay, *config.ema_decays)
    if decay is not None and decay not in (*kept, 0.0):
        shown = ", ".join(str(each) for each in kept)
        raise UserError(f"--ema_decay {decay}: the run in {workdir} keeps {shown}, and 0 for no average")


def _averaged(
    workdir: epath.Path,
    config: TrainConfig,
    ema_decay: float | None,
    objective: Callable[[TrainConfig], Objective] | None = None,
) -> Params:
    """The averaged weights of a run's newest checkpoint, adapters merged into them."""
    checkpoints = Checkpoints(workdir)
    try:
        step = _newest(checkpoints, workdir)
        learned = None if objective is None else objective(config)
        run = Run.of(config, make_mesh(MeshConfig(data=1, fsdp=-1)), learned)
        state, _ = checkpoints.restore(step, run.abstract)
    finally:
        checkpoints.close()
    return run.average(state, ema_decay)


def export_pipelines(
    sources: Sequence[epath.PathLike],
    out: epath.PathLike,
    *,
    text_encoder: str | None = None,
    ema_decay: float | None = None,
) -> list[str]:
    """Writes DeepFloyd stages as pipelines that diffusers opens: OUT/<stage>/, each on its own.

    Args:
      sources: work directories of fine-tuned stages, or one model folder.
      out: gets a folder for each stage.
      text_encoder: a local folder, copied into each pipeline; None: the one that made the text of the training, or
        the model folder's.
      ema_decay: of work directories, as for `export`.

    Returns:
      The folders' names.

    Raises:
      UserError: there is no checkpoint or model, or a stage that is not of DeepFloyd.
    """
    names: list[str] = []
    for source in map(epath.Path, sources):
        if (source / INDEX).exists():
            names += export_diffusers(source, out, text_encoder=text_encoder)
            continue
        config = build(TrainConfig, read_config(source), f"{source}/config.json")
        check_decay(str(source), config.train, ema_decay)
        encoder = text_encoder or config.data.text_encoder
        if encoder is not None:
            _check_encoder(encoder, _stages_encoder([source]))
        export_pipeline(
            epath.Path(out) / config.stage.name,
            config.stage,
            _averaged(source, config, ema_decay),
            text_encoder=encoder,
        )
        names.append(config.stage.name)
    return names

"""Starting a run from weights that another run, or a model folder, holds."""

import json
import math

import jax
from etils import epath
from jax.sharding import Mesh

from imagen_jax.config import build, differences, to_dict
from imagen_jax.data.encoder_identity import EncoderIdentity, check_same_encoder, warn_unknown_encoder
from imagen_jax.demo import packaged
from imagen_jax.errors import UserError
from imagen_jax.files import exists, json_field, read_json, write_text
from imagen_jax.models.configs import StageConfig
from imagen_jax.models.network import Params
from imagen_jax.models.stage import StageNetwork
from imagen_jax.parallel.mesh import make_mesh, state_shardings
from imagen_jax.parallel.processes import on_first
from imagen_jax.sampling.model_folder import INDEX, ModelFolder
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.config import TrainConfig
from imagen_jax.training.config_file import read_config
from imagen_jax.training.run import Run

RECORD = "init_from.json"  # in the work directory: where its weights come from


def check_stage(source: str, theirs: StageConfig, ours: StageConfig) -> list[str]:
    """Compares the stage that weights were made for with the one that is to start from them.

    Returns:
      Lines "config.stage.x: theirs → ours" of what differs and may: schedule, augmentation, crop, text length.

    Raises:
      UserError: the networks or what their outputs mean differ.
    """
    lines = differences(to_dict(theirs), to_dict(ours), "config.stage")
    # What the network computes in, and what is said of sampling, the weights do not depend on.
    free = ("config.stage.name", "config.stage.sampling", "config.stage.network.dtype")
    lines = [line for line in lines if not line.startswith(free)]
    fixed = ("config.stage.network", "config.stage.prediction", "config.stage.low_resolution")
    wrong = [line for line in lines if line.startswith(fixed)]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"--init_from {source}: its weights do not fit this config: {wrong[0]}{more}")
    return lines


# Weights, their stage, the text encoder that they were trained with, and where exactly they come from.
_Found = tuple[Params, StageConfig, EncoderIdentity | None, str]


def _from_workdir(source: epath.Path, ours: StageConfig, mesh: Mesh, decay: float | None) -> _Found:
    config = build(TrainConfig, read_config(source), f"{source}/config.json")
    check_stage(str(source), config.stage, ours)
    checkpoints = Checkpoints(source)
    try:
        step = checkpoints.latest_step()
        if step is None:
            raise UserError(f"--init_from {source}: no complete checkpoint in {checkpoints.folder}")
        run = Run.of(config, mesh)
        encoder = checkpoints.encoder(step)
        state, _ = checkpoints.restore(step, run.abstract)
    finally:
        checkpoints.close()
    try:
        params = run.average(state, decay)
    except ValueError as error:
        raise UserError(f"--init_from {source}: {error}") from error
    average = config.train.ema_decay if decay is None else decay
    return params, config.stage, encoder, f"step {step}, average {average}"


def _model_stage(model: ModelFolder, ours: StageConfig) -> StageConfig:
    """The stage of a model folder whose weights a run can start from."""
    found = [stage for stage in model.stages if stage.resolution == ours.resolution]
    if not found:
        sizes = ", ".join(f"{stage.name} ({stage.resolution})" for stage in model.stages)
        raise UserError(f"--init_from {model.path}: no stage makes {ours.resolution} pixels, only {sizes}")
    check_stage(str(model.path), found[0], ours)
    return found[0]


def _from_model(source: epath.Path, ours: StageConfig, mesh: Mesh) -> _Found:
    model = ModelFolder(source)
    stage = _model_stage(model, ours)
    network = StageNetwork(stage)
    params = model.params(stage.name, network.abstract_params, state_shardings(network.abstract_params, mesh))
    return params, stage, model.index.encoder, f"stage {stage.name}"


def _place(spec: str) -> tuple[str, float | None]:
    """Folder and decay of "DIR" or "DIR@DECAY"."""
    place, _, text = spec.partition("@")
    try:
        decay = float(text) if text else None
    except ValueError:
        decay = math.nan
    if decay is not None and not 0.0 <= decay < 1.0:
        raise UserError(f"--init_from {spec}: {text!r} is no decay; give DIR or DIR@DECAY")
    return place, decay


def check_source(spec: str, config: TrainConfig) -> None:
    """Looks at what a run is to start from, before a folder is made for the run; arguments as of `initial_params`.

    Raises:
      UserError: it is no work directory or model folder, or its stage does not fit.
    """
    source = epath.Path(packaged(_place(spec)[0]))
    if (source / INDEX).exists():
        model = ModelFolder(source)
        model.check_weights()
        _model_stage(model, config.stage)
    else:
        theirs = build(TrainConfig, read_config(source), f"{source}/config.json")
        check_stage(str(source), theirs.stage, config.stage)


def initial_params(
    spec: str, config: TrainConfig, mesh: Mesh | None = None, encoder: EncoderIdentity | None = None
) -> tuple[Params, dict[str, object]]:
    """Weights to start from, and a record of where they come from.

    Args:
      spec: a work directory, whose newest checkpoint's averaged weights are taken ("DIR@0.999": the average with
        that decay, "DIR@0": the weights as they are), or a model folder, whose stage of the same resolution is.
      config: of the run that starts.
      mesh: where they are to lie; None: the config's.
      encoder: the text encoder of the run that starts; None: not known.

    Raises:
      UserError: there are no such weights, or they are of another network, prediction or text encoder.
    """
    mesh = mesh or make_mesh(config.mesh)
    place, decay = _place(spec)
    source = epath.Path(packaged(place))
    if (source / INDEX).exists():
        params, theirs, their_encoder, which = _from_model(source, config.stage, mesh)
    else:
        params, theirs, their_encoder, which = _from_workdir(source, config.stage, mesh, decay)
    check_same_encoder(
        their_encoder,
        encoder,
        f"--init_from {place}: its weights were trained with another text encoder than this run's",
    )
    if their_encoder is None and encoder is not None and jax.process_index() == 0:
        warn_unknown_encoder(f"the weights of --init_from {place} do")
    changed = check_stage(place, theirs, config.stage)
    return params, {"init_from": spec, "weights": which, "changed": changed}


def recorded_source(workdir: epath.Path) -> str | None:
    """What the run of a work directory was told to start from, if it was."""
    path = workdir / RECORD
    return json_field(read_json(path), "init_from", str, str(path)) if exists(path) else None


def check_record(workdir: epath.Path, spec: str | None) -> None:
    """Checks a resumed run's --init_from against what the run did start from.

    Raises:
      UserError: it started from something else.
    """
    began = recorded_source(workdir)
    if spec is not None and began != spec:
        raise UserError(
            f"--init_from {spec}: the run in {workdir} started from {began or 'fresh weights'}; "
            "leave the flag out to go on, or take another --workdir"
        )


def write_record(workdir: epath.Path, record: dict[str, object]) -> None:
    """Writes WORKDIR/init_from.json, on the first process."""
    on_first(lambda: write_text(workdir / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n"))

"""Starting from weights of another run or of a model folder, sample scores, and held-out loss."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from imagen_jax.errors import UserError
from imagen_jax.parallel.mesh import MeshConfig, make_mesh
from imagen_jax.training.checkpoint import Checkpoints
from imagen_jax.training.config import Scorer
from imagen_jax.training.config_file import write_config
from imagen_jax.training.export import export
from imagen_jax.training.init_from import check_record, initial_params, write_record
from imagen_jax.training.keep import Keep
from imagen_jax.training.roles import DENOISER
from imagen_jax.training.run import Run
from imagen_jax.training.scorers import check_scorer
from imagen_jax.training.state import TrainState, from_stored_form, start_ema, stored_form


@pytest.fixture(scope="module")
def source(make_config, tmp_path_factory):
    """A work directory whose weights are all 1, their average 2 and their average with 0.5 is 3."""
    workdir = epath.Path(tmp_path_factory.mktemp("runs") / "source")
    config = make_config("base", "train.ema_decays=[0.5]")
    run = Run.of(config, make_mesh(MeshConfig()))

    def filled(value):
        return {
            name: np.full(each.shape, value, np.float32) for name, each in run.network.abstract_params.items()
        }

    ema = filled(2.0) | {k: v for k, v in start_ema(filled(3.0), (0.5,)).items() if k.endswith("@0.5")}
    params = filled(1.0)
    opt_state = jax.jit(run.optimizers[DENOISER].init)(params)
    stored = TrainState(np.zeros((), np.int32) + 7, params, ema, opt_state)
    state = from_stored_form(stored, run.abstract)
    write_config(workdir, config)
    checkpoints = Checkpoints(workdir, keep=Keep())
    checkpoints.save(7, jax.tree.map(jax.numpy.asarray, state), examples=56, config=config)
    checkpoints.close()
    return workdir


def value_of(params):
    (value,) = {float(x) for each in params.values() for x in np.unique(np.asarray(each))}
    return value


@pytest.mark.parametrize(("suffix", "value"), [("", 2.0), ("@0.5", 3.0), ("@0", 1.0)])
def test_weights_of_a_run(source, make_config, suffix, value):
    config = make_config("base", "stage.schedule.kind=cosine", "stage.schedule.shift=1.5")
    params, record = initial_params(f"{source}{suffix}", config)
    assert value_of(params) == value
    assert record["changed"] == ["config.stage.schedule.shift: 0.0 → 1.5"]
    assert record["weights"].startswith("step 7, average ")
    if not suffix:
        state = stored_form(Run.of(config, make_mesh(MeshConfig())).start_from(params))
        assert int(state.step) == 0 and value_of(state.params) == value_of(state.ema) == value


def test_weights_of_a_model_folder(source, make_config, text_encoder, tmp_path):
    for decay, value in ((None, 2.0), (0.5, 3.0), (0.0, 1.0)):
        out = tmp_path / str(decay)
        export([source], out, text_encoder=str(text_encoder), copy_text_encoder=False, ema_decay=decay)
        params, record = initial_params(str(out), make_config("base"))
        assert value_of(params) == value and record["weights"] == "stage base"
    with pytest.raises(UserError, match=r"--ema_decay 0\.7: the run in .* keeps 0\.99, 0\.5, and 0"):
        export([source], tmp_path / "no", text_encoder=str(text_encoder), ema_decay=0.7)


def test_weights_that_do_not_fit_are_refused(source, make_config, tmp_path):
    for override, part in (
        ("stage.network.channels=[16]", "config.stage.network.channels: [8] → [16]"),
        ("stage.prediction=epsilon", "config.stage.prediction: 'v' → 'epsilon'"),
    ):
        with pytest.raises(UserError) as caught:
            initial_params(str(source), make_config("base", override))
        assert part in str(caught.value)
    with pytest.raises(UserError, match=r"no average with decay 0\.7"):
        initial_params(f"{source}@0.7", make_config("base"))
    with pytest.raises(UserError, match="'high' is no decay"):
        initial_params(f"{source}@high", make_config("base"))
    with pytest.raises(UserError, match="is not a work directory"):
        initial_params(str(tmp_path), make_config("base"))


def test_a_resumed_run_keeps_its_source(tmp_path):
    workdir = epath.Path(tmp_path)
    check_record(workdir, None)
    with pytest.raises(UserError, match="started from fresh weights"):
        check_record(workdir, "runs/a")
    write_record(workdir, {"init_from": "runs/a"})
    check_record(workdir, "runs/a")
    check_record(workdir, None)
    with pytest.raises(UserError, match="started from runs/a"):
        check_record(workdir, "runs/b")
    assert json.loads((tmp_path / "init_from.json").read_text()) == {"init_from": "runs/a"}


def test_pictures_that_cannot_be_scored_are_refused_before_training():
    check_scorer(Scorer.NONE, 8, ["anything"])
    with pytest.raises(UserError, match="32 pixels and more; the stage makes 16"):
        check_scorer(Scorer.ORACLE, 16, [])
    with pytest.raises(UserError, match="embedded data's captions only"):
        check_scorer(Scorer.ORACLE, 64, ["a photograph of a dog"])

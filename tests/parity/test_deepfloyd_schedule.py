"""DeepFloyd's noise schedule, timesteps and single steps against diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

from imagen_jax.diffusion.grids import Grid, GridConfig  # noqa: E402
from imagen_jax.diffusion.process import Prediction, to_x0_and_epsilon  # noqa: E402
from imagen_jax.diffusion.schedules import DiscreteCosineSchedule  # noqa: E402
from imagen_jax.diffusion.steps import ddpm_step  # noqa: E402
from imagen_jax.diffusion.thresholding import ThresholdConfig, threshold  # noqa: E402

SCHEDULER = {
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "learned_range",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
    "clip_sample": False,
}
NAMED = (Grid.FAST27, Grid.SMART27, Grid.SMART50, Grid.SMART100)


def scheduler(**more):
    from diffusers import DDPMScheduler

    return DDPMScheduler(**{**SCHEDULER, **more})


def test_tables_are_bit_exact():
    theirs, ours = scheduler(), DiscreteCosineSchedule()
    np.testing.assert_array_equal(ours.betas(), theirs.betas.numpy())
    np.testing.assert_array_equal(ours.alphas_cumprod(), theirs.alphas_cumprod.numpy())


@pytest.mark.parametrize("steps", [1, 3, 8, 27, 50, 100, 333, 1000])
def test_leading_timesteps_are_theirs(steps):
    theirs = scheduler()
    theirs.set_timesteps(steps)
    assert list(GridConfig(kind=Grid.LEADING).timesteps(steps)) == theirs.timesteps.tolist()


@pytest.mark.parametrize("kind", NAMED)
def test_named_timesteps_are_theirs(kind):
    from diffusers.pipelines.deepfloyd_if import timesteps

    grid = GridConfig(kind=kind)
    assert list(grid.timesteps(grid.own_steps)) == getattr(timesteps, f"{kind.value}_timesteps")


@pytest.mark.parametrize("kind", [*NAMED, Grid.LEADING])
@pytest.mark.parametrize("max_scale", [1.5, 1.0])
def test_each_step_is_theirs(kind, max_scale, monkeypatch):
    grid, schedule = GridConfig(kind=kind), DiscreteCosineSchedule()
    steps = grid.own_steps or 40
    theirs = scheduler(sample_max_value=max_scale)
    theirs.set_timesteps(timesteps=list(grid.timesteps(steps)))
    log_snrs = grid.log_snrs(schedule, steps)
    generator = np.random.default_rng(0)
    shape = (2, 8, 8, 3)

    def normal():
        return generator.standard_normal(shape).astype(np.float32)

    def torched(array):
        return torch.from_numpy(np.ascontiguousarray(array)).permute(0, 3, 1, 2)

    compared = 0
    for number, t in enumerate(theirs.timesteps[:-1].tolist()):
        signal = schedule.alphas_cumprod()[t]
        x0, epsilon, noise = np.clip(normal(), -1, 1) * np.float32(0.8), normal(), normal()
        x_t = np.sqrt(signal) * x0 + np.sqrt(1 - signal) * epsilon
        predicted = epsilon + np.float32(0.05) * normal()
        variance = generator.uniform(-1, 1, shape).astype(np.float32)
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: torched(noise)
        )
        output = torched(np.concatenate([predicted, variance], axis=-1))
        expected = theirs.step(output, t, torched(x_t)).prev_sample.permute(0, 2, 3, 1).numpy()
        level = jnp.full((2,), log_snrs[number])
        assert float(schedule.timestep(level)[0]) == t
        guess, _ = to_x0_and_epsilon(
            jnp.asarray(predicted), x_t=jnp.asarray(x_t), log_snr=level, source=Prediction.EPSILON
        )
        guess = threshold(guess, ThresholdConfig(percentile=95.0, max_scale=max_scale))
        got = ddpm_step(
            jnp.asarray(x_t),
            guess,
            jnp.asarray(noise),
            level,
            jnp.full((2,), log_snrs[number + 1]),
            variance_interpolation=0.5 * (jnp.asarray(variance) + 1.0),
        )
        if t != 999:  # ᾱ is 2.4e-9 there: x0 is a quotient of rounding errors
            np.testing.assert_allclose(np.asarray(got), expected, atol=1e-4, rtol=0, err_msg=f"t = {t}")
            compared += 1
    assert compared >= steps - 2

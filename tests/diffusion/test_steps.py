"""The rules of single steps against their definitions."""

import jax.numpy as jnp
import numpy as np

from imagen_jax.diffusion.steps import add_noise, ddim_step, ddpm_step, heun_correction


def amplitudes(log_snr):
    return np.sqrt(1 / (1 + np.exp(-log_snr))), np.sqrt(1 / (1 + np.exp(log_snr)))


def test_ddpm_step_is_the_posterior():
    """The moments of q(x_s | x_t, x0), from conditioning the joint Gaussian of (x_s, x_t) given x0."""
    generator = np.random.default_rng(0)
    for log_snr_t, log_snr_s in ((-6.0, -5.0), (-1.0, 2.0), (3.0, 3.2)):
        a_t, s_t, a_s, s_s = (
            np.sqrt(1 / (1 + np.exp(sign * level))) for level in (log_snr_t, log_snr_s) for sign in (-1, 1)
        )
        a_ts = a_t / a_s  # x_t = a_ts·x_s + noise, the forward step from s to t
        x0, x_t, noise = generator.standard_normal((3, 1, 5))
        mean = a_s * x0 + a_ts * s_s**2 / s_t**2 * (x_t - a_t * x0)
        lower = s_s**2 - (a_ts * s_s**2) ** 2 / s_t**2  # the posterior's variance
        upper = s_t**2 - (a_ts * s_s) ** 2  # the forward step's variance
        for gamma in (0.0, 0.2, 1.0):
            std = np.sqrt(lower ** (1 - gamma) * upper**gamma)
            made = ddpm_step(
                *(jnp.asarray(each, jnp.float32) for each in (x_t, x0, noise)),
                jnp.full((1,), log_snr_t),
                jnp.full((1,), log_snr_s),
                variance_interpolation=gamma,
            )
            np.testing.assert_allclose(made, mean + std * noise, atol=2e-5)


def test_ddim_with_eta_one_is_the_posterior():
    generator = np.random.default_rng(1)
    x_t, x0, noise = (jnp.asarray(x, jnp.float32) for x in generator.standard_normal((3, 4, 6)))
    low, high = jnp.array([-9.0, -2.0, 0.0, 4.0]), jnp.array([-7.0, -1.0, 3.0, 4.1])
    np.testing.assert_allclose(
        ddim_step(x_t, x0, noise, low, high, eta=1.0),
        ddpm_step(x_t, x0, noise, low, high, variance_interpolation=0.0),
        atol=2e-5,
    )
    # Without η the noise has no say.
    np.testing.assert_array_equal(
        ddim_step(x_t, x0, noise, low, high, eta=0.0), ddim_step(x_t, x0, 9 * noise, low, high, eta=0.0)
    )


def single(*arrays):
    return [jnp.asarray(each, jnp.float32) for each in arrays]


def test_ddim_is_the_first_order_dpm_solver():
    """(σ_s/σ_t)·x_t + α_s·(1 − e^−h)·x̂0, h the half log-SNR gained (arXiv 2211.01095, equation 9, n = 1)."""
    x_t, x0 = np.random.default_rng(2).standard_normal((2, 4, 6))
    low, high = np.array([-9.0, -2.0, 0.0, 4.0]), np.array([-7.0, -1.0, 3.0, 4.1])
    _, sigma_t = (each[:, None] for each in amplitudes(low))
    alpha_s, sigma_s = (each[:, None] for each in amplitudes(high))
    gained = 1 - np.exp(-(high - low) / 2)[:, None]
    made = ddim_step(*single(x_t, x0, np.zeros_like(x0), low, high), eta=0.0)
    np.testing.assert_allclose(made, sigma_s / sigma_t * x_t + alpha_s * gained * x0, atol=2e-5)


def test_heun_is_the_trapezoid_of_the_slopes():
    """y_s = y_t + (τ_s − τ_t)·(d_t + d_s)/2 with d = (y − x̂0)/τ (arXiv 2206.00364, algorithm 1)."""
    x_t, x0_t, x0_s = np.random.default_rng(3).standard_normal((3, 4, 6))
    low, high = np.array([-9.0, -2.0, 0.0, 4.0]), np.array([-7.0, -1.0, 3.0, 4.1])
    alpha_t, alpha_s = (amplitudes(level)[0][:, None] for level in (low, high))
    tau_t, tau_s = (np.exp(-level / 2)[:, None] for level in (low, high))
    slope_t = (x_t / alpha_t - x0_t) / tau_t
    euler = x_t / alpha_t + (tau_s - tau_t) * slope_t
    heun = x_t / alpha_t + (tau_s - tau_t) * (slope_t + (euler - x0_s) / tau_s) / 2
    start = ddim_step(*single(x_t, x0_t, np.zeros_like(x_t), low, high), eta=0.0)
    np.testing.assert_allclose(start, alpha_s * euler, atol=2e-5)
    made = heun_correction(start, *single(x0_t, x0_s, low, high))
    np.testing.assert_allclose(made, alpha_s * heun, atol=2e-5)


def test_noise_put_back_is_the_forward_process():
    x0, epsilon, noise = np.random.default_rng(4).standard_normal((3, 4, 20000))
    low, high = np.array([-9.0, -2.0, 0.0, 4.0]), np.array([-7.0, -1.0, 3.0, 4.0])
    alpha_t, sigma_t = amplitudes(low)
    alpha_s, sigma_s = (each[:, None] for each in amplitudes(high))
    made = add_noise(*single(alpha_s * x0 + sigma_s * epsilon, noise, high, low))
    rest = np.asarray(made) - alpha_t[:, None] * x0
    np.testing.assert_allclose(rest.std(axis=1) / sigma_t, 1.0, atol=0.03)
    np.testing.assert_allclose((rest * x0).mean(axis=1), 0.0, atol=0.04)
    # Nothing is added where nothing is asked for.
    np.testing.assert_allclose(made[3], (alpha_s * x0 + sigma_s * epsilon)[3], atol=1e-5)


def test_steps_from_no_signal_at_all_and_to_no_noise_at_all_are_finite():
    x_t, x0, noise = single(*np.random.default_rng(5).standard_normal((3, 2, 6)))
    low, high = single([-200.0, -1.0], [-9.0, 200.0])
    alpha_s, sigma_s = amplitudes(-9.0)
    ddim = ddim_step(x_t, x0, noise, low, high, eta=0.0)
    ddpm = ddpm_step(x_t, x0, noise, low, high, variance_interpolation=0.2)
    # From no signal ε̂ is x_t, and the posterior knows nothing of x_t; to no noise only x̂0 is left.
    np.testing.assert_allclose(ddim, [alpha_s * x0[0] + sigma_s * x_t[0], x0[1]], atol=1e-5)
    np.testing.assert_allclose(ddpm, [alpha_s * x0[0] + sigma_s**0.8 * noise[0], x0[1]], atol=1e-5)
    assert np.all(np.isfinite(heun_correction(ddim, x0, -x0, low, low)))

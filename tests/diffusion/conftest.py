"""Gaussian mixtures, whose denoiser is known in closed form, and the exact probability flow through them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.diffusion.loop import sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Σ_k w_k·N(μ_k, B·diag(s_k²)·Bᵀ) of flattened pictures, in float64; B is orthogonal."""

    shape: tuple[int, ...]
    weights: np.ndarray  # (K,)
    means: np.ndarray  # (K, D), in the basis
    stds: np.ndarray  # (K, D), in the basis
    basis: np.ndarray  # (D, D)

    def posterior(self, x_t, alpha, sigma, xp=np):
        """E[x0 | x_t] of x_t (N, D), from Bayes' rule for each component."""
        weights, means, stds, basis = (
            xp.asarray(each, x_t.dtype) for each in (self.weights, self.means, self.stds, self.basis)
        )
        z = (x_t @ basis)[:, None]  # (N, 1, D)
        variance = alpha**2 * stds**2 + sigma**2  # (K, D), of z given the component
        away = z - alpha * means[None]  # (N, K, D)
        squares = away**2 / variance[None] + xp.log(variance)[None]
        logits = xp.log(weights)[None] - 0.5 * xp.sum(squares, axis=-1)  # (N, K)
        odds = xp.exp(logits - logits.max(axis=-1, keepdims=True))
        odds = odds / odds.sum(axis=-1, keepdims=True)
        centres = means[None] + (alpha * stds**2 / variance)[None] * away
        return xp.sum(odds[..., None] * centres, axis=1) @ basis.T

    def denoiser(self, x_t, log_snr, step):
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
        flat = x_t.reshape(len(x_t), -1)
        return self.posterior(flat, alpha, sigma, jnp).reshape(x_t.shape)

    def component(self, x):
        """The likeliest component of each clean x (N, D)."""
        away = ((x @ self.basis)[:, None] - self.means) / self.stds
        return np.argmax(np.log(self.weights) - 0.5 * (away**2 + 2 * np.log(self.stds)).sum(-1), axis=-1)

    def draw(self, count, seed=0):
        """Exact samples (count, D)."""
        generator = np.random.default_rng(seed)
        chosen = generator.choice(len(self.weights), size=count, p=self.weights)
        z = self.means[chosen] + self.stds[chosen] * generator.standard_normal((count, self.means.shape[1]))
        return z @ self.basis.T

    def moments(self):
        """Mean (D,) and covariance (D, D)."""
        mean = self.weights @ self.means
        away = self.means - mean
        covariance = np.diag(self.weights @ self.stds**2) + (self.weights[:, None] * away).T @ away
        return self.basis @ mean, self.basis @ covariance @ self.basis.T

    def flow(self, x_1, log_snr, steps):
        """Where the probability flow takes x_1 (N, D) from a level to no noise: Runge–Kutta of order 4.

        With α = cos φ, σ = sin φ the flow is dx/dφ = v = cos φ·ε̂ − sin φ·x̂0, smooth from end to end.
        """

        def velocity(x, angle):
            # At φ = 0 exactly ε̂ is 0/0; 1e-9 before that nothing has changed.
            alpha, sigma = np.cos(max(angle, 1e-9)), np.sin(max(angle, 1e-9))
            x0 = self.posterior(x, alpha, sigma)
            return alpha * (x - alpha * x0) / sigma - sigma * x0

        angles = np.linspace(np.arctan(np.exp(-log_snr / 2)), 1e-6, steps + 1)
        x = x_1
        for here, there in itertools.pairwise(angles):
            step, middle = there - here, 0.5 * (here + there)
            k1 = velocity(x, here)
            k2 = velocity(x + step / 2 * k1, middle)
            k3 = velocity(x + step / 2 * k2, middle)
            k4 = velocity(x + step * k3, there)
            x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x


def rotation(size):
    return np.linalg.qr(np.random.default_rng(size).standard_normal((size, size)))[0]


@pytest.fixture(scope="session")
def plane():
    """Three overlapping ellipses in the plane."""
    return Mixture(
        shape=(2,),
        weights=np.array([0.5, 0.3, 0.2]),
        means=np.array([[-0.7, -0.2], [0.6, 0.5], [0.5, -0.9]]),
        stds=np.array([[0.25, 0.4], [0.3, 0.2], [0.2, 0.3]]),
        basis=rotation(2),
    )


@pytest.fixture(scope="session")
def pictures():
    """Three kinds of pictures of 8×8×3, with directions of large and of small variance."""
    generator = np.random.default_rng(7)
    return Mixture(
        shape=(8, 8, 3),
        weights=np.array([0.5, 0.3, 0.2]),
        means=generator.standard_normal((3, 192)) * 0.25,
        stds=np.exp(generator.uniform(np.log(0.05), np.log(0.6), (3, 192))),
        basis=rotation(192),
    )


@pytest.fixture(scope="session")
def keys_of():
    def make(count, first=0):
        return jax.vmap(jax.random.key)(jnp.arange(first, first + count, dtype=jnp.uint32))

    return make


@pytest.fixture(scope="session")
def draw(keys_of):
    """draw(mixture, schedule, config, count) → samples (count, D) in float64."""

    def make(mixture, schedule, config, count, first=0):
        def run(keys):
            return sample(mixture.denoiser, keys=keys, shape=mixture.shape, schedule=schedule, config=config)

        made = jax.jit(run)(keys_of(count, first))
        return np.asarray(made, np.float64).reshape(count, -1)

    return make

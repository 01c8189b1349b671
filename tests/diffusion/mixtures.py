"""Gaussian mixtures, whose denoiser is known in closed form, and the exact probability flow through them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np


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


def column():
    """Three kinds of pictures of 3×1 pixels."""
    generator = np.random.default_rng(5)
    return Mixture(
        shape=(3, 1, 1),
        weights=np.array([0.5, 0.3, 0.2]),
        means=np.array([[0.6, -0.3, 0.2], [-0.5, 0.4, 0.5], [0.1, -0.7, -0.6]]),
        stds=generator.uniform(0.15, 0.45, (3, 3)),
        basis=np.linalg.qr(generator.standard_normal((3, 3)))[0],
    )


def conditional_moments(mixture, truth, known):
    """Mean and covariance of the unknown coordinates given the known ones."""
    weights, means, covariances = [], [], []
    for weight, mean, std in zip(mixture.weights, mixture.means, mixture.stds, strict=True):
        mean, covariance = mixture.basis @ mean, mixture.basis @ np.diag(std**2) @ mixture.basis.T
        of_known, away = covariance[np.ix_(known, known)], truth[known] - mean[known]
        gain = covariance[np.ix_(~known, known)] @ np.linalg.inv(of_known)
        likelihood = np.exp(-0.5 * away @ np.linalg.solve(of_known, away)) / np.sqrt(np.linalg.det(of_known))
        weights.append(weight * likelihood)
        means.append(mean[~known] + gain @ away)
        covariances.append(covariance[np.ix_(~known, ~known)] - gain @ covariance[np.ix_(known, ~known)])
    weights = np.array(weights) / np.sum(weights)
    mean = weights @ np.array(means)
    spread = np.array(means) - mean
    return mean, np.tensordot(weights, covariances, 1) + (weights[:, None] * spread).T @ spread

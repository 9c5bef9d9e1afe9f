"""Data whose optimal denoiser, marginals and probability flow are known: a Gaussian."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from cascaded_diffusion.types import Prediction


def levels(logsnr):
    """alpha^2 and sigma^2 in float64."""
    logsnr = np.asarray(logsnr, np.float64)
    return 1 / (1 + np.exp(-logsnr)), 1 / (1 + np.exp(logsnr))


@dataclasses.dataclass(frozen=True)
class GaussianData:
    """x0 ~ N(mean, covariance) over the D pixels of an image of `shape`."""

    mean: np.ndarray
    covariance: np.ndarray
    shape: tuple[int, ...]

    @functools.cached_property
    def modes(self):
        """Eigenvalues [D] and eigenvectors [D, D] of the covariance."""
        return np.linalg.eigh(self.covariance)

    def denoise(self, xt, logsnr):
        """E[x0 | xt] and E[eps | xt]."""
        values, vectors = (jnp.asarray(x, jnp.float32) for x in self.modes)
        mean = jnp.asarray(self.mean, jnp.float32)
        alpha2 = 1 / (1 + jnp.exp(-logsnr))[:, None]
        sigma2 = 1 / (1 + jnp.exp(logsnr))[:, None]
        centred = (xt.reshape(len(xt), -1) - jnp.sqrt(alpha2) * mean) @ vectors
        centred = centred / (alpha2 * values + sigma2)
        x0 = mean + (jnp.sqrt(alpha2) * values * centred) @ vectors.T
        eps = (jnp.sqrt(sigma2) * centred) @ vectors.T
        return Prediction(x0=x0.reshape(xt.shape), eps=eps.reshape(xt.shape))

    def marginal(self, logsnr):
        """Mean [D] and covariance [D, D] of q(xt)."""
        alpha2, sigma2 = levels(logsnr)
        return np.sqrt(alpha2) * self.mean, alpha2 * self.covariance + sigma2 * np.eye(
            len(self.mean)
        )

    def flow(self, xt, logsnr_t, logsnr_s):
        """The exact solution at s of the probability-flow ODE through xt [B, ...] at t."""
        values, vectors = self.modes
        (alpha2_t, sigma2_t), (alpha2_s, sigma2_s) = levels(logsnr_t), levels(logsnr_s)
        centred = (np.asarray(xt, np.float64).reshape(len(xt), -1) - alpha2_t**0.5 * self.mean) @ (
            vectors
        )
        stretch = np.sqrt((alpha2_s * values + sigma2_s) / (alpha2_t * values + sigma2_t))
        xs = alpha2_s**0.5 * self.mean + (stretch * centred) @ vectors.T
        return xs.reshape(xt.shape)

    def posterior_variance(self, logsnr):
        """Var[x0 | xt] of each pixel [D]."""
        alpha2, sigma2 = levels(logsnr)
        values, vectors = self.modes
        return vectors**2 @ (values * sigma2 / (alpha2 * values + sigma2))


def correlated(side=4, seed=0):
    """Pixels of different means, correlated by a full covariance; stds from 0.2 to 0.9."""
    rng = np.random.default_rng(seed)
    dims = side * side
    vectors, _ = np.linalg.qr(rng.normal(size=(dims, dims)))
    values = np.linspace(0.2, 0.9, dims) ** 2
    mean = rng.uniform(-0.5, 0.5, dims)
    return GaussianData(mean, (vectors * values) @ vectors.T, (side, side, 1))


def independent(side=4, stds=(0.1, 0.9), seed=0):
    """Pixels of different means and stds, without correlation."""
    dims = side * side
    mean = np.random.default_rng(seed).uniform(-0.5, 0.5, dims)
    return GaussianData(mean, np.diag(np.linspace(*stds, dims) ** 2), (side, side, 1))

r"""The Fréchet distance between two sets of features, from streamed statistics.

Each set is summed up by its mean mu and covariance C (divisor n - 1), and

    (1)  d^2 = |mu_1 - mu_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^(1/2))

(Dowson & Landau 1982; Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update
Rule", for features of Inception). With the symmetric eigendecompositions
C_i = U_i L_i U_i^T and the factors F_i = U_i L_i^(1/2), C_1 C_2 has the nonzero
eigenvalues of (F_1^T F_2)(F_1^T F_2)^T, so that

    (2)  tr((C_1 C_2)^(1/2)) = sum_j s_j(F_1^T F_2),   s_j: singular values

needs no general matrix square root, whose results can be complex or worse. With fewer examples
than features, many eigenvalues are zero; what rounding turns into e counts e in (2), not sqrt(e).

Statistics are merged about the mean (Chan, Golub & LeVeque 1983). For parts a, b and
M = sum (x - mu)(x - mu)^T over a part,

    (3)  M = M_a + M_b + (n_a n_b / n) (mu_a - mu_b)(mu_a - mu_b)^T

which is exact for any split and order. So are plain sums of x x^T, but the covariance is then a
small difference of large numbers if the means are large against the spread.

All computations are in float64 on the host.
"""

import dataclasses
import math
from typing import Self

import numpy as np
import numpy.typing as npt

from cascaded_diffusion.evaluation.metrics.feature_checks import checked_features

# Rows held in float64 at a time: 64 MB of features of size 2048.
_BLOCK_ROWS = 4096
# A covariance stored in float32 has eigenvalues down to about -1e-6 of the largest.
_MOST_NEGATIVE = -1e-3


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean [F] and covariance [F, F] of features, which are all that a distance needs."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Count, sum and scatter of features, float64, which `+` merges in any order, eq. (3)."""

    count: int
    total: np.ndarray  # [F], the sum of the features
    outer: np.ndarray  # [F, F], the sum of outer products of the features less their mean

    @classmethod
    def of(cls, features: npt.ArrayLike) -> Self:
        """Statistics of features [n, F] of any n, also 0, as by `checked_features`."""
        features = checked_features(features, name="features")
        size = features.shape[1]
        statistics = cls(0, np.zeros(size), np.zeros((size, size)))
        for start in range(0, len(features), _BLOCK_ROWS):
            block = features[start : start + _BLOCK_ROWS].astype(np.float64)
            total = block.sum(0)
            block -= total / len(block)
            statistics += cls(len(block), total, block.T @ block)
        return statistics

    def __add__(self, other: Self) -> Self:
        """Eq. (3). Raises ValueError for features of different sizes."""
        _check_sizes(len(self.total), len(other.total))
        # An empty part has no mean.
        if other.count == 0:
            return self
        if self.count == 0:
            return other
        count = self.count + other.count
        difference = self.mean - other.mean
        between = np.outer(difference * (self.count / count * other.count), difference)
        between += self.outer
        between += other.outer
        return FeatureStatistics(count, self.total + other.total, between)

    @property
    def mean(self) -> np.ndarray:
        """[F]."""
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """[F, F], divisor n - 1. Raises ValueError for fewer than two examples."""
        if self.count < 2:
            raise ValueError(f"at least 2 examples are needed for a covariance, got {self.count}")
        return self.outer / (self.count - 1)


@dataclasses.dataclass(frozen=True)
class FrechetTerms:
    """A Fréchet distance and its parts."""

    distance: float  # eq. (1), the squared distance, as FID reports it; not below 0
    mean_term: float  # |mu_1 - mu_2|^2
    covariance_term: float  # tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^(1/2))
    # The most negative eigenvalue of either covariance over its largest one, or 0. Rounding makes
    # about -1e-16 in float64, and -1e-7 in a reference that was stored in float32.
    clipped: float


def frechet_terms(a: FeatureStatistics | Moments, b: FeatureStatistics | Moments) -> FrechetTerms:
    """Eqs. (1) and (2), with their parts; symmetric in a and b.

    Raises ValueError for fewer than two examples on one side, different feature sizes, a mean or
    covariance that is not finite, or a matrix that is no covariance.
    """
    a, b = _checked(a), _checked(b)
    _check_sizes(len(a.mean), len(b.mean))
    (factor_a, clipped_a), (factor_b, clipped_b) = _factor(a.covariance), _factor(b.covariance)
    trace_of_root = np.linalg.svd(factor_a.T @ factor_b, compute_uv=False).sum()
    difference = a.mean - b.mean
    mean_term = float(difference @ difference)
    covariance_term = float(np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_of_root)
    distance = max(mean_term + covariance_term, 0.0)
    return FrechetTerms(distance, mean_term, covariance_term, min(clipped_a, clipped_b))


def frechet_distance(a: FeatureStatistics | Moments, b: FeatureStatistics | Moments) -> float:
    """Eqs. (1) and (2), the squared distance, as FID reports it. Raises as `frechet_terms`."""
    return frechet_terms(a, b).distance


def _factor(covariance: np.ndarray) -> tuple[np.ndarray, float]:
    """F [F, rank] with F F^T = covariance, and its most negative relative eigenvalue."""
    values, vectors = np.linalg.eigh(covariance)
    lowest, largest = float(values[0]), float(values[-1])
    clipped = 0.0
    if lowest < 0:
        clipped = lowest / largest if largest > 0 else -math.inf
    if clipped < _MOST_NEGATIVE:
        raise ValueError(
            f"covariance has eigenvalues from {lowest:.3g} to {largest:.3g}, expected none below 0:"
            " it is damaged, or something else"
        )
    # Rounding scatters zeros to both sides; the negative side shows how far.
    kept = values > max(-2 * lowest, 0.0)
    return vectors[:, kept] * np.sqrt(values[kept]), clipped


def _checked(side: FeatureStatistics | Moments) -> Moments:
    covariance = np.asarray(side.covariance, np.float64)
    mean = np.asarray(side.mean, np.float64)
    if mean.ndim != 1 or len(mean) == 0 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"mean has shape {list(mean.shape)}, covariance {list(covariance.shape)}, "
            "expected [F] and [F, F]"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("mean or covariance is not finite: the features or their file are broken")
    # eigh would not notice, since it reads one triangle only.
    if np.abs(covariance - covariance.T).max() > 1e-5 * np.abs(covariance).max():
        raise ValueError("covariance is not symmetric: it is damaged, or something else")
    return Moments(mean=mean, covariance=covariance)


def _check_sizes(a: int, b: int) -> None:
    if a != b:
        raise ValueError(
            f"features of sizes {a} and {b} cannot be compared: they come from different extractors"
        )

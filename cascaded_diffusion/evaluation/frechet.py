r"""The Fréchet distance between two sets of features, from streamed statistics.

Each set is summed up by its mean mu and covariance C (divisor n - 1), and

    (1)  d^2 = |mu_1 - mu_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^(1/2))

(Dowson & Landau 1982). With S = C_1^(1/2), C_1 C_2 has the eigenvalues of the
symmetric S C_2 S, so that

    (2)  tr((C_1 C_2)^(1/2)) = sum_i sqrt(lambda_i(S C_2 S))

needs two symmetric eigendecompositions and no general matrix square root, whose
results can be complex or worse. All of it is float64 on the host.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Count, sum and sum of outer products of features, about a fixed origin.

    Sums can be merged in any order and over any split into batches or hosts.

    Attributes:
      count: number of examples.
      total: [F] float64.
      outer: [F, F] float64.
    """

    count: int
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> FeatureStatistics:
        """Statistics of one batch of features [n, F].

        Raises:
          ValueError: a feature is not finite.
        """
        features = np.asarray(features, np.float64)
        if not np.isfinite(features).all():
            raise ValueError("features are not finite: the images or the extractor are broken")
        return cls(len(features), features.sum(0), features.T @ features)

    def __add__(self, other: FeatureStatistics) -> FeatureStatistics:
        return FeatureStatistics(
            self.count + other.count, self.total + other.total, self.outer + other.outer
        )

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        centred = self.outer - np.outer(self.total, self.total) / self.count
        return centred / (self.count - 1)


def _sqrt_of_psd(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    # Rounding makes the zero eigenvalues of a rank-deficient covariance negative.
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Eqs. (1) and (2): the squared distance, as FID reports it.

    Raises:
      ValueError: fewer than two examples on one side.
    """
    if min(a.count, b.count) < 2:
        raise ValueError(f"at least 2 examples are needed on each side, got {a.count}, {b.count}")
    root = _sqrt_of_psd(a.covariance)
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace_of_root = np.sqrt(np.clip(eigenvalues, 0.0, None)).sum()
    difference = a.mean - b.mean
    distance = (
        difference @ difference
        + np.trace(a.covariance)
        + np.trace(b.covariance)
        - 2.0 * trace_of_root
    )
    return float(max(distance, 0.0))

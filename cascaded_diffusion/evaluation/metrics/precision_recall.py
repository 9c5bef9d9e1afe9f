r"""Improved precision and recall of a set of generated images.

A set X of features stands for the region

    (1)  M(X) = { y : |y - x| <= r(x) for some x in X }

where r(x) is the distance from x to its k-th nearest neighbour among the other members of X,
including those equal to x. For real features R and generated features G,

    (2)  precision = |{ g in G : g in M(R) }| / |G|      (how many samples look real)
    (3)  recall    = |{ r in R : r in M(G) }| / |R|      (how much of the data is covered)

(Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing
Generative Models", k = 3). Both depend on how many examples there are.

Distances come from a matrix product, whose error for features of size F is

    (4)  |x - y|^2 = |x|^2 + |y|^2 - 2 x . y + e,   |e| <= (F + 4) eps (|x|^2 + |y|^2)

Where e could change a comparison, the distance is computed again from the difference x - y. Equal
examples are one point with a multiplicity: all their comparisons would have to be repeated, and a
collapsed generator has few others. All computations are in float64 on the host.
"""

import numpy as np
import numpy.typing as npt

from cascaded_diffusion.evaluation.metrics.feature_checks import checked_pair

# The number of differences x - y held at a time: 64 MB for features of size 2048.
_DIFFERENCES = 4096


class _Points:
    """A set of features as distinct points [u, F] float64, with their multiplicities and |x|^2."""

    def __init__(self, features: np.ndarray):
        features = features.astype(np.float64)
        self.features, self.counts = np.unique(features, axis=0, return_counts=True)
        self.squares = np.einsum("uf,uf->u", self.features, self.features)


def precision_recall(
    real: npt.ArrayLike, generated: npt.ArrayLike, *, num_neighbours: int = 3, block: int = 512
) -> tuple[float, float]:
    """Eqs. (2) and (3) of features [m, F] and [n, F], each in [0, 1].

    k is `num_neighbours`. `block`, the rows of the distance matrix that are held at a time, does
    not change the result; besides the features, a few times block * max(m, n) numbers are held.
    Raises ValueError for no more than k examples on one side, different feature sizes, numbers
    that are not finite, or k or block below 1.
    """
    if min(num_neighbours, block) < 1:
        raise ValueError(f"{num_neighbours} neighbours in blocks of {block}: expected 1 or more")
    real, generated = checked_pair(real, generated, at_least=num_neighbours + 1)
    real_points, generated_points = _Points(real), _Points(generated)
    real_radii = _squared_radii(real_points, num_neighbours, block)
    generated_radii = _squared_radii(generated_points, num_neighbours, block)

    looks_real = np.zeros(len(generated_points.counts), bool)
    is_covered = np.zeros(len(real_points.counts), bool)
    for start in range(0, len(generated_points.counts), block):
        rows = slice(start, start + block)
        pairs = _Pairs(generated_points, real_points, rows)
        looks_real[rows] = pairs.within(real_radii[None, :]).any(1)
        is_covered |= pairs.within(generated_radii[rows, None]).any(0)
    return (
        float(generated_points.counts[looks_real].sum() / len(generated)),
        float(real_points.counts[is_covered].sum() / len(real)),
    )


class _Pairs:
    """Bounds `lower` and `upper` [rows, b] of squared distances from rows of a to b, eq. (4)."""

    def __init__(self, a: _Points, b: _Points, rows: slice):
        self._a, self._b = a.features[rows], b.features
        norms = a.squares[rows, None] + b.squares[None, :]
        self.lower = self._a @ self._b.T
        self.lower *= -2.0
        self.lower += norms
        # Twice the bound, since distances computed from differences are rounded as well.
        norms *= 2 * (self._a.shape[1] + 4) * np.finfo(np.float64).eps
        self.upper = self.lower + norms
        self.lower -= norms

    def exact(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Squared distances of pairs [p], from their differences."""
        distances = np.empty(len(rows))
        for start in range(0, len(rows), _DIFFERENCES):
            part = slice(start, start + _DIFFERENCES)
            difference = self._a[rows[part]] - self._b[columns[part]]
            distances[part] = np.einsum("pf,pf->p", difference, difference)
        return distances

    def within(self, squared_radii: np.ndarray) -> np.ndarray:
        """[rows, b]: whether a distance is at most the radius [rows, 1] or [1, b]."""
        inside = self.upper <= squared_radii
        rows, columns = np.nonzero((self.lower <= squared_radii) & ~inside)
        limits = np.broadcast_to(squared_radii, inside.shape)[rows, columns]
        inside[rows, columns] = self.exact(rows, columns) <= limits
        return inside


def _squared_radii(points: _Points, num_neighbours: int, block: int) -> np.ndarray:
    """[u]: r^2 of eq. (1)."""
    size = len(points.counts)
    radii = np.empty(size)
    nearest = min(num_neighbours + 1, size)  # with the point itself
    for start in range(0, size, block):
        pairs = _Pairs(points, points, slice(start, start + block))
        reach = np.partition(pairs.upper, nearest - 1, axis=1)[:, nearest - 1, None]
        for row, is_near in enumerate(pairs.lower <= reach):
            columns = np.flatnonzero(is_near)
            distances = pairs.exact(np.full_like(columns, row), columns)
            order = np.argsort(distances)
            # The number of examples within each distance, the point itself among them.
            so_far = np.cumsum(points.counts[columns[order]])
            radii[start + row] = distances[order][np.argmax(so_far > num_neighbours)]
    return radii

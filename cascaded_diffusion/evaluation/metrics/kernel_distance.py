r"""The kernel distance between two sets of features (KID, where they are Inception's).

The squared maximum mean discrepancy under a cubic kernel on features of size F,

    (1)  k(x, y) = (x . y / F + 1)^3
    (2)  d = sum_{i != j} k(x_i, x_j) / (m (m - 1)) + sum_{i != j} k(y_i, y_j) / (n (n - 1))
             - 2 sum_{i, j} k(x_i, y_j) / (m n)

for m real and n generated examples (Binkowski et al. 2018, "Demystifying MMD GANs";
Gretton et al. 2012, eq. 3). Its expectation is the distance of the distributions for any m and
n, so it is sometimes negative for equal ones. The usual estimate is the mean of (2) over random
subsets of both sets, with its standard deviation.

Results are not multiplied by 1000. All computations are in float64 on the host.
"""

import numpy as np
import numpy.typing as npt

from cascaded_diffusion.evaluation.metrics.feature_checks import checked_pair


def squared_discrepancy(real: npt.ArrayLike, generated: npt.ArrayLike) -> float:
    """Eq. (2) of features [m, F] and [n, F]; memory for (m + n)^2 numbers.

    Raises ValueError for fewer than two examples on one side, different feature sizes, or numbers
    that are not finite.
    """
    real, generated = checked_pair(real, generated, at_least=2)
    m, n = len(real), len(generated)
    points = np.concatenate([real, generated], dtype=np.float64)
    kernel = points @ points.T
    kernel /= points.shape[1]
    kernel += 1.0
    kernel *= kernel * kernel
    np.fill_diagonal(kernel, 0.0)
    within_real = kernel[:m, :m].sum() / (m * (m - 1))
    within_generated = kernel[m:, m:].sum() / (n * (n - 1))
    return float(within_real + within_generated - 2 * kernel[:m, m:].sum() / (m * n))


def kernel_distance(
    real: npt.ArrayLike,
    generated: npt.ArrayLike,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Mean and standard deviation (divisor `num_subsets`) of eq. (2) over random subsets.

    The features are of any float type. The `subset_size` examples of a subset are drawn without
    replacement; if the smaller set has fewer, all of it is taken. Raises ValueError as
    `squared_discrepancy`, and for num_subsets < 1 or subset_size < 2.
    """
    real, generated = checked_pair(real, generated, at_least=2)
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(
            f"{num_subsets} subsets of {subset_size}: expected at least 1 subset of at least 2"
        )
    size = min(subset_size, len(real), len(generated))
    if size == len(real) == len(generated):  # all subsets are the same
        return squared_discrepancy(real, generated), 0.0
    rng = np.random.default_rng(seed)
    values = [
        squared_discrepancy(*(rng.choice(x, size, replace=False) for x in (real, generated)))
        for _ in range(num_subsets)
    ]
    return float(np.mean(values)), float(np.std(values))

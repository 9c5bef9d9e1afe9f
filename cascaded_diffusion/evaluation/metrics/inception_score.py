r"""The inception score, from streamed statistics.

A classifier gives image i the probabilities p_i(k) = softmax(logits_i)_k. Over the n
images of a set, with q = (1/n) sum_i p_i,

    (1)  IS = exp( (1/n) sum_i KL(p_i | q) )

(Salimans et al. 2016, "Improved Techniques for Training GANs"). As sum_i p_i = n q,

    (2)  (1/n) sum_i KL(p_i | q) = (1/n) sum_i sum_k p_i(k) log p_i(k) - sum_k q(k) log q(k)

needs only sums over images. The score is the mean over S = 10 contiguous splits of
the N samples, beside its standard deviation (divisor S); it depends on both S and N
(Barratt & Sharma 2018, "A Note on the Inception Score"). Split s has the samples

    (3)  floor(s N / S) <= i < floor((s + 1) N / S)   or   s = floor(((i + 1) S - 1) / N)

as in the authors' own code. All computations are in float64 on the host.
"""

import dataclasses
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy import special

from cascaded_diffusion.evaluation.metrics.feature_checks import checked_features


@dataclasses.dataclass(frozen=True)
class ScoreStatistics:
    """Sums of class probabilities per split, for K classes and S splits, which `+` merges.

    Any order and division into batches or hosts will do, since a sample's split follows from its
    index among all samples.
    """

    num_samples: int  # N of eq. (3), the number of samples in the end
    counts: np.ndarray  # [S] int64, the number of samples of each split so far
    totals: np.ndarray  # [S, K] float64, the sum of p
    negative_entropies: np.ndarray  # [S] float64, the sum of sum_k p log p

    @classmethod
    def of(
        cls, logits: npt.ArrayLike, indices: np.ndarray, *, num_samples: int, num_splits: int = 10
    ) -> Self:
        """Statistics of logits [m, K], of any float type, of the samples `indices` [m] of all N.

        Raises ValueError for fewer samples than splits; logits or indices of another shape; logits
        that are not finite; an index outside of [0, num_samples) or given twice.
        """
        logits = checked_features(logits, name="logits")
        if not 1 <= num_splits <= num_samples:
            raise ValueError(
                f"{num_samples} samples leave some of {num_splits} splits without any: "
                "expected 1 <= num_splits <= num_samples"
            )
        if indices.shape != logits.shape[:1] or indices.dtype.kind not in "iu":
            raise ValueError(
                f"indices are {indices.dtype} {list(indices.shape)}, "
                f"expected one integer for each of {len(logits)} rows of logits"
            )
        indices = indices.astype(np.int64)
        low, high = (indices.min(), indices.max()) if len(indices) else (0, 0)
        if not 0 <= low <= high < num_samples:
            raise ValueError(
                f"indices run from {low} to {high}, expected them in [0, {num_samples})"
            )
        if len(np.unique(indices)) < len(indices):
            raise ValueError("an index is there twice: each sample counts once")

        splits = ((indices + 1) * num_splits - 1) // num_samples  # eq. (3)
        counts = np.bincount(splits, minlength=num_splits)
        totals = np.zeros((num_splits, logits.shape[1]))
        negative_entropies = np.zeros(num_splits)
        for split in np.flatnonzero(counts):
            log_p = special.log_softmax(logits[splits == split].astype(np.float64), axis=1)
            p = np.exp(log_p)
            totals[split] = p.sum(0)
            negative_entropies[split] = (p * log_p).sum()
        return cls(num_samples, counts, totals, negative_entropies)

    def __add__(self, other: Self) -> Self:
        """The statistics of both parts, which must be of the same set and share no sample."""
        shapes = [(x.num_samples, *x.totals.shape) for x in (self, other)]
        for what, mine, theirs in zip(("samples", "splits", "classes"), *shapes, strict=True):
            if mine != theirs:
                raise ValueError(
                    f"statistics of {mine} and of {theirs} {what} cannot be merged: "
                    "they are not of the same set"
                )
        names = ("counts", "totals", "negative_entropies")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return dataclasses.replace(self, **sums)

    def score(self) -> tuple[float, float]:
        """Eqs. (1) and (2): mean and standard deviation over the splits, from 1 to K.

        Raises ValueError if samples are missing, or some were counted twice.
        """
        bounds = np.arange(len(self.counts) + 1) * self.num_samples // len(self.counts)
        if (counts := self.counts.tolist()) != (expected := np.diff(bounds).tolist()):
            raise ValueError(
                f"splits have {counts} samples, expected {expected}: each of all samples must be"
                " counted once"
            )
        entropies = special.entr(self.totals / self.counts[:, None]).sum(1)
        scores = np.exp(self.negative_entropies / self.counts + entropies)
        return float(scores.mean()), float(scores.std())

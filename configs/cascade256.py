"""The paper's 256 px cascade on ImageNet: base32, sr64 and sr256, 50,000 samples.

    python -m cascaded_diffusion.sample --config=configs/cascade256.py --workdir=RUN

The stages' runs are RUN/base32, RUN/sr64 and RUN/sr256.
Hardware and hours: not measured; 2.5e15 FLOP per sample.
Expected FID: 4.88 to the training images, 4.63 to the validation images, Inception Score
158.71 (paper); here not measured.
The level between 32 and 64 px is that of cascade64; the paper does not say for this one.
sr256 was trained with blur, and sees clean images when sampling.
"""

from ml_collections import ConfigDict
from sections import ancestral, paper_cascade


def get_config(variant: str | None = None) -> ConfigDict:
    return paper_cascade(
        variant,
        stages=("base32", "sr64", "sr256"),
        aug_levels=(501 / 4000, 0.0),  # paper, Table 5; blur has no level
        truncated=True,  # as cascade64
        samplers=(
            ancestral(4000, "learned"),  # paper
            ancestral(4000, "learned"),  # paper
            ancestral(100, "large"),  # paper: 100 steps; SR3
        ),
        batch_size=256,
    )

"""The paper's baseline without a cascade on ImageNet: base64 alone, 50,000 samples.

    python -m cascaded_diffusion.sample --config=configs/uncascaded64.py --workdir=RUN

The only stage's run is RUN/base64.
Hardware and hours: not measured; 3.6e14 FLOP per sample.
Expected FID: 2.35 to the training images (paper); here not measured.
"""

from ml_collections import ConfigDict
from sections import ancestral, paper_cascade


def get_config(variant: str | None = None) -> ConfigDict:
    return paper_cascade(
        variant,
        stages=("base64",),
        aug_levels=(),
        truncated=False,
        samplers=(ancestral(2000, "learned"),),  # paper, Table 3
        batch_size=512,
    )

"""The paper's small ablation on ImageNet: base16 and sr64_from16, 50,000 samples.

    python -m cascaded_diffusion.sample --config=configs/cascade64_from16.py --workdir=RUN

The stages' runs are RUN/base16 and RUN/sr64_from16.
Hardware and hours: not measured; 7.6e14 FLOP per sample.
Expected FID to the training images, by level (paper, not truncated; here not measured): 6.02 at
0, 3.41 at 101 / 4000, 2.13 at 1001 / 4000; without a cascade 2.35 (uncascaded64).
"""

from ml_collections import ConfigDict
from sections import ancestral, paper_cascade


def get_config(variant: str | None = None) -> ConfigDict:
    return paper_cascade(
        variant,
        stages=("base16", "sr64_from16"),
        aug_levels=(1001 / 4000,),  # paper, Table 4
        truncated=False,  # paper, Table 4
        samplers=(ancestral(4000, "learned"),) * 2,  # as base32
        batch_size=512,
    )

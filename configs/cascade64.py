"""The paper's 64 px cascade on ImageNet: base32 and sr64 chained, 50,000 samples.

    python -m cascaded_diffusion.sample --config=configs/cascade64.py --workdir=RUN

The stages' runs are RUN/base32 and RUN/sr64.
Hardware and hours: not measured; 2.4e15 FLOP per sample.
Expected FID: 1.48 to the training images, 2.48 to the validation images, Inception Score
67.95 (paper); here not measured.
Truncated at step 501 of 4000, one of the paper's two best levels; without truncation the
paper's best are 751 and 1251.
"""

from ml_collections import ConfigDict
from sections import ancestral, paper_cascade


def get_config(variant: str | None = None) -> ConfigDict:
    return paper_cascade(
        variant,
        stages=("base32", "sr64"),
        aug_levels=(501 / 4000,),  # paper, Table 5
        truncated=True,  # paper, Table 5
        samplers=(ancestral(4000, "learned"),) * 2,  # paper
        batch_size=512,
    )

"""The 128 px cascade on LSUN bedrooms: lsun_base64 and lsun_sr128, 50,000 samples.

    python -m cascaded_diffusion.sample --config=configs/lsun_cascade128.py --workdir=RUN

The stages' runs are RUN/lsun_base64 and RUN/lsun_sr128.
Hardware and hours: not measured; 7.7e14 FLOP per sample.
Expected FID: the paper has a number, which we did not recover; not measured.
Gaussian augmentation, not truncated, is the paper's; its level is not published.
"""

from ml_collections import ConfigDict
from sections import ancestral, paper_cascade


def get_config(variant: str | None = None) -> ConfigDict:
    return paper_cascade(
        variant,
        stages=("lsun_base64", "lsun_sr128"),
        aug_levels=(500 / 4000,),  # not published; ours
        truncated=False,  # paper
        samplers=(
            ancestral(4000, "learned"),  # as base32
            ancestral(100, "large"),  # as sr128
        ),
        batch_size=256,
    )

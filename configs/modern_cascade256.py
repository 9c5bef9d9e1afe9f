"""Ours: modern_base64 and modern_sr256 chained, 50,000 samples of ImageNet at 256 px.

    python -m cascaded_diffusion.sample --config=configs/modern_cascade256.py --workdir=RUN

The stages' runs are RUN/modern_base64 and RUN/modern_sr256.
Hardware, hours and expected FID: not measured; 3.0e13 FLOP per sample.
Guidance, steps and level are to be chosen when trained: `evaluate sweep`.
"""

from ml_collections import ConfigDict
from sections import dpmpp_2m, paper_cascade


def get_config(variant: str | None = None) -> ConfigDict:
    return paper_cascade(
        variant,
        stages=("modern_base64", "modern_sr256"),
        aug_levels=(0.1,),
        truncated=False,
        samplers=(dpmpp_2m(32, 1.5, (0.2, 0.8)), dpmpp_2m(32)),
        batch_size=256,
    )

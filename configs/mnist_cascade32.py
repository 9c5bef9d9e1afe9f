"""The demo cascade: base16 and sr32 chained, 1,000 class-balanced 32 px digits.

    python -m cascaded_diffusion.sample --config=configs/mnist_cascade32.py --workdir=RUN

The stages' runs are RUN/base16 and RUN/sr32. Their augmentation is amortized, so that
`aug_levels` and `truncated` can be chosen here, after training.
"""

from ml_collections import ConfigDict
from sections import dpmpp_2m, small_cascade


def get_config(variant: str | None = None) -> ConfigDict:
    return small_cascade(
        variant,
        {None: 1000, "smoke": 40},
        data="mnist",
        stages=("base16", "sr32"),
        aug_levels=(0.1,),
        samplers=(dpmpp_2m(10, guidance_scale=1.5), dpmpp_2m(8)),
    )

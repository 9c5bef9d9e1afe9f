"""Three stages on MNIST: base8, sr16 and sr32 chained, 1,000 class-balanced 32 px digits.

    python -m cascaded_diffusion.sample --config=configs/mnist_cascade8to32.py --workdir=RUN

The stages' runs are RUN/base8, RUN/sr16 and RUN/sr32. Expected fd_classifier of the samples:
4.2 (measured). There is one level per enlargement: 8 to 16 px, and 16 to 32 px.
"""

from ml_collections import ConfigDict
from sections import dpmpp_2m, small_cascade


def get_config(variant: str | None = None) -> ConfigDict:
    return small_cascade(
        variant,
        {None: 1000, "smoke": 40},
        data="mnist",
        stages=("base8", "sr16", "sr32"),
        aug_levels=(0.2, 0.1),
        samplers=(dpmpp_2m(10, guidance_scale=1.5), dpmpp_2m(8), dpmpp_2m(8)),
    )

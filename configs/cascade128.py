"""The paper's 128 px cascade on ImageNet: base32, sr64 and sr128, 50,000 samples.

    python -m cascaded_diffusion.sample --config=configs/cascade128.py --workdir=RUN

RUN holds the runs of the stages, RUN/base32, RUN/sr64 and RUN/sr128.
Hardware and hours: not measured; 2.4e15 FLOP per sample.
Expected FID: 3.52 to the training images, 3.76 to the validation images, Inception Score
128.80 (paper); here not measured.
The level between 32 and 64 px is that of cascade64; the paper does not say for this one.
sr128 was trained with blur, and sees clean images when sampling.
"""

from ml_collections import ConfigDict
from sections import ancestral, check_variant, data_mesh, files_of, shrink_cascade


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, "smoke")
    config = ConfigDict()
    config.cascade = dict(
        stages=("base32", "sr64", "sr128"),
        configs=files_of(variant, "base32", "sr64", "sr128"),
        aug_levels=(501 / 4000, 0.0),  # paper, Table 5; blur has no level
        truncated=True,  # as cascade64
        samplers=(
            ancestral(4000, "learned"),  # paper
            ancestral(4000, "learned"),  # paper
            ancestral(100, "large"),  # paper: 100 steps; SR3
        ),
        num_samples=50_000,  # paper
        batch_size=256,
        seed=0,
    )
    config.mesh = data_mesh()
    if variant == "smoke":
        shrink_cascade(config)
    return config

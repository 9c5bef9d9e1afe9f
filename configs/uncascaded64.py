"""The paper's baseline without a cascade on ImageNet: base64 alone, 50,000 samples.

    python -m cascaded_diffusion.sample --config=configs/uncascaded64.py --workdir=RUN

RUN holds the runs of the stages, here of one, RUN/base64.
Hardware and hours: not measured; 3.6e14 FLOP per sample.
Expected FID: 2.35 to the training images (paper); here not measured.
"""

from ml_collections import ConfigDict
from sections import ancestral, check_variant, data_mesh, files_of, shrink_cascade


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, "smoke")
    config = ConfigDict()
    config.cascade = dict(
        stages=("base64",),
        configs=files_of(variant, "base64"),
        aug_levels=(),
        truncated=False,
        samplers=(
            ancestral(2000, "learned"),  # paper, Table 3
        ),
        num_samples=50_000,  # paper
        batch_size=512,
        seed=0,
    )
    config.mesh = data_mesh()
    if variant == "smoke":
        shrink_cascade(config)
    return config

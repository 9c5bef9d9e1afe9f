"""Three stages on MNIST: base8, sr16 and sr32 chained, 1,000 class-balanced 32 px digits.

    python -m cascaded_diffusion.sample --config=configs/mnist_cascade8to32.py --workdir=RUN

RUN holds the runs of the stages, RUN/base8, RUN/sr16 and RUN/sr32. Expected fd_classifier of
the samples: 4.8 (measured). One level per enlargement: of 8 to 16 px, and of 16 to 32 px.
"""

from ml_collections import ConfigDict
from sections import check_variant, data_mesh, ddim, files_of

_NUM_SAMPLES = {None: 1000, "smoke": 40}


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, *_NUM_SAMPLES)
    num_samples = _NUM_SAMPLES[variant]
    config = ConfigDict()
    config.cascade = dict(
        stages=("base8", "sr16", "sr32"),
        configs=files_of(variant, "mnist_base8", "mnist_sr16", "mnist_sr32"),
        aug_levels=(0.2, 0.1),
        truncated=False,
        samplers=(
            ddim(10, guidance_scale=1.5),
            ddim(8, guidance_scale=1.0),
            ddim(8, guidance_scale=1.0),
        ),
        num_samples=num_samples,
        batch_size=min(200, num_samples),
        seed=0,
    )
    config.mesh = data_mesh()
    return config

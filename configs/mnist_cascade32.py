"""The demo cascade: base16 and sr32 chained, 1,000 class-balanced 32 px digits.

    python -m cascaded_diffusion.sample --config=configs/mnist_cascade32.py --workdir=RUN

RUN holds the runs of the two stages, RUN/base16 and RUN/sr32. `aug_levels` and
`truncated` are chosen here, after training: that is what amortized conditioning
augmentation is for.
"""

from ml_collections import ConfigDict
from sections import check_variant, data_mesh, ddim, files_of

_NUM_SAMPLES = {None: 1000, "smoke": 40}


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, *_NUM_SAMPLES)
    num_samples = _NUM_SAMPLES[variant]
    config = ConfigDict()
    config.cascade = dict(
        stages=("base16", "sr32"),
        configs=files_of(variant, "mnist_base16", "mnist_sr32"),
        aug_levels=(0.1,),
        truncated=False,
        samplers=(ddim(10, guidance_scale=1.5), ddim(8, guidance_scale=1.0)),
        num_samples=num_samples,
        batch_size=min(200, num_samples),
        seed=0,
    )
    config.mesh = data_mesh()
    return config

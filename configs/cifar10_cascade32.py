"""CIFAR-10: base16 and sr32 chained, 1,000 class-balanced 32 px photos.

    python -m cascaded_diffusion.sample --config=configs/cifar10_cascade32.py --workdir=RUN

The stages' runs are RUN/base16 and RUN/sr32. Their augmentation is amortized, so that
`aug_levels` and `truncated` can be chosen here, after training.
"""

from ml_collections import ConfigDict
from sections import config_of, small_cascade

_STAGES = ("base16", "sr32")


def get_config(variant: str | None = None) -> ConfigDict:
    return small_cascade(
        variant,
        {None: 1000, "gpu": 5000, "cpu": 1000, "smoke": 40},
        data="cifar10",
        stages=_STAGES,
        aug_levels=(0.1,),
        # Each stage's own.
        samplers=tuple(
            config_of(f"cifar10_{name}", variant).stage.sampler.to_dict() for name in _STAGES
        ),
    )

"""Super-resolution 64 -> 256 px on ImageNet: the last stage of the paper's 256 px cascade.

    python -m cascaded_diffusion.main --config=configs/sr256.py --workdir=RUN/sr256

Hardware and hours: not measured; 0.62 billion parameters, 2.7e21 FLOP to train.
Expected FID of enlarged samples of sr64: 4.88 to the training images, 4.63 to the
validation images (paper, 50,000 samples); here not measured.
All else is as in sr128. The paper gives the strengths of the blur for this model alone.
"""

from ml_collections import ConfigDict
from sections import config_of, imagenet, in_variant


def get_config(variant: str | None = None) -> ConfigDict:
    config = config_of("sr128")
    config.stage.update(name="sr256", resolution=256)
    config.stage.network.update(
        channel_mults=(1, 2, 4, 4, 8, 8),  # paper, App. B
        num_res_blocks=(3, 3, 3, 3, 3, 3),  # paper, App. B
    )
    config.stage.augment.blur_sigmas = (0.4, 0.6)  # paper, Table 7
    config.data = imagenet(256)
    return in_variant(config, variant, channels=8, channel_mults=(1, 2, 2))

"""Super-resolution 32 -> 64 px on ImageNet: the second stage of the paper's cascades.

    python -m cascaded_diffusion.main --config=configs/sr64.py --workdir=RUN/sr64

Hardware and hours: not measured; 0.72 billion parameters, 1.1e21 FLOP to train.
Expected FID of enlarged samples of base32: 1.48 to the training images, 2.48 to the
validation images (paper, 50,000 samples, truncated at step 501 of 4000); here not
measured. All else is as in base32, also how checkpoints are compared and the final one is sampled.
"""

from ml_collections import ConfigDict
from sections import config_of, imagenet, in_variant


def get_config(variant: str | None = None) -> ConfigDict:
    config = config_of("base32")
    config.stage.update(name="sr64", kind="super_resolution", resolution=64, low_res_resolution=32)
    config.stage.network.update(
        num_res_blocks=(5, 5, 5, 5),  # paper, App. B
        upsample="bilinear",  # paper: bilinear or bicubic
    )
    config.stage.augment = dict(name="gaussian", max_level=1.0)  # paper, section 3; range: ours
    config.stage.low_res_schedule = config.stage.schedule  # that of base32
    config.data = imagenet(64)
    config.train.train_steps = 400_000  # paper, App. B
    config.eval.aug_level = 501 / 4000  # paper, Table 5
    return in_variant(config, variant)

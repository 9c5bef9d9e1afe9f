"""Super-resolution 16 -> 64 px on ImageNet: the second stage of the small ablation.

    python -m cascaded_diffusion.main --config=configs/sr64_from16.py --workdir=RUN/sr64_from16

Hardware and hours: not measured; 0.27 billion parameters, 4.4e20 FLOP to train.
Expected FID of enlarged samples of base16: 2.13 to the training images (paper, 50,000
samples, not truncated, noise of step 1001 of 4000); here not measured.
The paper publishes none of this model's settings but the augmentation. Ours are those of
base64, so that only the cascade differs.
"""

from ml_collections import ConfigDict
from sections import config_of, in_variant


def get_config(variant: str | None = None) -> ConfigDict:
    config = config_of("base64")
    config.stage.update(name="sr64_from16", kind="super_resolution", low_res_resolution=16)
    config.stage.network.upsample = "bilinear"  # paper: bilinear or bicubic
    config.stage.schedule.num_timesteps = 4000  # as base32
    config.stage.augment = dict(name="gaussian", max_level=1.0)  # paper, section 3; range: ours
    config.stage.low_res_schedule = config.stage.schedule  # that of base16
    config.stage.sampler.num_steps = 4000  # as base32
    config.train.train_steps = 400_000  # not published; ours
    config.eval.aug_level = 1001 / 4000  # paper, Table 4
    return in_variant(config, variant)

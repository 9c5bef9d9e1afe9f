"""Super-resolution 16 -> 32 px on CIFAR-10: the second stage of the colour cascade.

    python -m cascaded_diffusion.main --config=configs/cifar10_sr32.py --workdir=RUN/sr32

Hardware, hours and expected FID: not measured, but for the variants of cifar10_base16.
All is as in cifar10_base16 but what an enlargement needs. As in the paper: class and
upsampled low-res image as conditioning, Gaussian conditioning augmentation, amortized.
"""

from ml_collections import ConfigDict
from sections import config_of, train_for


def get_config(variant: str | None = None) -> ConfigDict:
    config = config_of("cifar10_base16", variant)
    config.stage.update(
        name="sr32",
        kind="super_resolution",
        resolution=32,
        low_res_resolution=16,
        low_res_schedule=config.stage.schedule,  # that of base16, whose images are its input
    )
    config.stage.diffusion.weighting = "none"  # only base models were compared with others
    if variant == "cpu":
        config.stage.network.patch_size = 4  # feature maps of 8 and 4 px: what two cores can afford
        train_for(config, 4000)
    elif variant == "gpu":
        config.stage.network.patch_size = 2  # 16 and 8 px, as in base16
        train_for(config, 6000)
    else:
        config.stage.network.update(channel_mults=(1, 2, 2), num_res_blocks=(1, 2, 2))
    config.stage.augment = dict(name="gaussian", max_level=1.0)
    config.stage.sampler.guidance_scale = 1.0
    config.eval.aug_level = 0.1
    return config

"""Super-resolution 64 -> 256 px on ImageNet, ours: what a cascade is made of today.

    python -m cascaded_diffusion.main --config=configs/modern_sr256.py --workdir=RUN/modern_sr256

Hardware, hours and expected FID: not measured; 0.47 billion parameters, 8.9e20 FLOP to train.
Not the paper's model, but its idea with what was found since: the Efficient U-Net and
Gaussian augmentation of Imagen (the paper found blur to be better with its own network),
v-prediction as in Imagen Video, the shifted schedule of simple diffusion in continuous
time, 32 steps of DPM-Solver++ in place of 100.
The learning rate, its warm-up and the EMA are Imagen's, too. All else is as in modern_base64;
values without an origin are ours.
"""

from ml_collections import ConfigDict
from sections import config_of, dpmpp_2m, imagenet, in_variant


def get_config(variant: str | None = None) -> ConfigDict:
    config = config_of("modern_base64")
    config.stage.update(
        name="modern_sr256",
        kind="super_resolution",
        resolution=256,
        low_res_resolution=64,
        low_res_schedule=config.stage.schedule,  # that of modern_base64, whose images it enlarges
        sampler=dpmpp_2m(32),
    )
    config.stage.network.update(
        name="efficient_unet",
        channels=128,  # Imagen
        channel_mults=(1, 2, 4, 8),  # Imagen
        num_res_blocks=(2, 4, 8, 8),  # Imagen
        attention_resolutions=(16,),  # Imagen
        num_heads=8,  # Imagen
        dropout_rate=0.0,  # Imagen
        resample="conv",  # Imagen
        scale_skips=True,  # Imagen
    )
    config.stage.diffusion.weighting = "none"
    # Imagen; the largest level is ours: levels of use are below 0.4
    config.stage.augment = dict(name="gaussian", max_level=0.5)
    config.data = imagenet(256)
    config.eval.batch_size = 512
    config.eval.aug_level = 0.1  # Imagen's range: 0.1 to 0.3
    return in_variant(config, variant)

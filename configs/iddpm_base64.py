"""Improved DDPM's class-conditional model of ImageNet at 64 px.

    python -m cascaded_diffusion.import_weights --source=improved_diffusion --model=imagenet64 \
        imagenet64_cond_270M_250K.pt --workdir=RUN/iddpm_base64

0.27 billion parameters; trained weights are published. Hardware and hours to train: not measured.
Expected FID: 2.92 to the training images (Improved DDPM, 50,000 samples); here not measured.
"iDDPM" is Improved DDPM (Nichol & Dhariwal 2021), its tables or its published flags. All that is
not said here is as in adm_base64.
"""

from ml_collections import ConfigDict
from sections import config_of, in_variant


def get_config(variant: str | None = None) -> ConfigDict:
    config = config_of("adm_base64")
    config.stage.name = "iddpm_base64"
    config.stage.network.update(
        attention_resolutions=(16, 8),  # iDDPM
        num_heads=4,  # iDDPM
        num_head_channels=None,
        dropout_rate=0.0,  # iDDPM
        resample="conv",  # iDDPM
    )
    config.stage.schedule.num_timesteps = 4000  # iDDPM
    config.stage.diffusion.vlb_weight = 1 / 4000  # iDDPM
    config.train.train_steps = 250_000  # iDDPM
    return in_variant(config, variant)

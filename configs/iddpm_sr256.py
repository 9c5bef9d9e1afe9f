"""Improved DDPM's upsampler 64 -> 256 px on ImageNet.

    python -m cascaded_diffusion.import_weights --source=improved_diffusion --model=upsample256 \
        upsample_cond_500K.pt --workdir=RUN/iddpm_sr256

0.28 billion parameters; trained weights are published. Hardware and hours to train: not measured.
Expected FID of enlarged samples of iddpm_base64: 12.3 to the training images (Improved DDPM, 50,000
samples); here not measured.
All that is not said here is as in adm_sr256.
"""

from ml_collections import ConfigDict
from sections import config_of, in_variant


def get_config(variant: str | None = None) -> ConfigDict:
    config = config_of("adm_sr256")
    config.stage.name = "iddpm_sr256"
    config.stage.network.update(attention_resolutions=(16, 8), resample="conv")  # iDDPM
    config.stage.schedule.num_timesteps = 4000  # iDDPM
    config.stage.diffusion.vlb_weight = 1 / 4000  # iDDPM
    config.train.learning_rate = 3e-4  # iDDPM
    return in_variant(config, variant, attention_resolutions=(32,))

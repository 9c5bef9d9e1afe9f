"""ADM's class-conditional model of ImageNet at 128 px, the base of its 512 px cascade.

    python -m cascaded_diffusion.import_weights --source=guided_diffusion --model=imagenet128 \
        128x128_diffusion.pt --workdir=RUN/adm_base128

0.42 billion parameters; trained weights are published. Hardware and hours to train: not measured.
Expected FID: 5.91 to the training images, without guidance by a classifier (ADM, 50,000 samples);
here not measured.
All that is not said here is as in adm_base64.
"""

from ml_collections import ConfigDict
from sections import config_of, imagenet, in_variant


def get_config(variant: str | None = None) -> ConfigDict:
    config = config_of("adm_base64")
    config.stage.update(name="adm_base128", resolution=128)
    config.stage.network.update(
        channels=256,  # ADM
        channel_mults=(1, 1, 2, 3, 4),  # ADM
        num_res_blocks=(2, 2, 2, 2, 2),  # ADM
        num_heads=4,  # ADM
        num_head_channels=None,
        dropout_rate=0.0,  # ADM
    )
    config.stage.schedule = dict(
        name="linear",  # ADM
        num_timesteps=1000,  # ADM
        noise_levels="discrete",  # ADM
        linear_betas=(1e-4, 0.02),  # ADM
    )
    config.data = imagenet(128) | dict(resize="adm")  # ADM
    config.train.update(batch_size=256, train_steps=4_360_000, learning_rate=1e-4)  # ADM
    config.eval.batch_size = 512
    return in_variant(config, variant, attention_resolutions=(16,))

"""ADM's upsampler 128 -> 512 px on ImageNet, the second stage of its 512 px cascade.

    python -m cascaded_diffusion.import_weights --source=guided_diffusion --model=upsample512 \
        128_512_upsampler.pt --workdir=RUN/adm_sr512

0.31 billion parameters; trained weights are published. Hardware and hours to train: not measured.
Expected FID of enlarged samples of adm_base128: 9.96 to the training images, without guidance by a
classifier (ADM, 50,000 samples); here not measured.
All that is not said here is as in adm_sr256.
"""

from ml_collections import ConfigDict
from sections import config_of, imagenet, in_variant


def get_config(variant: str | None = None) -> ConfigDict:
    config = config_of("adm_sr256")
    config.stage.update(name="adm_sr512", resolution=512, low_res_resolution=128)
    config.stage.network.update(
        attention_resolutions=(32, 16),  # ADM
        num_heads=None,
        num_head_channels=64,  # ADM
    )
    config.data = imagenet(512) | dict(resize="adm")  # ADM
    config.train.train_steps = 1_050_000  # ADM
    config.eval.batch_size = 64
    return in_variant(
        config,
        variant,
        channel_mults=(1, 2, 2),
        attention_resolutions=(32,),
        num_head_channels=8,
    )

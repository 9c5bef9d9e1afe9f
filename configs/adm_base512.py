"""ADM's class-conditional model of ImageNet at 512 px, without a cascade.

    python -m cascaded_diffusion.import_weights --source=guided_diffusion --model=imagenet512 \
        512x512_diffusion.pt --workdir=RUN/adm_base512

0.56 billion parameters; trained weights are published. Hardware and hours to train: not measured.
Expected FID: 23.24 to the training images, without guidance by a classifier (ADM, 50,000 samples);
here not measured.
All that is not said here is as in adm_base256.
"""

from ml_collections import ConfigDict
from sections import config_of, imagenet, in_variant


def get_config(variant: str | None = None) -> ConfigDict:
    config = config_of("adm_base256")
    config.stage.update(name="adm_base512", resolution=512)
    config.stage.network.update(
        channel_mults=(0.5, 1, 1, 2, 2, 4, 4),  # ADM
        num_res_blocks=(2, 2, 2, 2, 2, 2, 2),  # ADM
    )
    config.data = imagenet(512) | dict(resize="adm")  # ADM
    config.train.update(train_steps=1_940_000)  # ADM
    config.eval.batch_size = 64
    return in_variant(
        config,
        variant,
        channel_mults=(0.5, 1, 1, 1),
        attention_resolutions=(16,),
        num_head_channels=8,
    )

"""ADM's class-conditional model of ImageNet at 256 px, without a cascade.

    python -m cascaded_diffusion.import_weights --source=guided_diffusion --model=imagenet256 \
        256x256_diffusion.pt --workdir=RUN/adm_base256

0.55 billion parameters; trained weights are published. Hardware and hours to train: not measured.
Expected FID: 10.94 to the training images, without guidance by a classifier (ADM, 50,000 samples);
here not measured.
The variant `uncond` has no classes (256x256_diffusion_uncond.pt). All that is not said here is as
in adm_base128.
"""

from ml_collections import ConfigDict
from sections import check_variant, config_of, imagenet, in_variant


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, "smoke", "uncond")
    config = config_of("adm_base128")
    config.stage.update(name="adm_base256", resolution=256)
    config.stage.network.update(
        channel_mults=(1, 1, 2, 2, 4, 4),  # ADM
        num_res_blocks=(2, 2, 2, 2, 2, 2),  # ADM
        num_heads=None,
        num_head_channels=64,  # ADM
    )
    config.data = imagenet(256) | dict(resize="adm")  # ADM
    config.train.update(train_steps=1_980_000)  # ADM
    config.eval.batch_size = 256
    if variant == "uncond":
        config.stage.num_classes = 0
        return config
    return in_variant(config, variant, attention_resolutions=(32,), num_head_channels=8)

"""Class-conditional base model, ImageNet at 16 px: the first stage of the small ablation.

    python -m cascaded_diffusion.main --config=configs/base16.py --workdir=RUN/base16

Hardware and hours: not measured; 0.13 billion parameters, 2.6e19 FLOP to train.
Expected FID: not published, not measured.
The paper asks with 16 -> 64 px whether a cascade without augmentation is worth having, and
publishes none of this model's settings. Ours are those of base64 with one level less, so
that only the cascade differs.
"""

from ml_collections import ConfigDict
from sections import config_of, imagenet, in_variant


def get_config(variant: str | None = None) -> ConfigDict:
    config = config_of("base64")
    config.stage.update(name="base16", resolution=16)
    config.stage.network.update(
        channel_mults=(1, 2, 3),  # a level less
        num_res_blocks=(3, 3, 3),
        attention_resolutions=(8, 4),  # not published; ours
    )
    config.stage.schedule.num_timesteps = 4000  # as base32
    config.stage.sampler.num_steps = 4000  # as base32
    config.data = imagenet(16)
    config.train.train_steps = 400_000  # not published; ours
    return in_variant(config, variant, attention_resolutions=(2,))

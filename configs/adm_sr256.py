"""ADM's upsampler 64 -> 256 px on ImageNet, the second stage of its 256 px cascade.

    python -m cascaded_diffusion.import_weights --source=guided_diffusion --model=upsample256 \
        64_256_upsampler.pt --workdir=RUN/adm_sr256

0.31 billion parameters; trained weights are published. Hardware and hours to train: not measured.
Expected FID of enlarged samples of adm_base64: 7.49 to the training images, without guidance by a
classifier (ADM, 50,000 samples); here not measured.
It was trained without conditioning augmentation. The variants `gaussian` and `blur` have it, to be
trained further with it: `gaussian` has one input more, whose weights begin at zero. All that is not
said here is as in adm_base64.
"""

from ml_collections import ConfigDict
from sections import check_variant, config_of, imagenet, in_variant


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, "smoke", "gaussian", "blur")
    config = config_of("adm_base64")
    base_schedule = config.stage.schedule
    config.stage.update(
        name="adm_sr256", kind="super_resolution", resolution=256, low_res_resolution=64
    )
    config.stage.network.update(
        channel_mults=(1, 1, 2, 2, 4, 4),  # ADM
        num_res_blocks=(2, 2, 2, 2, 2, 2),  # ADM
        num_heads=4,  # ADM
        num_head_channels=None,
        dropout_rate=0.0,  # ADM
        upsample="bilinear",  # ADM
    )
    config.stage.schedule = dict(
        name="linear",  # ADM
        num_timesteps=1000,  # ADM
        noise_levels="discrete",  # ADM
        linear_betas=(1e-4, 0.02),  # ADM
    )
    config.data = imagenet(256) | dict(resize="adm")  # ADM
    config.train.update(batch_size=256, train_steps=500_000, learning_rate=1e-4)  # ADM
    config.eval.batch_size = 256
    if variant == "gaussian":
        config.stage.augment = dict(name="gaussian", max_level=0.5)  # the paper's way; level ours
        config.stage.low_res_schedule = base_schedule  # that of adm_base64, for truncation
    if variant == "blur":
        config.stage.augment = dict(
            name="blur",  # paper, section 3.1
            blur_kernel_size=3,  # paper
            blur_sigmas=(0.4, 0.6),  # paper, Table 7
            blur_prob=0.5,  # paper, section 3.1
        )
    if variant != "smoke":
        return config
    return in_variant(config, variant, attention_resolutions=(32,))

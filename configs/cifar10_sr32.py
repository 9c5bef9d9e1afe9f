"""Super-resolution 16 -> 32 px on CIFAR-10: the second stage of the colour cascade.

    python -m cascaded_diffusion.main --config=configs/cifar10_sr32.py --workdir=RUN/sr32

The data is TFDS's `cifar10`, got by `prepare`; or the same photos as a folder per class, with
--config.data.name=folder --config.data.path=PATH. Hardware, hours and expected FID: not measured.
Ours, not the paper's: the sizes, v-prediction, continuous time. As in the paper: class and
upsampled low-res image as conditioning, Gaussian conditioning augmentation, amortized.
"""

from ml_collections import ConfigDict
from sections import check_variant, cifar10, classifier_eval, data_mesh, ddim, save_every

#              channels  train_steps  batch_size  num_samples
_VARIANTS = {
    None: (128, 100_000, 128, 10_000),
    "cpu": (32, 300, 32, 1000),  # minutes on two cores, to see it work on photos
    "smoke": (16, 30, 16, 40),  # on drawn shapes
}
# The schedule of this stage and of base16, whose images are its input.
_COSINE = dict(name="cosine", num_timesteps=None, noise_levels="continuous", cosine_offset=0.008)


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, *_VARIANTS)
    channels, train_steps, batch_size, num_samples = _VARIANTS[variant]
    config = ConfigDict()
    config.stage = dict(
        name="sr32",
        kind="super_resolution",
        resolution=32,
        channels=3,
        num_classes=10,
        low_res_resolution=16,
        network=dict(
            name="unet",
            channels=channels,
            channel_mults=(1, 2, 2),
            num_res_blocks=(1, 2, 2),
            attention_resolutions=(8,),
            num_heads=4,
            dropout_rate=0.1,
            patch_size=1,
            resample="conv",
            scale_shift=True,
            scale_skips=False,
            noise_input="cosine_time",
            upsample="bilinear",
            dtype="float32",
        ),
        schedule=_COSINE,
        diffusion=dict(
            parameterization="v",
            variance="fixed",
            loss="simple",
            weighting="none",
            label_dropout_prob=0.1,
        ),
        augment=dict(name="gaussian", max_level=1.0),
        low_res_schedule=_COSINE,
        sampler=ddim(25, guidance_scale=1.0),
    )
    config.data = cifar10()
    config.train = dict(
        seed=0,
        batch_size=batch_size,
        train_steps=train_steps,
        learning_rate=3e-4,
        lr_decay="none",
        warmup_steps=train_steps // 10,
        adam_b2=0.999,
        grad_clip_norm=1.0,
        ema_decays=(0.999,),
        log_every_steps=max(5, train_steps // 1000),
        sample_every_steps=max(15, train_steps // 20),
    )
    config.eval = classifier_eval(num_samples, ema_decay=0.999, patience_evals=10, aug_level=0.1)
    config.mesh = data_mesh()
    config.checkpoint = save_every(max(15, train_steps // 20))
    if variant == "smoke":
        config.data.update(name="shapes", prepared_dir=None, resolution=64)
    return config

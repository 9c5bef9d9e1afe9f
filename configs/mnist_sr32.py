"""Super-resolution 16 -> 32 px on MNIST digits: the second stage of the demo cascade.

    python -m cascaded_diffusion.main --config=configs/mnist_sr32.py --workdir=RUN/sr32

Two CPU cores: 3 minutes. Expected fd_classifier of 1,000 enlarged images, measured: 2.3 of real
ones, 5.2 of samples of base16. Ours, not the paper's: the sizes, x0-prediction, continuous time,
the short schedule. As in the paper: conditioning on class and upsampled low-res image, Gaussian
conditioning augmentation amortized over a uniformly random level.
"""

from ml_collections import ConfigDict
from sections import check_variant, classifier_eval, data_mesh, ddim, mnist, save_every

#              channels  train_steps  batch_size  num_samples
_VARIANTS = {
    None: (64, 700, 64, 1000),
    "no_augment": (64, 700, 64, 1000),  # the paper's ablation
    "smoke": (16, 30, 16, 40),
}

_COSINE = dict(name="cosine", num_timesteps=None, noise_levels="continuous", cosine_offset=0.008)


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, *_VARIANTS)
    channels, train_steps, batch_size, num_samples = _VARIANTS[variant]
    config = ConfigDict()
    config.stage = dict(
        name="sr32",
        kind="super_resolution",
        resolution=32,
        channels=1,
        num_classes=10,
        low_res_resolution=16,
        network=dict(
            name="unet",
            channels=channels,
            channel_mults=(1, 2),
            num_res_blocks=(1, 1),
            attention_resolutions=(),
            num_heads=4,
            dropout_rate=0.0,
            patch_size=4,  # feature maps of 8 and 4 px: what two cores can afford
            resample="conv",
            scale_shift=True,
            scale_skips=False,
            noise_input="cosine_time",
            upsample="bilinear",
            dtype="float32",
        ),
        schedule=_COSINE,  # and that of base16, whose images are the input
        diffusion=dict(
            parameterization="x0",  # for v, the network would carry 16 noise values per patch
            variance="fixed",
            loss="simple",
            weighting="none",
            label_dropout_prob=0.1,
        ),
        augment=dict(name="gaussian", max_level=1.0),
        low_res_schedule=_COSINE,
        sampler=ddim(8, guidance_scale=1.0),
    )
    config.data = mnist()
    config.train = dict(
        seed=0,
        batch_size=batch_size,
        train_steps=train_steps,
        learning_rate=2e-3,
        lr_decay="cosine",
        warmup_steps=train_steps // 10,
        adam_b2=0.99,
        grad_clip_norm=1.0,
        ema_decays=(0.995,),
        log_every_steps=max(1, train_steps // 40),
        sample_every_steps=train_steps // 2,
    )
    config.eval = classifier_eval(num_samples, ema_decay=0.995, patience_evals=5, aug_level=0.1)
    config.mesh = data_mesh()
    config.checkpoint = save_every(train_steps // 2)
    if variant == "no_augment":
        config.stage.augment = dict(name="none", max_level=None)
        config.stage.low_res_schedule = None
        config.eval.aug_level = 0.0
    return config

"""Class-conditional base model, MNIST digits at 8 px: the first of the three-stage cascade.

    python -m cascaded_diffusion.main --config=configs/mnist_base8.py --workdir=RUN/base8

Two CPU cores: time not measured. Expected fd_classifier of 1,000 samples: 3.3 (measured).
Ours, not the paper's: the sizes, x0-prediction, continuous time, guidance, the
short schedule. As in the paper: a U-Net conditioned on class and noise level, the
cosine schedule, Adam, EMA, checkpoints chosen by Fréchet distance.
"""

from ml_collections import ConfigDict
from sections import check_variant, classifier_eval, data_mesh, ddim, mnist, save_every

#              channels  train_steps  batch_size  num_samples
_VARIANTS = {
    None: (64, 600, 64, 1000),
    "smoke": (16, 30, 16, 40),
}


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, *_VARIANTS)
    channels, train_steps, batch_size, num_samples = _VARIANTS[variant]
    config = ConfigDict()
    config.stage = dict(
        name="base8",
        kind="base",
        resolution=8,
        channels=1,
        num_classes=10,
        network=dict(
            name="unet",
            channels=channels,
            channel_mults=(1, 2),
            num_res_blocks=(1, 1),
            attention_resolutions=(),  # the middle block attends in any case
            num_heads=4,
            dropout_rate=0.0,
            patch_size=1,  # feature maps of 8 and 4 px, as in mnist_base16
            resample="conv",
            scale_shift=True,
            scale_skips=False,
            noise_input="cosine_time",
            upsample="bilinear",
            dtype="float32",
        ),
        schedule=dict(
            name="cosine", num_timesteps=None, noise_levels="continuous", cosine_offset=0.008
        ),
        diffusion=dict(
            # For so short a training better than "v": a small network need not carry
            # the noise through to its output.
            parameterization="x0",
            variance="fixed",
            loss="simple",
            weighting="none",
            label_dropout_prob=0.15,
        ),
        augment=dict(name="none"),
        sampler=ddim(10, guidance_scale=1.5),
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
    config.eval = classifier_eval(num_samples, ema_decay=0.995, patience_evals=5)
    config.mesh = data_mesh()
    config.checkpoint = save_every(train_steps // 2)
    return config

"""Super-resolution 8 -> 16 px on MNIST digits: the second of the three-stage cascade.

    python -m cascaded_diffusion.main --config=configs/mnist_sr16.py --workdir=RUN/sr16

Two CPU cores: time not measured. Expected fd_classifier of 1,000 enlarged samples of base8:
4.2 (measured).
Ours, not the paper's: the sizes, x0-prediction, continuous time, the short
schedule. As in the paper: class and upsampled low-res image as conditioning,
Gaussian conditioning augmentation amortized over a uniformly random level.
"""

from ml_collections import ConfigDict

from cascaded_diffusion.errors import UserError

#              channels  train_steps  batch_size  num_samples
_VARIANTS = {
    None: (64, 600, 64, 1000),
    "smoke": (16, 30, 16, 40),
}

# Of this stage and of base8, whose images are its input.
_COSINE = dict(name="cosine", num_timesteps=None, noise_levels="continuous", cosine_offset=0.008)


def get_config(variant: str | None = None) -> ConfigDict:
    if variant not in _VARIANTS:
        raise UserError(f"--config=...:{variant}: expected no variant, or ':smoke'")
    channels, train_steps, batch_size, num_samples = _VARIANTS[variant]
    config = ConfigDict()
    config.stage = dict(
        name="sr16",
        kind="super_resolution",
        resolution=16,
        channels=1,
        num_classes=10,
        low_res_resolution=8,
        network=dict(
            name="unet",
            channels=channels,
            channel_mults=(1, 2),
            num_res_blocks=(1, 1),
            attention_resolutions=(),
            num_heads=4,
            dropout_rate=0.0,
            patch_size=2,  # feature maps of 8 and 4 px: what two cores can afford
            resample="conv",
            scale_shift=True,
            scale_skips=False,
            noise_input="cosine_time",
            upsample="bilinear",
            dtype="float32",
        ),
        schedule=_COSINE,
        diffusion=dict(
            # With 2 x 2 patches, predicting v would make the network carry 4
            # noise values per position through to its output.
            parameterization="x0",
            variance="fixed",
            loss="simple",
            weighting="none",
            label_dropout_prob=0.1,
        ),
        augment=dict(name="gaussian", max_level=1.0),
        low_res_schedule=_COSINE,
        sampler=dict(
            name="ddim",
            num_steps=8,
            grid="uniform",
            eta=0.0,
            guidance_scale=1.0,
            guidance_interval=(0.0, 1.0),
            threshold="static",
        ),
    )
    config.data = dict(
        name="mnist",
        train_split="train",
        eval_split="test",
        resolution=32,
        crop="none",
        resize="area",
        low_res="derived",
        random_flip=False,
        shuffle_seed=0,
        on_corrupt="fail",
        read_threads=2,
    )
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
    config.eval = dict(
        features="classifier",
        num_samples=num_samples,
        final_num_samples=num_samples,
        batch_size=min(200, num_samples),
        seed=0,
        aug_level=0.2,
        ema_decays=(0.995,),
        patience_evals=5,
    )
    config.mesh = dict(data=-1, fsdp=1)
    config.checkpoint = dict(save_every_steps=train_steps // 2, max_to_keep=3)
    return config

"""Class-conditional base model, MNIST digits at 16 px: the first stage of the demo cascade.

    python -m cascaded_diffusion.main --config=configs/mnist_base16.py --workdir=RUN/base16

Two CPU cores: 2 to 4 minutes. Expected fd_classifier of 1,000 samples: 3.6 (measured).
Ours, not the paper's: the sizes, x0-prediction, continuous time, guidance, the
short schedule. As in the paper: a U-Net conditioned on class and noise level, the
cosine schedule, Adam, EMA, checkpoints chosen by Fréchet distance.
"""

from ml_collections import ConfigDict
from sections import check_variant, classifier_eval, data_mesh, dpmpp_2m, mnist, train_for

#              channels  train_steps  batch_size  num_samples
_VARIANTS = {
    None: (64, 1000, 64, 1000),
    "smoke": (16, 30, 16, 40),
}


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, *_VARIANTS)
    channels, train_steps, batch_size, num_samples = _VARIANTS[variant]
    config = ConfigDict()
    config.stage = dict(
        name="base16",
        kind="base",
        resolution=16,
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
            patch_size=2,  # feature maps of 8 and 4 px: what two cores can afford
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
            # Recognised more often than "v", at the same distance (docs/results.md): a small
            # network need not carry the noise through to its output.
            parameterization="x0",
            variance="fixed",
            loss="simple",
            weighting="none",
            label_dropout_prob=0.15,
        ),
        augment=dict(name="none"),
        sampler=dpmpp_2m(10, guidance_scale=1.5),
    )
    config.data = mnist()
    config.train = dict(
        seed=0,
        batch_size=batch_size,
        learning_rate=2e-3,
        lr_decay="cosine",
        adam_b2=0.99,
        grad_clip_norm=1.0,
        ema_decays=(0.995,),
    )
    train_for(config, train_steps)
    config.eval = classifier_eval(num_samples, ema_decay=0.995, patience_evals=5)
    config.mesh = data_mesh()
    return config

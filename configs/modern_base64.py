"""Class-conditional base model, ImageNet at 64 px, ours: what a cascade is made of today.

    python -m cascaded_diffusion.main --config=configs/modern_base64.py --workdir=RUN/modern_base64

Hardware, hours and expected FID: not measured; 0.30 billion parameters, 3.4e20 FLOP to train.
Not the paper's model, but its idea with what was found since: v-prediction in continuous
time, a loss weighted by min-SNR (Hang et al. 2023, who tried it on ImageNet at 64 px),
guidance where it helps (Kynkäänniemi et al. 2024), 32 steps of DPM-Solver++ in place of
4000. The network is that of progressive distillation (Salimans & Ho 2022) at this size.
Values without an origin are ours.
"""

from ml_collections import ConfigDict
from sections import dpmpp_2m, fid_eval, fitting_mesh, imagenet, in_variant, save_every


def get_config(variant: str | None = None) -> ConfigDict:
    config = ConfigDict()
    config.stage = dict(
        name="modern_base64",
        kind="base",
        resolution=64,
        channels=3,
        num_classes=1000,
        network=dict(
            name="unet",
            channels=192,  # progressive distillation
            channel_mults=(1, 2, 3, 4),  # progressive distillation
            num_res_blocks=(3, 3, 3, 3),  # progressive distillation
            attention_resolutions=(32, 16, 8),  # progressive distillation
            num_heads=6,  # 64 channels each at 32 px, 96 and 128 below
            dropout_rate=0.1,  # progressive distillation
            patch_size=1,
            resample="biggan",  # Imagen
            scale_shift=True,
            scale_skips=False,
            noise_input="cosine_time",  # progressive distillation
            upsample="bilinear",  # not used: there is no low-res input
            dtype="bfloat16",
        ),
        schedule=dict(
            name="shifted_cosine",  # simple diffusion
            noise_levels="continuous",
            reference_resolution=64,  # this size: not shifted
        ),
        diffusion=dict(
            parameterization="v",  # progressive distillation
            variance="fixed",
            loss="simple",
            weighting="min_snr",
            label_dropout_prob=0.1,
        ),
        augment=dict(name="none"),
        sampler=dpmpp_2m(32, 1.5, (0.2, 0.8)),  # noise of 0.3 to 3 times the image, as theirs
    )
    config.data = imagenet(64)
    config.train = dict(
        seed=0,
        batch_size=1024,
        train_steps=500_000,
        learning_rate=1e-4,
        lr_decay="none",
        warmup_steps=10_000,  # Imagen
        adam_b2=0.99,
        grad_clip_norm=1.0,
        ema_decays=(0.9999,),
        log_every_steps=100,
        sample_every_steps=10_000,
    )
    config.eval = fid_eval(batch_size=1024)
    config.mesh = fitting_mesh()
    config.checkpoint = save_every(10_000)
    return in_variant(config, variant, channels=12, attention_resolutions=(8,))

"""Class-conditional base model, ImageNet at 64 px, ours: what a cascade is made of today.

    python -m cascaded_diffusion.main --config=configs/modern_base64.py --workdir=RUN/modern_base64

Hardware and hours: not measured; 0.30 billion parameters, 3.4e20 FLOP to train.
Expected FID: not measured.
Not the paper's model, but its idea with what was found since: v-prediction in continuous
time, a loss weighted by min-SNR (Hang et al. 2023, who tried it on ImageNet at 64 px),
guidance where it helps (Kynkäänniemi et al. 2024), 32 steps of DPM-Solver++ in place of
4000. The network is that of progressive distillation (Salimans & Ho 2022) at this size.
Lines without an origin are ours.
"""

from ml_collections import ConfigDict

from cascaded_diffusion.errors import UserError


def get_config(variant: str | None = None) -> ConfigDict:
    if variant not in (None, "smoke"):
        raise UserError(f"--config=...:{variant}: expected no variant, or ':smoke'")
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
        sampler=dict(
            name="dpmpp_2m",
            num_steps=32,
            grid="uniform",
            guidance_scale=1.5,
            guidance_interval=(0.2, 0.8),  # noise of 0.3 to 3 times the image, as theirs
            threshold="static",  # Imagen
        ),
    )
    config.data = dict(
        name="imagenet2012",
        prepared_dir="prepared",
        train_split="train",
        eval_split="validation",
        resolution=64,
        crop="center",  # as BigGAN (paper)
        resize="area",  # the authors' code of other works
        low_res="derived",
        random_flip=True,
        shuffle_seed=0,
        on_corrupt="fail",
        read_threads=16,
    )
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
    config.eval = dict(
        features="inception",
        resize="legacy",  # as the original FID, and ADM's evaluator
        num_samples=10_000,
        final_num_samples=50_000,
        batch_size=1024,
        seed=0,
        aug_level=0.0,
        ema_decays=(0.9999,),
        patience_evals=10,
    )
    config.mesh = dict(data=-1, fsdp=None)  # None: as few as it fits on
    config.checkpoint = dict(save_every_steps=10_000, max_to_keep=3)
    if variant == "smoke":  # less of everything, and drawn pictures at a quarter of the size
        config.stage.update(resolution=16, num_classes=10)
        config.stage.network.update(channels=12, channel_mults=(1, 2), num_res_blocks=(1, 1))
        config.stage.network.update(attention_resolutions=(8,), dtype="float32")
        config.stage.update(schedule=dict(reference_resolution=16), sampler=dict(num_steps=8))
        config.data.update(name="shapes", prepared_dir=None, eval_split="test", resolution=64)
        config.train.update(batch_size=16, train_steps=20, warmup_steps=2, log_every_steps=5)
        config.eval.update(features="classifier", resize=None, num_samples=20, batch_size=16)
        config.eval.update(final_num_samples=20)
        config.checkpoint.update(save_every_steps=10)
    return config

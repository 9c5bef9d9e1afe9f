"""Class-conditional base model, ImageNet at 16 px: the first stage of the small ablation.

    python -m cascaded_diffusion.main --config=configs/base16.py --workdir=RUN/base16

Hardware and hours: not measured; 0.13 billion parameters, 2.6e19 FLOP to train.
Expected FID: not published, not measured.
The paper asks with 16 -> 64 px whether a cascade without augmentation is worth having, and
publishes none of this model's settings. Ours are those of base64 with one level less, so
that only the cascade differs.
Lines end with where their value is from.
"""

from ml_collections import ConfigDict

from cascaded_diffusion.errors import UserError


def get_config(variant: str | None = None) -> ConfigDict:
    if variant not in (None, "smoke"):
        raise UserError(f"--config=...:{variant}: expected no variant, or ':smoke'")
    config = ConfigDict()
    config.stage = dict(
        name="base16",
        kind="base",
        resolution=16,
        channels=3,
        num_classes=1000,
        network=dict(
            name="unet",
            channels=192,  # as base64
            channel_mults=(1, 2, 3),  # as base64, a level less
            num_res_blocks=(3, 3, 3),  # as base64
            attention_resolutions=(8, 4),  # not published; ours
            num_heads=4,  # as base64
            dropout_rate=0.1,  # as base64
            patch_size=1,
            resample="conv",  # iDDPM
            scale_shift=True,  # iDDPM
            scale_skips=False,  # iDDPM
            noise_input="cosine_time",  # the time step (paper), but for the offset
            upsample="bilinear",  # not used: there is no low-res input
            dtype="bfloat16",  # ours
        ),
        schedule=dict(
            name="cosine",  # iDDPM
            num_timesteps=4000,  # as base32
            noise_levels="discrete",  # iDDPM
            cosine_offset=0.008,  # iDDPM
        ),
        diffusion=dict(
            parameterization="eps",  # iDDPM
            variance="learned",  # iDDPM
            loss="hybrid",  # iDDPM
            vlb_weight=0.001,  # iDDPM
            weighting="none",
            label_dropout_prob=0.0,  # paper: no guidance
        ),
        augment=dict(name="none"),
        sampler=dict(
            name="ancestral",  # iDDPM
            num_steps=4000,  # as base32
            grid="uniform",
            variance="learned",  # iDDPM
            guidance_scale=1.0,  # paper: no guidance
            guidance_interval=(0.0, 1.0),
            threshold="static",  # DDPM
        ),
    )
    config.data = dict(
        name="imagenet2012",
        prepared_dir="prepared",
        train_split="train",
        eval_split="validation",
        resolution=16,
        crop="center",  # as BigGAN (paper)
        resize="area",  # the authors' code of other works
        low_res="derived",
        random_flip=True,  # not published; ours
        shuffle_seed=0,
        on_corrupt="fail",
        read_threads=16,
    )
    config.train = dict(
        seed=0,
        batch_size=2048,  # iDDPM
        train_steps=400_000,  # not published; ours
        learning_rate=3e-4,  # iDDPM
        lr_decay="none",  # not published; ours
        warmup_steps=10_000,  # SR3; the paper's is not published
        adam_b2=0.999,  # not published; ours
        grad_clip_norm=1.0,  # not published; ours
        ema_decays=(0.9999,),  # iDDPM
        log_every_steps=100,
        sample_every_steps=10_000,
    )
    config.eval = dict(
        features="inception",
        resize="legacy",  # as the original FID, and ADM's evaluator
        num_samples=10_000,  # paper
        final_num_samples=50_000,  # paper
        sampler="ddim",  # to compare checkpoints: not published; ours
        num_steps=50,
        batch_size=1024,
        seed=0,
        aug_level=0.0,
        ema_decays=(0.9999,),
        patience_evals=10,
    )
    config.mesh = dict(data=-1, fsdp=None)  # None: as few as it fits on
    config.checkpoint = dict(save_every_steps=10_000, max_to_keep=3)
    if variant == "smoke":  # less of everything, and drawn pictures at a quarter of the size
        config.stage.update(resolution=4, num_classes=10)
        config.stage.network.update(channels=16, channel_mults=(1, 2), num_res_blocks=(1, 1))
        config.stage.network.update(attention_resolutions=(2,), dtype="float32")
        config.stage.update(schedule=dict(num_timesteps=40), sampler=dict(num_steps=8))
        config.data.update(name="shapes", prepared_dir=None, eval_split="test", resolution=64)
        config.train.update(batch_size=16, train_steps=20, warmup_steps=2, log_every_steps=5)
        config.eval.update(features="classifier", resize=None, num_samples=20, batch_size=16)
        config.eval.update(final_num_samples=20, num_steps=8)
        config.checkpoint.update(save_every_steps=10)
    return config

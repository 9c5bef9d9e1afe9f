"""Super-resolution 64 -> 128 px on LSUN bedrooms, without classes.

    python -m cascaded_diffusion.main --config=configs/lsun_sr128.py --workdir=RUN/lsun_sr128

Hardware and hours: not measured; 0.56 billion parameters, 4.2e20 FLOP to train.
Expected FID: the paper has a number, which we did not recover; not measured.
As in the paper: Gaussian augmentation, not truncated. It publishes no settings of its LSUN
models: they are ours, after sr128.
Comments name the origin of each value.
"""

from ml_collections import ConfigDict
from sections import check_variant, fid_eval, fitting_mesh, lsun_bedrooms, save_every, shrink

# The schedule of lsun_base64, whose images are its input.
_COSINE = dict(name="cosine", num_timesteps=4000, noise_levels="discrete", cosine_offset=0.008)


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, "smoke")
    config = ConfigDict()
    config.stage = dict(
        name="lsun_sr128",
        kind="super_resolution",
        resolution=128,
        channels=3,
        num_classes=0,
        low_res_resolution=64,
        network=dict(
            name="unet",
            channels=128,  # as sr128
            channel_mults=(1, 2, 4, 8, 8),  # as sr128
            num_res_blocks=(3, 3, 3, 3, 3),  # as sr128
            attention_resolutions=(16,),  # as sr128
            num_heads=1,  # as sr128
            dropout_rate=0.0,  # as sr128
            patch_size=1,
            resample="biggan",  # SR3
            scale_shift=False,  # SR3: DDPM's bias; the paper's way is not published
            scale_skips=True,  # SR3, as we read it
            noise_input="noise_level",  # as sr128
            upsample="bicubic",  # SR3
            dtype="bfloat16",  # ours
        ),
        schedule=dict(
            name="linear",  # not published; ours
            num_timesteps=2000,  # as sr128
            noise_levels="continuous",  # as sr128
            linear_betas=(1e-4, 0.02),  # DDPM; the paper's are not published
        ),
        diffusion=dict(
            parameterization="eps",  # SR3
            variance="fixed",  # as sr128
            loss="simple",  # SR3
            weighting="none",
            label_dropout_prob=0.0,
        ),
        augment=dict(name="gaussian", max_level=1.0),  # paper; the range is ours
        low_res_schedule=_COSINE,
        sampler=dict(
            name="ancestral",  # SR3
            num_steps=100,  # as sr128
            grid="uniform",  # not published; ours
            variance="large",  # SR3
            guidance_scale=1.0,
            guidance_interval=(0.0, 1.0),
            threshold="static",  # DDPM
        ),
    )
    config.data = lsun_bedrooms(128)
    config.train = dict(
        seed=0,
        batch_size=512,  # not published; ours
        train_steps=500_000,  # as sr128
        learning_rate=1e-4,  # as sr128
        lr_decay="none",  # not published; ours
        warmup_steps=10_000,  # SR3; the paper's is not published
        adam_b2=0.999,  # not published; ours
        grad_clip_norm=1.0,  # not published; ours
        ema_decays=(0.9999,),  # as sr128
        log_every_steps=100,
        sample_every_steps=10_000,
    )
    config.eval = fid_eval(batch_size=512, ddim_steps=25, aug_level=500 / 4000)  # level: ours
    config.mesh = fitting_mesh()
    config.checkpoint = save_every(10_000)
    if variant == "smoke":
        shrink(config)
    return config

"""Super-resolution 16 -> 64 px on ImageNet: the second stage of the small ablation.

    python -m cascaded_diffusion.main --config=configs/sr64_from16.py --workdir=RUN/sr64_from16

Hardware and hours: not measured; 0.27 billion parameters, 4.4e20 FLOP to train.
Expected FID of enlarged samples of base16: 2.13 to the training images (paper, 50,000
samples, not truncated, noise of step 1001 of 4000); here not measured.
The paper publishes none of this model's settings but the augmentation. Ours are those of
base64, so that only the cascade differs.
Comments name the origin of each value.
"""

from ml_collections import ConfigDict
from sections import check_variant, fid_eval, fitting_mesh, imagenet, save_every, shrink

# The schedule of this stage and of base16, whose images are its input. iDDPM.
_COSINE = dict(name="cosine", num_timesteps=4000, noise_levels="discrete", cosine_offset=0.008)


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, "smoke")
    config = ConfigDict()
    config.stage = dict(
        name="sr64_from16",
        kind="super_resolution",
        resolution=64,
        channels=3,
        num_classes=1000,
        low_res_resolution=16,
        network=dict(
            name="unet",
            channels=192,  # as base64
            channel_mults=(1, 2, 3, 4),  # as base64
            num_res_blocks=(3, 3, 3, 3),  # as base64
            attention_resolutions=(16, 8),  # as base64
            num_heads=4,  # as base64
            dropout_rate=0.1,  # as base64
            patch_size=1,
            resample="conv",  # iDDPM
            scale_shift=True,  # iDDPM
            scale_skips=False,  # iDDPM
            noise_input="cosine_time",  # the time step (paper), but for the offset
            upsample="bilinear",  # paper: bilinear or bicubic
            dtype="bfloat16",  # ours
        ),
        schedule=_COSINE,
        diffusion=dict(
            parameterization="eps",  # iDDPM
            variance="learned",  # iDDPM
            loss="hybrid",  # iDDPM
            vlb_weight=0.001,  # iDDPM
            weighting="none",
            label_dropout_prob=0.0,  # paper: no guidance
        ),
        augment=dict(name="gaussian", max_level=1.0),  # paper, section 3; the range is ours
        low_res_schedule=_COSINE,
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
    config.data = imagenet(64)
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
    config.eval = fid_eval(batch_size=1024, ddim_steps=50, aug_level=1001 / 4000)  # paper, Table 4
    config.mesh = fitting_mesh()
    config.checkpoint = save_every(10_000)
    if variant == "smoke":
        shrink(config)
    return config

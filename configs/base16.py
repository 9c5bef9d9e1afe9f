"""Class-conditional base model, ImageNet at 16 px: the first stage of the small ablation.

    python -m cascaded_diffusion.main --config=configs/base16.py --workdir=RUN/base16

Hardware and hours: not measured; 0.13 billion parameters, 2.6e19 FLOP to train.
Expected FID: not published, not measured.
The paper asks with 16 -> 64 px whether a cascade without augmentation is worth having, and
publishes none of this model's settings. Ours are those of base64 with one level less, so
that only the cascade differs.
Comments name the origin of each value.
"""

from ml_collections import ConfigDict
from sections import check_variant, fid_eval, fitting_mesh, imagenet, save_every, shrink


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, "smoke")
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
    config.data = imagenet(16)
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
    config.eval = fid_eval(batch_size=1024, ddim_steps=50)
    config.mesh = fitting_mesh()
    config.checkpoint = save_every(10_000)
    if variant == "smoke":
        shrink(config, attention_resolutions=(2,))
    return config

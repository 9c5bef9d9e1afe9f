"""Class-conditional model, ImageNet at 64 px without a cascade: the paper's baseline.

    python -m cascaded_diffusion.main --config=configs/base64.py --workdir=RUN/base64

0.27 billion parameters, 5.5e20 FLOP to train. One H100 computes 343 TFLOP/s of them at batch 64
(measured), which is 19 days.
Expected FID: 2.35 to the training images (paper, 50,000 samples); here not measured.
The paper describes it as Improved DDPM with dropout, trained for longer, with 2000 time
steps. Whether it trains with these or only samples with them is not clear to us; here it
does both. All else is the 64 px model of Improved DDPM.
"""

from ml_collections import ConfigDict
from sections import ancestral, fid_eval, fitting_mesh, imagenet, in_variant, save_every


def get_config(variant: str | None = None) -> ConfigDict:
    config = ConfigDict()
    config.stage = dict(
        name="base64",
        kind="base",
        resolution=64,
        channels=3,
        num_classes=1000,
        network=dict(
            name="unet",
            channels=192,  # iDDPM
            channel_mults=(1, 2, 3, 4),  # iDDPM
            num_res_blocks=(3, 3, 3, 3),  # iDDPM
            attention_resolutions=(16, 8),  # iDDPM
            num_heads=4,  # iDDPM
            dropout_rate=0.1,  # 0.1 not published; dropout is the paper's
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
            num_timesteps=2000,  # paper, Table 3
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
        sampler=ancestral(2000, "learned"),  # paper, Table 3; iDDPM
    )
    config.data = imagenet(64)
    config.train = dict(
        seed=0,
        batch_size=2048,  # iDDPM
        train_steps=500_000,  # not published; ours
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
    return in_variant(config, variant)

"""Super-resolution 64 -> 256 px on ImageNet: the last stage of the paper's 256 px cascade.

    python -m cascaded_diffusion.main --config=configs/sr256.py --workdir=RUN/sr256

Hardware and hours: not measured; 0.62 billion parameters, 2.7e21 FLOP to train.
Expected FID of enlarged samples of sr64: 4.88 to the training images, 4.63 to the
validation images (paper, 50,000 samples); here not measured.
The paper searched for the schedule of the 100 sampling steps after training; here it is a
uniform grid.
"""

from ml_collections import ConfigDict
from sections import ancestral, fid_eval, fitting_mesh, imagenet, in_variant, save_every


def get_config(variant: str | None = None) -> ConfigDict:
    config = ConfigDict()
    config.stage = dict(
        name="sr256",
        kind="super_resolution",
        resolution=256,
        channels=3,
        num_classes=1000,
        low_res_resolution=64,
        network=dict(
            name="unet",
            channels=128,  # paper, App. B
            channel_mults=(1, 2, 4, 4, 8, 8),  # paper, App. B
            num_res_blocks=(3, 3, 3, 3, 3, 3),  # paper, App. B
            attention_resolutions=(16,),  # paper, App. B
            num_heads=1,  # paper, App. B
            dropout_rate=0.0,  # paper, App. B
            patch_size=1,
            resample="biggan",  # SR3
            scale_shift=False,  # SR3: DDPM's bias; the paper's way is not published
            scale_skips=True,  # SR3, as we read it
            noise_input="noise_level",  # paper
            upsample="bicubic",  # SR3; paper: bilinear or bicubic
            dtype="bfloat16",  # ours
        ),
        schedule=dict(
            name="linear",  # not published; ours
            num_timesteps=2000,  # paper
            noise_levels="continuous",  # paper
            linear_betas=(1e-4, 0.02),  # DDPM; the paper's are not published
        ),
        diffusion=dict(
            parameterization="eps",  # SR3
            variance="fixed",  # paper
            loss="simple",  # SR3
            weighting="none",
            label_dropout_prob=0.0,  # paper: no guidance
        ),
        augment=dict(
            name="blur",  # paper, section 3.1
            blur_kernel_size=3,  # paper
            blur_sigmas=(0.4, 0.6),  # paper, Table 7
            blur_prob=0.5,  # paper, section 3.1
        ),
        sampler=ancestral(100, "large"),  # paper; SR3
    )
    config.data = imagenet(256)
    config.train = dict(
        seed=0,
        batch_size=1024,  # paper, App. B
        train_steps=500_000,  # paper, App. B
        learning_rate=1e-4,  # paper, App. B
        lr_decay="none",  # not published; ours
        warmup_steps=10_000,  # SR3; the paper's is not published
        adam_b2=0.999,  # not published; ours
        grad_clip_norm=1.0,  # not published; ours
        ema_decays=(0.9999,),  # paper, App. B
        log_every_steps=100,
        sample_every_steps=10_000,
    )
    config.eval = fid_eval(batch_size=512, ddim_steps=25)
    config.mesh = fitting_mesh()
    config.checkpoint = save_every(10_000)
    return in_variant(config, variant, channels=8, channel_mults=(1, 2, 2))

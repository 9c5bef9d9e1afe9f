"""Super-resolution 32 -> 64 px on ImageNet: the second stage of the paper's cascades.

    python -m cascaded_diffusion.main --config=configs/sr64.py --workdir=RUN/sr64

Hardware and hours: not measured; 0.72 billion parameters, 1.1e21 FLOP to train.
Expected FID of enlarged samples of base32: 1.48 to the training images, 2.48 to the
validation images (paper, 50,000 samples, truncated at step 501 of 4000); here not
measured. Checkpoints are compared, and the final one is sampled, as base32's are.
"""

from ml_collections import ConfigDict
from sections import ancestral, fid_eval, fitting_mesh, imagenet, in_variant, save_every

# The schedule of this stage and of base32, whose images it enlarges. 4000: paper; rest: iDDPM.
_COSINE = dict(name="cosine", num_timesteps=4000, noise_levels="discrete", cosine_offset=0.008)


def get_config(variant: str | None = None) -> ConfigDict:
    config = ConfigDict()
    config.stage = dict(
        name="sr64",
        kind="super_resolution",
        resolution=64,
        channels=3,
        num_classes=1000,
        low_res_resolution=32,
        network=dict(
            name="unet",
            channels=256,  # paper, App. B
            channel_mults=(1, 2, 3, 4),  # paper, App. B
            num_res_blocks=(5, 5, 5, 5),  # paper, App. B
            attention_resolutions=(16, 8),  # paper, App. B
            num_heads=4,  # paper, App. B
            dropout_rate=0.1,  # paper, App. B
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
            variance="learned",  # paper
            loss="hybrid",  # paper
            vlb_weight=0.001,  # iDDPM
            weighting="none",
            label_dropout_prob=0.0,  # paper: no guidance
        ),
        augment=dict(name="gaussian", max_level=1.0),  # paper, section 3; the range is ours
        low_res_schedule=_COSINE,
        sampler=ancestral(4000, "learned"),  # paper
    )
    config.data = imagenet(64)
    config.train = dict(
        seed=0,
        batch_size=2048,  # paper, App. B
        train_steps=400_000,  # paper, App. B
        learning_rate=1e-4,  # paper, App. B
        lr_decay="none",  # not published; ours
        warmup_steps=10_000,  # SR3; the paper's is not published
        adam_b2=0.999,  # not published; ours
        grad_clip_norm=1.0,  # not published; ours
        ema_decays=(0.9999,),  # paper, App. B
        log_every_steps=100,
        sample_every_steps=10_000,
    )
    config.eval = fid_eval(batch_size=1024, ddim_steps=50, aug_level=501 / 4000)  # paper, Table 5
    config.mesh = fitting_mesh()
    config.checkpoint = save_every(10_000)
    return in_variant(config, variant)

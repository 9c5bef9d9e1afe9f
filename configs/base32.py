"""Class-conditional base model, ImageNet at 32 px: the first stage of the paper's cascades.

    python -m cascaded_diffusion.main --config=configs/base32.py --workdir=RUN/base32

Hardware and hours: not measured; 0.79 billion parameters, 6.1e20 FLOP to train.
Expected FID: 1.11 to the training images, 1.99 to the validation images (paper, 50,000
samples); here not measured.
Checkpoints are compared by FID-10k in 50 steps of DDIM; `evaluate final` takes the
paper's 4000 steps, or those of --config.stage.sampler.num_steps, which `main` takes for a
finished run too.
"""

from ml_collections import ConfigDict
from sections import ancestral, fid_eval, fitting_mesh, imagenet, in_variant, save_every


def get_config(variant: str | None = None) -> ConfigDict:
    config = ConfigDict()
    config.stage = dict(
        name="base32",
        kind="base",
        resolution=32,
        channels=3,
        num_classes=1000,
        network=dict(
            name="unet",
            channels=256,  # paper, App. B
            channel_mults=(1, 2, 3, 4),  # paper, App. B
            num_res_blocks=(6, 6, 6, 6),  # paper, App. B
            attention_resolutions=(16, 8),  # paper, App. B
            num_heads=4,  # paper, App. B
            dropout_rate=0.1,  # paper, App. B
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
            num_timesteps=4000,  # paper
            noise_levels="discrete",  # paper
            cosine_offset=0.008,  # iDDPM
        ),
        diffusion=dict(
            parameterization="eps",  # paper, algorithm 1
            variance="learned",  # paper
            loss="hybrid",  # paper
            vlb_weight=0.001,  # iDDPM
            weighting="none",
            label_dropout_prob=0.0,  # paper: no guidance
        ),
        augment=dict(name="none"),
        sampler=ancestral(4000, "learned"),  # paper
    )
    config.data = imagenet(32)
    config.train = dict(
        seed=0,
        batch_size=2048,  # paper, App. B
        train_steps=700_000,  # paper, App. B
        learning_rate=1e-4,  # paper, App. B
        lr_decay="none",  # not published; ours
        warmup_steps=10_000,  # SR3; the paper's is not published
        adam_b2=0.999,  # not published; ours
        grad_clip_norm=1.0,  # not published; ours
        ema_decays=(0.9999,),  # paper, App. B
        log_every_steps=100,
        sample_every_steps=10_000,
    )
    config.eval = fid_eval(batch_size=1024, ddim_steps=50)
    config.mesh = fitting_mesh()
    config.checkpoint = save_every(10_000)
    return in_variant(config, variant, attention_resolutions=(4,))

"""ADM's class-conditional model of ImageNet at 64 px, the base of its 256 px cascade.

    python -m cascaded_diffusion.import_weights --source=guided_diffusion --model=imagenet64 \
        64x64_diffusion.pt --workdir=RUN/adm_base64

0.3 billion parameters; trained weights are published. Hardware and hours to train: not measured.
Expected FID: 2.07 to the training images, without guidance by a classifier (ADM, 50,000 samples);
here not measured.
"ADM" is Diffusion Models Beat GANs (Dhariwal & Nichol 2021), its tables or its published flags.
"""

from ml_collections import ConfigDict
from sections import fid_eval, fitting_mesh, imagenet, in_variant, respaced, save_every


def get_config(variant: str | None = None) -> ConfigDict:
    config = ConfigDict()
    config.stage = dict(
        name="adm_base64",
        kind="base",
        resolution=64,
        channels=3,
        num_classes=1000,
        network=dict(
            name="unet",
            channels=192,  # ADM
            channel_mults=(1, 2, 3, 4),  # ADM
            num_res_blocks=(3, 3, 3, 3),  # ADM
            attention_resolutions=(32, 16, 8),  # ADM
            num_head_channels=64,  # ADM
            dropout_rate=0.1,  # ADM
            patch_size=1,
            resample="biggan",  # ADM
            scale_shift=True,  # ADM
            scale_skips=False,  # ADM
            noise_input="step_index",  # ADM
            null_label=False,  # ADM: no guidance without a classifier
            upsample="bilinear",  # not used: there is no low-res input
            dtype="bfloat16",  # ours; ADM float16
        ),
        schedule=dict(
            name="cosine",  # ADM
            num_timesteps=1000,  # ADM
            noise_levels="discrete",  # ADM
            cosine_offset=0.008,  # ADM
        ),
        diffusion=dict(
            parameterization="eps",  # ADM
            variance="learned",  # ADM
            loss="hybrid",  # ADM
            vlb_weight=0.001,  # ADM
            weighting="none",
            label_dropout_prob=0.0,  # ADM
        ),
        augment=dict(name="none"),
        sampler=respaced(250),  # ADM
    )
    config.data = imagenet(64) | dict(resize="adm")  # ADM
    config.train = dict(
        seed=0,
        batch_size=2048,  # ADM
        train_steps=540_000,  # ADM
        learning_rate=3e-4,  # ADM
        lr_decay="none",  # ADM
        warmup_steps=0,  # ADM
        adam_b2=0.999,  # ADM
        grad_clip_norm=1.0,  # ours; ADM has none
        ema_decays=(0.9999,),  # ADM
        log_every_steps=100,
        sample_every_steps=10_000,
    )
    config.eval = fid_eval(batch_size=1024, ddim_steps=25)
    config.mesh = fitting_mesh()
    config.checkpoint = save_every(10_000)
    return in_variant(config, variant, attention_resolutions=(16, 8), num_head_channels=8)

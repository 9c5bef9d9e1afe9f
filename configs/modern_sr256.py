"""Super-resolution 64 -> 256 px on ImageNet, ours: what a cascade is made of today.

    python -m cascaded_diffusion.main --config=configs/modern_sr256.py --workdir=RUN/modern_sr256

Hardware, hours and expected FID: not measured; 0.47 billion parameters, 8.9e20 FLOP to train.
Not the paper's model, but its idea with what was found since: the Efficient U-Net and
Gaussian augmentation of Imagen (the paper found blur to be better with its own network),
v-prediction as in Imagen Video, the shifted schedule of simple diffusion in continuous
time, 32 steps of DPM-Solver++ in place of 100.
Values without an origin are ours.
"""

from ml_collections import ConfigDict
from sections import dpmpp_2m, fid_eval, fitting_mesh, imagenet, in_variant, save_every

# The schedule of this stage and of modern_base64, whose images are its input: simple diffusion.
_SHIFTED = dict(name="shifted_cosine", noise_levels="continuous", reference_resolution=64)


def get_config(variant: str | None = None) -> ConfigDict:
    config = ConfigDict()
    config.stage = dict(
        name="modern_sr256",
        kind="super_resolution",
        resolution=256,
        channels=3,
        num_classes=1000,
        low_res_resolution=64,
        network=dict(
            name="efficient_unet",
            channels=128,  # Imagen
            channel_mults=(1, 2, 4, 8),  # Imagen
            num_res_blocks=(2, 4, 8, 8),  # Imagen
            attention_resolutions=(16,),  # Imagen
            num_heads=8,  # Imagen
            dropout_rate=0.0,  # Imagen
            patch_size=1,
            resample="conv",  # Imagen
            scale_shift=True,
            scale_skips=True,  # Imagen
            noise_input="cosine_time",
            upsample="bilinear",
            dtype="bfloat16",
        ),
        schedule=_SHIFTED,
        diffusion=dict(
            parameterization="v",  # Imagen Video
            variance="fixed",
            loss="simple",
            weighting="none",
            label_dropout_prob=0.1,
        ),
        augment=dict(name="gaussian", max_level=0.5),  # Imagen; ours: levels of use are below 0.4
        low_res_schedule=_SHIFTED,
        sampler=dpmpp_2m(1.0, (0.0, 1.0)),
    )
    config.data = imagenet(256)
    config.train = dict(
        seed=0,
        batch_size=1024,
        train_steps=500_000,
        learning_rate=1e-4,  # Imagen
        lr_decay="none",
        warmup_steps=10_000,  # Imagen
        adam_b2=0.99,
        grad_clip_norm=1.0,
        ema_decays=(0.9999,),  # Imagen
        log_every_steps=100,
        sample_every_steps=10_000,
    )
    config.eval = fid_eval(batch_size=512, aug_level=0.1)  # Imagen's range: 0.1 to 0.3
    config.mesh = fitting_mesh()
    config.checkpoint = save_every(10_000)
    return in_variant(config, variant)

"""The 128 px cascade on LSUN bedrooms: lsun_base64 and lsun_sr128, 50,000 samples.

    python -m cascaded_diffusion.sample --config=configs/lsun_cascade128.py --workdir=RUN

RUN holds the runs of the stages, RUN/lsun_base64 and RUN/lsun_sr128.
Hardware and hours: not measured; 7.7e14 FLOP per sample.
Expected FID: the paper has a number, which we did not recover; not measured.
Gaussian augmentation, not truncated, is the paper's; its level is not published.
"""

from ml_collections import ConfigDict

from cascaded_diffusion.errors import UserError

#        num_samples  batch_size  base_steps  sr_steps
_VARIANTS = {
    None: (50_000, 256, 4000, 100),
    "smoke": (20, 16, 8, 8),
}


def _ancestral(**kwargs: int | str) -> dict:
    return dict(
        name="ancestral",
        grid="uniform",
        guidance_scale=1.0,  # paper: no guidance
        guidance_interval=(0.0, 1.0),
        threshold="static",  # DDPM
        **kwargs,
    )


def get_config(variant: str | None = None) -> ConfigDict:
    if variant not in _VARIANTS:
        raise UserError(f"--config=...:{variant}: expected no variant, or ':smoke'")
    num_samples, batch_size, base_steps, sr_steps = _VARIANTS[variant]
    suffix = f":{variant}" if variant else ""
    config = ConfigDict()
    config.cascade = dict(
        stages=("lsun_base64", "lsun_sr128"),
        configs=(f"lsun_base64.py{suffix}", f"lsun_sr128.py{suffix}"),
        aug_levels=(500 / 4000,),  # not published; ours
        truncated=False,  # paper
        samplers=(
            _ancestral(num_steps=base_steps, variance="learned"),  # as base32
            _ancestral(num_steps=sr_steps, variance="large"),  # as sr128
        ),
        num_samples=num_samples,  # paper: 50,000
        batch_size=batch_size,
        seed=0,
    )
    config.mesh = dict(data=-1, fsdp=1)
    return config

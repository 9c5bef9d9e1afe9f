"""The paper's 128 px cascade on ImageNet: base32, sr64 and sr128, 50,000 samples.

    python -m cascaded_diffusion.sample --config=configs/cascade128.py --workdir=RUN

RUN holds the runs of the stages, RUN/base32, RUN/sr64 and RUN/sr128.
Hardware and hours: not measured; 2.4e15 FLOP per sample.
Expected FID: 3.52 to the training images, 3.76 to the validation images, Inception Score
128.80 (paper); here not measured.
The level between 32 and 64 px is that of cascade64; the paper does not say for this one.
sr128 was trained with blur, and sees clean images when sampling.
"""

from ml_collections import ConfigDict

from cascaded_diffusion.errors import UserError

#        num_samples  batch_size  low_res_steps  high_res_steps
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
    num_samples, batch_size, low_res_steps, high_res_steps = _VARIANTS[variant]
    suffix = f":{variant}" if variant else ""
    config = ConfigDict()
    config.cascade = dict(
        stages=("base32", "sr64", "sr128"),
        configs=(f"base32.py{suffix}", f"sr64.py{suffix}", f"sr128.py{suffix}"),
        aug_levels=(501 / 4000, 0.0),  # paper, Table 5; blur has no level
        truncated=True,  # as cascade64
        samplers=(
            _ancestral(num_steps=low_res_steps, variance="learned"),  # paper
            _ancestral(num_steps=low_res_steps, variance="learned"),  # paper
            _ancestral(num_steps=high_res_steps, variance="large"),  # paper: 100 steps; SR3
        ),
        num_samples=num_samples,  # paper: 50,000
        batch_size=batch_size,
        seed=0,
    )
    config.mesh = dict(data=-1, fsdp=1)
    return config

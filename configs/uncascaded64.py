"""The paper's baseline without a cascade on ImageNet: base64 alone, 50,000 samples.

    python -m cascaded_diffusion.sample --config=configs/uncascaded64.py --workdir=RUN

RUN holds the runs of the stages, here of one, RUN/base64.
Hardware and hours: not measured; 3.6e14 FLOP per sample.
Expected FID: 2.35 to the training images (paper); here not measured.
"""

from ml_collections import ConfigDict

from cascaded_diffusion.errors import UserError

#        num_samples  batch_size  num_steps
_VARIANTS = {
    None: (50_000, 512, 2000),
    "smoke": (20, 16, 8),
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
    num_samples, batch_size, num_steps = _VARIANTS[variant]
    suffix = f":{variant}" if variant else ""
    config = ConfigDict()
    config.cascade = dict(
        stages=("base64",),
        configs=(f"base64.py{suffix}",),
        aug_levels=(),
        truncated=False,
        samplers=(
            _ancestral(num_steps=num_steps, variance="learned"),  # paper, Table 3
        ),
        num_samples=num_samples,  # paper: 50,000
        batch_size=batch_size,
        seed=0,
    )
    config.mesh = dict(data=-1, fsdp=1)
    return config

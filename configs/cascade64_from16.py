"""The paper's small ablation on ImageNet: base16 and sr64_from16, 50,000 samples.

    python -m cascaded_diffusion.sample --config=configs/cascade64_from16.py --workdir=RUN

RUN holds the runs of the stages, RUN/base16 and RUN/sr64_from16.
Hardware and hours: not measured; 7.6e14 FLOP per sample.
Expected FID to the training images, by level (paper, not truncated; here not measured): 6.02 at
0, 3.41 at 101 / 4000, 2.13 at 1001 / 4000; without a cascade 2.35 (uncascaded64).
"""

from ml_collections import ConfigDict

from cascaded_diffusion.errors import UserError

#        num_samples  batch_size  num_steps
_VARIANTS = {
    None: (50_000, 512, 4000),
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
        stages=("base16", "sr64_from16"),
        configs=(f"base16.py{suffix}", f"sr64_from16.py{suffix}"),
        aug_levels=(1001 / 4000,),  # paper, Table 4
        truncated=False,  # paper, Table 4
        samplers=(
            _ancestral(num_steps=num_steps, variance="learned"),  # as base32
            _ancestral(num_steps=num_steps, variance="learned"),  # as base32
        ),
        num_samples=num_samples,  # paper: 50,000
        batch_size=batch_size,
        seed=0,
    )
    config.mesh = dict(data=-1, fsdp=1)
    return config

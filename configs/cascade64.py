"""The paper's 64 px cascade on ImageNet: base32 and sr64 chained, 50,000 samples.

    python -m cascaded_diffusion.sample --config=configs/cascade64.py --workdir=RUN

RUN holds the runs of the stages, RUN/base32 and RUN/sr64.
Hardware and hours: not measured; 2.4e15 FLOP per sample.
Expected FID: 1.48 to the training images, 2.48 to the validation images, Inception Score
67.95 (paper); here not measured.
Truncated at step 501 of 4000, one of the paper's two best levels; without truncation the
paper's best are 751 and 1251.
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
        stages=("base32", "sr64"),
        configs=(f"base32.py{suffix}", f"sr64.py{suffix}"),
        aug_levels=(501 / 4000,),  # paper, Table 5
        truncated=True,  # paper, Table 5
        samplers=(
            _ancestral(num_steps=num_steps, variance="learned"),  # paper
            _ancestral(num_steps=num_steps, variance="learned"),  # paper
        ),
        num_samples=num_samples,  # paper: 50,000
        batch_size=batch_size,
        seed=0,
    )
    config.mesh = dict(data=-1, fsdp=1)
    return config

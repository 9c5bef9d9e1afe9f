"""Ours: modern_base64 and modern_sr256 chained, 50,000 samples of ImageNet at 256 px.

    python -m cascaded_diffusion.sample --config=configs/modern_cascade256.py --workdir=RUN

RUN holds the runs of the stages, RUN/modern_base64 and RUN/modern_sr256.
Hardware and hours: not measured; 3.0e13 FLOP per sample.
Expected FID: not measured.
Guidance, steps and level are to be chosen when trained: `evaluate --sweep`.
"""

from ml_collections import ConfigDict

from cascaded_diffusion.errors import UserError

#        num_samples  batch_size  base_steps  sr_steps
_VARIANTS = {
    None: (50_000, 256, 32, 32),
    "smoke": (20, 16, 8, 8),
}


def _dpmpp_2m(**kwargs: int | float | tuple[float, float]) -> dict:
    return dict(name="dpmpp_2m", grid="uniform", threshold="static", **kwargs)


def get_config(variant: str | None = None) -> ConfigDict:
    if variant not in _VARIANTS:
        raise UserError(f"--config=...:{variant}: expected no variant, or ':smoke'")
    num_samples, batch_size, base_steps, sr_steps = _VARIANTS[variant]
    suffix = f":{variant}" if variant else ""
    config = ConfigDict()
    config.cascade = dict(
        stages=("modern_base64", "modern_sr256"),
        configs=(f"modern_base64.py{suffix}", f"modern_sr256.py{suffix}"),
        aug_levels=(0.1,),
        truncated=False,
        samplers=(
            _dpmpp_2m(num_steps=base_steps, guidance_scale=1.5, guidance_interval=(0.2, 0.8)),
            _dpmpp_2m(num_steps=sr_steps, guidance_scale=1.0, guidance_interval=(0.0, 1.0)),
        ),
        num_samples=num_samples,
        batch_size=batch_size,
        seed=0,
    )
    config.mesh = dict(data=-1, fsdp=1)
    return config

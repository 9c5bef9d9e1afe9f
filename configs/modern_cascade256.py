"""Ours: modern_base64 and modern_sr256 chained, 50,000 samples of ImageNet at 256 px.

    python -m cascaded_diffusion.sample --config=configs/modern_cascade256.py --workdir=RUN

RUN holds the runs of the stages, RUN/modern_base64 and RUN/modern_sr256.
Hardware and hours: not measured; 3.0e13 FLOP per sample.
Expected FID: not measured.
Guidance, steps and level are to be chosen when trained: `evaluate --sweep`.
"""

from ml_collections import ConfigDict
from sections import check_variant, data_mesh, files_of, shrink_cascade


def _dpmpp_2m(**kwargs: int | float | tuple[float, float]) -> dict:
    return dict(name="dpmpp_2m", grid="uniform", threshold="static", **kwargs)


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, "smoke")
    config = ConfigDict()
    config.cascade = dict(
        stages=("modern_base64", "modern_sr256"),
        configs=files_of(variant, "modern_base64", "modern_sr256"),
        aug_levels=(0.1,),
        truncated=False,
        samplers=(
            _dpmpp_2m(num_steps=32, guidance_scale=1.5, guidance_interval=(0.2, 0.8)),
            _dpmpp_2m(num_steps=32, guidance_scale=1.0, guidance_interval=(0.0, 1.0)),
        ),
        num_samples=50_000,
        batch_size=256,
        seed=0,
    )
    config.mesh = data_mesh()
    if variant == "smoke":
        shrink_cascade(config)
    return config

"""CIFAR-10: base16 and sr32 chained, 1,000 class-balanced 32 px photos.

    python -m cascaded_diffusion.sample --config=configs/cifar10_cascade32.py --workdir=RUN

RUN holds the runs of the two stages, RUN/base16 and RUN/sr32. `aug_levels` and
`truncated` are chosen here, after training: that is what amortized conditioning
augmentation is for.
"""

from ml_collections import ConfigDict

from cascaded_diffusion.errors import UserError

_NUM_SAMPLES = {None: 1000, "cpu": 200, "smoke": 40}


def _ddim(**kwargs: float) -> dict:
    return dict(
        name="ddim",
        grid="uniform",
        eta=0.0,
        guidance_interval=(0.0, 1.0),
        threshold="static",
        **kwargs,
    )


def get_config(variant: str | None = None) -> ConfigDict:
    if variant not in _NUM_SAMPLES:
        raise UserError(f"--config=...:{variant}: expected no variant, ':cpu' or ':smoke'")
    num_samples = _NUM_SAMPLES[variant]
    suffix = f":{variant}" if variant else ""
    config = ConfigDict()
    config.cascade = dict(
        stages=("base16", "sr32"),
        configs=(f"cifar10_base16.py{suffix}", f"cifar10_sr32.py{suffix}"),
        aug_levels=(0.1,),
        truncated=False,
        samplers=(_ddim(num_steps=25, guidance_scale=1.2), _ddim(num_steps=25, guidance_scale=1.0)),
        num_samples=num_samples,
        batch_size=min(200, num_samples),
        seed=0,
    )
    config.mesh = dict(data=-1, fsdp=1)
    return config

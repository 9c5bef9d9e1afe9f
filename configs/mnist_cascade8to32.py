"""Three stages on MNIST: base8, sr16 and sr32 chained, 1,000 class-balanced 32 px digits.

    python -m cascaded_diffusion.sample --config=configs/mnist_cascade8to32.py --workdir=RUN

RUN holds the runs of the stages, RUN/base8, RUN/sr16 and RUN/sr32. Expected fd_classifier of
the samples: 4.8 (measured). One level per enlargement: of 8 to 16 px, and of 16 to 32 px.
"""

from ml_collections import ConfigDict

from cascaded_diffusion.errors import UserError

_NUM_SAMPLES = {None: 1000, "smoke": 40}


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
        raise UserError(f"--config=...:{variant}: expected no variant, or ':smoke'")
    num_samples = _NUM_SAMPLES[variant]
    suffix = f":{variant}" if variant else ""
    config = ConfigDict()
    config.cascade = dict(
        stages=("base8", "sr16", "sr32"),
        configs=(f"mnist_base8.py{suffix}", f"mnist_sr16.py{suffix}", f"mnist_sr32.py{suffix}"),
        aug_levels=(0.2, 0.1),
        truncated=False,
        samplers=(
            _ddim(num_steps=10, guidance_scale=1.5),
            _ddim(num_steps=8, guidance_scale=1.0),
            _ddim(num_steps=8, guidance_scale=1.0),
        ),
        num_samples=num_samples,
        batch_size=min(200, num_samples),
        seed=0,
    )
    config.mesh = dict(data=-1, fsdp=1)
    return config

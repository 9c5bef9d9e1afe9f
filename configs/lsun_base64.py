"""Base model, LSUN bedrooms at 64 px, without classes: the first stage of the LSUN cascade.

    python -m cascaded_diffusion.main --config=configs/lsun_base64.py --workdir=RUN/lsun_base64

Hardware and hours: not measured; 0.27 billion parameters, 1.4e20 FLOP to train.
Expected FID: not published for this stage, not measured.
Bedrooms are the largest of LSUN's usual sets (3 million images) and the one that most
models are scored on. The paper publishes no settings of its LSUN models: they are ours,
those of base64 but for the data and the noise levels.
"""

from ml_collections import ConfigDict
from sections import config_of, in_variant, lsun_bedrooms


def get_config(variant: str | None = None) -> ConfigDict:
    config = config_of("base64")
    config.stage.update(name="lsun_base64", num_classes=0)
    config.stage.schedule.num_timesteps = 4000  # as base32
    config.stage.sampler.num_steps = 4000  # as base32
    config.data = lsun_bedrooms(64)
    config.train.batch_size = 512  # not published; ours
    config.train.learning_rate = 1e-4  # as base32
    config.eval.batch_size = 512
    return in_variant(config, variant)

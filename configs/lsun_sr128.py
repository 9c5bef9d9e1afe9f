"""Super-resolution 64 -> 128 px on LSUN bedrooms, without classes.

    python -m cascaded_diffusion.main --config=configs/lsun_sr128.py --workdir=RUN/lsun_sr128

Hardware and hours: not measured; 0.56 billion parameters, 4.2e20 FLOP to train.
Expected FID: the paper has a number, which we did not recover; not measured.
As in the paper: Gaussian augmentation, not truncated. It publishes no settings of its LSUN
models: they are ours, those of sr128 but for the data and the augmentation.
"""

from ml_collections import ConfigDict
from sections import config_of, in_variant, lsun_bedrooms


def get_config(variant: str | None = None) -> ConfigDict:
    config = config_of("sr128")
    config.stage.update(name="lsun_sr128", num_classes=0)
    config.stage.augment = dict(name="gaussian", max_level=1.0)  # paper; the range is ours
    config.stage.low_res_schedule = config_of("lsun_base64").stage.schedule
    config.data = lsun_bedrooms(128)
    config.train.batch_size = 512  # not published; ours
    config.eval.aug_level = 500 / 4000  # not published; ours
    return in_variant(config, variant)

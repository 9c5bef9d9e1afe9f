"""Super-resolution 8 -> 16 px on MNIST digits: the second of the three-stage cascade.

    python -m cascaded_diffusion.main --config=configs/mnist_sr16.py --workdir=RUN/sr16

Two CPU cores: time not measured. Expected fd_classifier of 1,000 enlarged samples of base8:
4.2 (measured).
It is mnist_sr32 at half the size, trained for fewer steps.
"""

from ml_collections import ConfigDict
from sections import check_variant, config_of, train_for


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, "smoke")
    config = config_of("mnist_sr32", variant)
    config.stage.update(name="sr16", resolution=16, low_res_resolution=8)
    config.stage.network.patch_size = 2  # feature maps of 8 and 4 px, as in mnist_sr32
    config.eval.aug_level = 0.2
    if variant is None:
        train_for(config, 600)
    return config

"""Super-resolution 16 -> 32 px on MNIST digits: the second stage of the demo cascade.

    python -m cascaded_diffusion.main --config=configs/mnist_sr32.py --workdir=RUN/sr32

Two CPU cores: 3 minutes. Expected fd_classifier of 1,000 enlarged images, measured: 2.3 of real
ones, 4.0 of samples of base16. Ours, not the paper's: the sizes, x0-prediction, continuous time,
the short schedule. As in the paper: conditioning on class and upsampled low-res image, Gaussian
conditioning augmentation amortized over a uniformly random level. All else is as in mnist_base16.
"""

from ml_collections import ConfigDict
from sections import check_variant, config_of, train_for


def get_config(variant: str | None = None) -> ConfigDict:
    check_variant(variant, "no_augment", "smoke")
    config = config_of("mnist_base16", "smoke" if variant == "smoke" else None)
    config.stage.update(name="sr32", kind="super_resolution", resolution=32, low_res_resolution=16)
    config.stage.network.patch_size = 4  # feature maps of 8 and 4 px: what two cores can afford
    # x0 here, too: for v, the network would carry 16 noise values per patch.
    config.stage.diffusion.label_dropout_prob = 0.1
    config.stage.sampler.update(num_steps=8, guidance_scale=1.0)
    if variant != "smoke":
        train_for(config, 700)
    if variant != "no_augment":  # the paper's ablation
        config.stage.augment = dict(name="gaussian", max_level=1.0)
        config.stage.low_res_schedule = config.stage.schedule  # that of base16
        config.eval.aug_level = 0.1
    return config

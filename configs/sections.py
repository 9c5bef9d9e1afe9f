"""The parts that config files share: data sets, evaluation, meshes, samplers, smoke runs.

A config file spells out its stage and its training, or where they differ from another file's;
this module says the rest once, so that comparing two files shows only what matters. The loader
finds it beside the config file. In the configs for ImageNet and LSUN, comments name the origin of
a value: "iDDPM" is Improved DDPM, and "not published" means that we did not find it. When to
save and stop is ours.
"""

import pathlib
import runpy
from typing import Any

from ml_collections import ConfigDict

from cascaded_diffusion.errors import UserError

Section = dict[str, Any]


def check_variant(variant: str | None, *known: str | None) -> None:
    """Raises UserError unless `variant`, of `--config=FILE.py:variant`, is None or known."""
    *names, last = (f"':{name}'" for name in known if name is not None)
    if variant not in (None, *known):
        expected = ", ".join(["no variant", *names]) + ("" if names else ",")
        raise UserError(f"--config=...:{variant}: expected {expected} or {last}")


def config_of(name: str, variant: str | None = None) -> ConfigDict:
    """The config of the file `name` beside this one, to be changed into another.

    It is found by its path, since `import base64` would find Python's module.
    """
    path = pathlib.Path(__file__).with_name(f"{name}.py")
    return runpy.run_path(str(path))["get_config"](variant)


def in_variant(config: ConfigDict, variant: str | None, **network: Any) -> ConfigDict:
    """The config of a stage as it is, or for `smoke` small enough for a CPU.

    A smoke run is a quarter of the size, on drawn pictures. `network` replaces values of its
    small network.
    """
    check_variant(variant, "smoke")
    if variant is None:
        return config
    stage = config.stage
    for key in ("resolution", "low_res_resolution"):
        if key in stage:
            stage[key] //= 4
    stage.num_classes = min(stage.num_classes, 10)
    network = dict(channels=16, channel_mults=(1, 2), dtype="float32") | network
    stage.network.update(network, num_res_blocks=(1,) * len(network["channel_mults"]))
    for schedule in (stage.schedule, stage.get("low_res_schedule", {})):
        for key, value in (("num_timesteps", 40), ("reference_resolution", 16)):
            if key in schedule:
                schedule[key] = value
    stage.sampler.num_steps = 8
    config.data.update(name="shapes", prepared_dir=None, eval_split="test")
    config.data.resolution = max(64, stage.resolution)
    config.train.update(batch_size=16, train_steps=20, warmup_steps=2, log_every_steps=5)
    config.eval.update(resize=None, num_samples=20, final_num_samples=20, batch_size=16)
    config.eval.features = "classifier" if stage.num_classes else "rotation"
    if "num_steps" in config.eval:
        config.eval.num_steps = 8
    config.checkpoint.save_every_steps = 10
    return config


def _files(name: str, resolution: int, **settings: Any) -> Section:
    return dict(
        name=name,
        prepared_dir="prepared",
        train_split="train",
        resolution=resolution,
        crop="center",  # as BigGAN (paper)
        low_res="derived",
        random_flip=True,  # paper, App. B, for base32 and sr256; elsewhere ours
        shuffle_seed=0,
        on_corrupt="fail",
        **settings,
    )


def imagenet(resolution: int) -> Section:
    """`data`: ImageNet with 1,000 classes."""
    # The authors' code of other works resizes by area.
    return _files(
        "imagenet2012", resolution, resize="area", eval_split="validation", read_threads=16
    )


def lsun_bedrooms(resolution: int) -> Section:
    """`data`: LSUN bedrooms, without classes."""
    # The authors' code of other works crops the center and resizes bilinearly.
    return _files(
        "lsun/bedroom", resolution, resize="bilinear", eval_split="validation", read_threads=16
    )


def cifar10() -> Section:
    """`data`: CIFAR-10 at its own size, so that both stages share one prepared set."""
    return _files("cifar10", 32, resize="area", eval_split="test", read_threads=2)


def mnist() -> Section:
    """`data`: MNIST digits, which come with the package, at 32 px."""
    return dict(
        name="mnist",
        train_split="train",
        eval_split="test",
        resolution=32,
        crop="none",
        resize="area",
        low_res="derived",
        random_flip=False,
        shuffle_seed=0,
        on_corrupt="fail",
        read_threads=2,
    )


def fid_eval(*, batch_size: int, ddim_steps: int | None = None, aug_level: float = 0.0) -> Section:
    """`eval`: FID-10k for every checkpoint, FID-50k for the chosen one (paper).

    Checkpoints are compared in `ddim_steps` of DDIM (not published; ours), or by the stage's own
    sampler.
    """
    sampler = {} if ddim_steps is None else dict(sampler="ddim", num_steps=ddim_steps)
    return dict(
        features="inception",
        resize="legacy",  # as the original FID, and ADM's evaluator
        num_samples=10_000,  # paper
        final_num_samples=50_000,  # paper
        **sampler,
        batch_size=batch_size,
        seed=0,
        aug_level=aug_level,
        ema_decays=(0.9999,),
        patience_evals=10,
    )


def classifier_eval(
    num_samples: int, *, ema_decay: float, patience_evals: int, aug_level: float = 0.0
) -> Section:
    """`eval`: Fréchet distance in the features of a small classifier, for small images."""
    return dict(
        features="classifier",
        num_samples=num_samples,
        final_num_samples=num_samples,
        batch_size=min(200, num_samples),
        seed=0,
        aug_level=aug_level,
        ema_decays=(ema_decay,),
        patience_evals=patience_evals,
    )


def data_mesh() -> Section:
    """`mesh`: every device holds all parameters."""
    return dict(data=-1, fsdp=1)


def fitting_mesh() -> Section:
    """`mesh`: parameters are split over as few devices as they fit on."""
    return dict(data=-1, fsdp=None)


def train_for(config: ConfigDict, steps: int) -> None:
    """Sets the steps of a small stage's training, which logs, samples and saves in proportion."""
    config.train.update(train_steps=steps, warmup_steps=steps // 10)
    config.train.update(log_every_steps=max(1, steps // 40), sample_every_steps=steps // 2)
    config.checkpoint = save_every(steps // 2)


def save_every(steps: int) -> Section:
    """`checkpoint`: every so many steps; the latest three and the best are kept."""
    return dict(save_every_steps=steps, max_to_keep=3)


def ancestral(num_steps: int, variance: str) -> Section:
    """A sampler of the paper."""
    return dict(
        name="ancestral",  # iDDPM, SR3
        num_steps=num_steps,
        grid="uniform",  # iDDPM; for the super-resolution of SR3 not published, ours
        variance=variance,
        guidance_scale=1.0,  # paper: no guidance
        guidance_interval=(0.0, 1.0),
        threshold="static",  # DDPM
    )


def respaced(num_steps: int) -> Section:
    """ADM's sampler: its steps of the published discrete ones, with learned variances."""
    return ancestral(num_steps, "learned") | dict(grid="respaced")


def dpmpp_2m(
    num_steps: int,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> Section:
    """DPM-Solver++(2M), of the samplers the nearest to the data in few steps (docs/results.md)."""
    return dict(
        name="dpmpp_2m",
        num_steps=num_steps,
        grid="uniform",
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        threshold="static",  # Imagen
    )


def _cascade(
    variant: str | None, *, stages: tuple[str, ...], data: str | None = None, **settings: Any
) -> ConfigDict:
    """A cascade of stages in this variant.

    A stage's file has the stage's name, which follows that of the data where `data` is given.
    """
    names = [f"{data}_{name}" if data else name for name in stages]
    config = ConfigDict()
    config.cascade = dict(
        stages=stages,
        configs=tuple(f"{name}.py:{variant}" if variant else f"{name}.py" for name in names),
        seed=1,  # the samples of eval.seed, 0, have chosen the checkpoints
        **settings,
    )
    config.mesh = data_mesh()
    return config


def paper_cascade(variant: str | None, **settings: Any) -> ConfigDict:
    """A cascade of 50,000 samples (paper); for `smoke` of few and quick ones."""
    check_variant(variant, "smoke")
    config = _cascade(variant, num_samples=50_000, **settings)
    if variant == "smoke":
        section = config.cascade
        section.update(num_samples=20, batch_size=16)
        section.samplers = tuple({**sampler, "num_steps": 8} for sampler in section.samplers)
    return config


def adm_cascade(variant: str | None, *, stages: tuple[str, ...], batch_size: int) -> ConfigDict:
    """Imported stages, sampled in ADM's 250 steps, or as the variant says."""
    check_variant(variant, "smoke", "ddim", "dpmpp")
    sampler = {
        "ddim": dpmpp_2m(25) | dict(name="ddim", grid="ddim_respaced", eta=0.0),  # ADM
        "dpmpp": dpmpp_2m(25) | dict(grid="logsnr"),  # ours
    }.get(variant, respaced(250))
    return paper_cascade(
        "smoke" if variant == "smoke" else None,
        stages=stages,
        aug_levels=(0.0,) * (len(stages) - 1),  # trained without augmentation
        truncated=False,
        samplers=(sampler,) * len(stages),
        batch_size=batch_size,
    )


def small_cascade(
    variant: str | None, num_samples: dict[str | None, int], **settings: Any
) -> ConfigDict:
    """A cascade for a small data set, not truncated; `num_samples` is by variant."""
    check_variant(variant, *num_samples)
    count = num_samples[variant]
    return _cascade(
        variant, truncated=False, num_samples=count, batch_size=min(200, count), **settings
    )

"""The configuration as frozen dataclasses, whose fields state the values they take.

A config file returns an `ml_collections.ConfigDict` with the sections `stage`, `data`, `train`,
`eval`, `mesh` and `checkpoint` (one stage), or `cascade` and `mesh` (a chain of trained stages).
`run_checks.run_config_from` and `cascade_config_from` turn it, or the JSON of an earlier run,
into the dataclasses below and check every value (`convert`: types and bounds). There are no
defaults; an optional key may be omitted and is then None.
"""

import dataclasses
import json
from typing import Any, Literal

from cascaded_diffusion.files.json_files import Record

# Far above what anybody means, and below what breaks JAX, NumPy or a machine. `stage_checks` bounds
# what several values make together.
MAX_SIZE = 16_384  # pixels of an image's side
_MAX_STEPS = 10**9  # the step is an int32
_MAX_SEED = 2**32 - 1  # JAX takes the lower 32 bits
_MAX_BATCH = 2**20
_MAX_SAMPLES = 10**8
_MAX_DEVICES = 2**20


def _range(minimum: float, maximum: float) -> Any:
    """Bounds of a number, or of each number of a tuple."""
    return dataclasses.field(metadata={"minimum": minimum, "maximum": maximum})


def _above(bound: float, maximum: float) -> Any:
    return dataclasses.field(metadata={"above": bound, "maximum": maximum})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """`stage.schedule`, `stage.low_res_schedule`: a forward process.

    Parameters that the schedule `name` does not use are None.
    """

    name: Literal["cosine", "linear", "shifted_cosine"]  # log-SNR as a function of t
    num_timesteps: int | None = _range(2, 10**6)  # T; None is continuous time
    # "discrete" trains at the T steps only; "continuous" also draws between neighbours.
    noise_levels: Literal["discrete", "continuous"]
    cosine_offset: float | None = _range(0.0, 1.0)  # s of "cosine"
    linear_betas: tuple[float, ...] | None = _range(1e-8, 0.999)  # first, last, of 1000 steps
    reference_resolution: int | None = _range(1, MAX_SIZE)  # where "shifted_cosine" is not shifted

    @property
    def discrete_timesteps(self) -> int | None:
        """T where only the times i/T exist, else None."""
        return self.num_timesteps if self.noise_levels == "discrete" else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """`stage.network`: see `networks.conditioning.ConditionalNetwork` for the meaning."""

    name: Literal["unet", "efficient_unet"]  # the architecture
    channels: int = _range(2, 65_536)  # the unit of width, and those of the first convolution
    channel_mults: tuple[int | float, ...] = _range(
        0.125, 1024
    )  # width of each level, in `channels`
    num_res_blocks: tuple[int, ...] = _range(1, 256)  # per level
    attention_resolutions: tuple[int, ...] = _range(1, MAX_SIZE)  # feature maps with attention
    num_heads: int | None = _range(1, 1024)  # of self-attention
    num_head_channels: int | None = _range(1, 65_536)  # of a head; instead of their number
    dropout_rate: float = _range(0.0, 0.99)  # in the residual blocks
    patch_size: int = _range(1, 256)  # patches become channels before the first convolution
    resample: Literal["conv", "pool", "biggan"]  # convolutions, averages or residual blocks
    scale_shift: bool  # the embedding scales and shifts each block's features, or is added
    scale_skips: bool  # skip connections are multiplied by 1/sqrt(2), as in SR3
    # What is embedded as the noise level; the last two are guided-diffusion's time steps.
    noise_input: Literal["cosine_time", "noise_level", "step_index", "scaled_step_index"]
    ddpm_details: bool | None  # padding, epsilon and sinusoids of DDPM's own code; None: ADM's
    null_label: bool | None  # whether the "dropped" label of guidance exists; None: it does
    upsample: Literal["bilinear", "bicubic"]  # of the low-res input
    dtype: Literal["float32", "bfloat16"]  # of the computation

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each level."""
        return tuple(round(self.channels * mult) for mult in self.channel_mults)

    def heads_of(self, width: int) -> int:
        """The heads of self-attention over so many channels."""
        return self.num_heads or width // self.num_head_channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """`stage.diffusion`: what the network predicts, and the loss it is trained by."""

    parameterization: Literal["eps", "x0", "v"]  # what the network predicts
    variance: Literal["fixed", "learned"]  # of the reverse step
    loss: Literal["simple", "vlb", "hybrid"]  # the squared error, the variational bound, or both
    vlb_weight: float | None = _above(0.0, 1e6)  # of "hybrid"
    weighting: Literal["none", "snr", "truncated_snr", "min_snr", "sigmoid"]  # of the error
    label_dropout_prob: float = _range(0.0, 0.99)  # > 0 allows guidance


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """`stage.augment`: conditioning augmentation of a super-resolution stage."""

    name: Literal["none", "gaussian", "blur"]  # how the low-res input is damaged
    max_level: float | None = _range(1e-6, 1.0)  # gaussian: levels are drawn from (0, max_level]
    blur_kernel_size: int | None = _range(3, 255)  # pixels; odd
    blur_sigmas: tuple[float, ...] | None = _above(0.0, 1000.0)  # pixels: lowest, highest
    blur_prob: float | None = _range(0.0, 1.0)  # of blurring an image at all
    blur_border: Literal["edge", "reflect"] | None  # what lies beyond the border; None: "edge"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """`stage.sampler`, `cascade.samplers[i]`: how a stage is sampled. Free after training."""

    name: Literal["ancestral", "ddim", "dpmpp_2m", "heun", "edm"]  # the method
    num_steps: int = _range(1, 10**6)  # steps from noise to image
    # How the steps' times are spaced: "karras" as EDM does, the last two as guided-diffusion
    # respaces discrete steps.
    grid: Literal["uniform", "quadratic", "logsnr", "karras", "respaced", "ddim_respaced"]
    # ancestral alone; "interpolated" is log-linear, 0 is small and 1 is large; "adm_large" differs
    # from "large" in bits per dimension alone.
    variance: Literal["small", "large", "interpolated", "learned", "adm_large"] | None
    variance_interpolation: float | None = _range(0.0, 1.0)  # of "interpolated" alone
    eta: float | None = _range(0.0, 1.0)  # ddim alone; 0 is deterministic
    # edm alone: S_churn, S_min, S_max (1e6 for no bound), S_noise
    churn: tuple[float, ...] | None = _range(0.0, 1e6)
    guidance_scale: float = _range(0.0, 1000.0)  # 1 is no guidance
    guidance_interval: tuple[float, ...] = _range(0.0, 1.0)  # times t, low and high
    threshold: Literal["none", "static", "dynamic"]  # how the predicted image is clipped
    threshold_percentile: float | None = _range(0.5, 1.0)  # dynamic alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageConfig:
    """`stage`: one diffusion model. With these fields it can be rebuilt and sampled."""

    name: str  # also the name of its run folder
    kind: Literal["base", "super_resolution"]  # whether it enlarges images
    resolution: int = _range(1, MAX_SIZE)  # of the images it makes, in pixels
    channels: int = _range(1, 1024)  # of an image
    num_classes: int = _range(0, 10**6)  # 0: without classes
    low_res_resolution: int | None = _range(1, MAX_SIZE)  # of its inputs; None: base model
    network: NetworkConfig  # what is trained
    schedule: ScheduleConfig  # the forward process
    diffusion: DiffusionConfig  # prediction and loss
    augment: AugmentConfig  # of the low-res input
    low_res_schedule: ScheduleConfig | None  # the low-res stage's own, for "gaussian"
    sampler: SamplerConfig  # how samples are drawn

    @property
    def null_label(self) -> int:
        """The label that stands for "dropped"."""
        return self.num_classes

    def attends(self, level: int) -> bool:
        """Whether the blocks of a U-Net's level have self-attention."""
        size = self.resolution // self.network.patch_size // 2**level
        return size in self.network.attention_resolutions

    @property
    def has_aug_level(self) -> bool:
        """Whether the stage has an `aug_level` to choose."""
        return self.augment.name == "gaussian"


# Bounds of `data` that are None in most configs.
MAX_CORRUPT_FRACTION = 0.001
MAX_PIXELS = 64_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`data`: where the images come from, and what the host does to them.

    An image is cropped to a square and resized to `resolution`. The stage shrinks it
    further on the device, to its own resolution and to its low-res input.
    """

    name: str  # "mnist", "shapes", "folder", "adm_folder", "npz", or a TFDS data set's
    path: str | None  # where the folder, the .npz or TFDS's data_dir is
    prepared_dir: str | None  # where `prepare` writes; None: each image is decoded when read
    train_split: str  # a split, or a part such as train[:90%]
    eval_split: str  # a split that is not trained on
    resolution: int = _range(1, MAX_SIZE)  # of the images that the host gives, in pixels
    crop: Literal["center", "none"]  # "none": images are square already
    resize: Literal["area", "bilinear", "adm"]  # the filter that shrinks images; ADM's own way
    low_res: Literal["derived", "stored"]  # from the high-res image, or from the crop itself
    random_flip: bool  # left to right, with probability 1/2
    shuffle_seed: int = _range(0, _MAX_SEED)  # of the order of the images
    on_corrupt: Literal["fail", "skip"]  # about an image that cannot be read
    max_corrupt_fraction: float | None = _range(0.0, 1.0)  # None: MAX_CORRUPT_FRACTION
    max_pixels: int | None = _range(1, 10**11)  # of an encoded image; None: MAX_PIXELS
    read_threads: int = _range(0, 1024)  # threads that read and decode images
    read_workers: int | None = _range(0, 1024)  # processes that read; None: this one's threads

    @property
    def pixel_limit(self) -> int:
        """An encoded image of more pixels is corrupt."""
        return self.max_pixels or MAX_PIXELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`train`: the optimization."""

    seed: int = _range(0, _MAX_SEED)  # of parameters, noise and dropout
    batch_size: int = _range(1, _MAX_BATCH)  # global
    train_steps: int = _range(1, _MAX_STEPS)  # at which training is complete
    learning_rate: float = _above(0.0, 1000.0)  # Adam's, after the warm-up
    lr_decay: Literal["none", "cosine"]  # after the warm-up
    warmup_steps: int = _range(0, _MAX_STEPS)  # in which the learning rate rises linearly from 0
    adam_b2: float = _range(0.0, 0.99999)  # Adam's second decay
    grad_clip_norm: float = _above(0.0, 1e12)  # the largest global norm of the gradient
    ema_decays: tuple[float, ...] = _range(0.0, 0.999999)  # one average of the parameters for each
    accumulation_steps: int | None = _range(1, _MAX_BATCH)  # parts of a batch; None: one
    # What is recomputed in the backward pass, to save memory; None: nothing.
    remat: Literal["resolutions", "everything"] | None
    remat_resolutions: tuple[int, ...] | None = _range(1, MAX_SIZE)  # sizes of feature maps
    # Steps with a loss or gradient that is not finite are skipped, until they are too many.
    max_nonfinite_in_row: int | None = _range(2, 10**6)  # None: 3
    max_nonfinite_per_thousand: int | None = _range(1, 1000)  # None: 10
    hang_secs: float | None = _above(0.0, 1e6)  # for a step, or a save and its samples; None: 1800
    log_every_steps: int = _range(1, _MAX_STEPS)  # between lines of metrics.jsonl
    # Grids of EMA samples for TensorBoard, at the last step too; None: never.
    sample_every_steps: int | None = _range(1, _MAX_STEPS)

    @property
    def parts(self) -> int:
        """How many parts of a batch have their gradients summed up."""
        return self.accumulation_steps or 1

    @property
    def remat_sizes(self) -> tuple[int, ...] | None:
        """Sizes of the feature maps whose blocks `remat` computes again; None: of all."""
        return None if self.remat == "everything" else self.remat_resolutions or ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """`eval`: how checkpoints are scored, and when training may stop."""

    features: Literal["classifier", "resnet", "resnet50", "rotation", "inception"]  # extractor
    resize: Literal["legacy", "clean", "pytorch_fid"] | None  # to the 299 px of inception alone
    num_samples: int = _range(2, _MAX_SAMPLES)  # by which checkpoints are compared
    final_num_samples: int = _range(2, _MAX_SAMPLES)  # of `evaluate final`, but of a cascade
    sampler: Literal["ancestral", "ddim", "dpmpp_2m", "heun", "edm"] | None  # None: the stage's
    num_steps: int | None = _range(1, 10**6)  # to score a checkpoint; None: the stage's sampler's
    batch_size: int = _range(1, _MAX_BATCH)  # of samples
    seed: int = _range(0, _MAX_SEED)  # of the samples' noise
    aug_level: float = _range(0.0, 1.0)  # of the low-res input
    ema_decays: tuple[float, ...] = _range(0.0, 0.999999)  # of train.ema_decays: those to score
    patience_evals: int = _range(1, 10**6)  # scores without a new best before EARLY_STOP


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """`mesh`: devices along each axis; `data` = -1 takes what the others leave."""

    data: int = _range(-1, _MAX_DEVICES)  # a batch is split over it
    fsdp: int | None = _range(1, _MAX_DEVICES)  # and all parameters; None: what fits, or 1
    tensor: int | None = _range(1, _MAX_DEVICES)  # the widest layers' channels are; None: 1

    @property
    def fsdp_size(self) -> int:
        """Devices along `fsdp`; 1 until it is known what fits."""
        return self.fsdp or 1

    @property
    def tensor_size(self) -> int:
        """Devices along `tensor`."""
        return self.tensor or 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """`checkpoint`: when to save, and how many of the latest to keep (and the best)."""

    save_every_steps: int = _range(1, _MAX_STEPS)  # between checkpoints
    max_to_keep: int = _range(1, 10**6)  # of the latest; the best is kept, too


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of one stage's run.

    config = cd.load_config("configs/mnist_base16.py")  # config.stage.resolution is 16
    """

    stage: StageConfig
    data: DataConfig
    train: TrainConfig
    eval: EvalConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CascadeSection:
    """`cascade`: the chained runs. Tuples have one entry per stage, `aug_levels` one fewer."""

    stages: tuple[str, ...]  # names of run folders
    configs: tuple[str, ...]  # config files of the stages, beside the cascade's own
    aug_levels: tuple[float, ...] = _range(0.0, 1.0)  # of each stage above the first
    truncated: bool  # each stage stops at the level of the next
    samplers: tuple[SamplerConfig, ...]  # of the stages, instead of their own
    num_samples: int = _range(1, _MAX_SAMPLES)  # in all, of `sample` and `evaluate final`
    batch_size: int = _range(1, _MAX_BATCH)  # of samples
    seed: int = _range(0, _MAX_SEED)  # of the samples' noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """Everything that sampling a cascade needs besides the run folders.

    config = cd.load_config("configs/mnist_cascade32.py")  # config.cascade.aug_levels
    """

    cascade: CascadeSection
    mesh: MeshConfig


def ema_name(decay: float) -> str:
    """The name of an EMA in a checkpoint: 0.9999 -> "decay_0_9999"."""
    return f"decay_{decay}".replace(".", "_")


def to_dict(config: Any) -> Record:
    """A config dataclass as the nested dicts and lists that its JSON would give back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def sampler_named(name: str, like: SamplerConfig, stage: StageConfig) -> SamplerConfig:
    """`like` with another sampler and the usual settings of that sampler.

    Ancestral sampling takes the learned variance if there is one, else the small one; DDIM draws
    no noise.
    """
    if name == like.name:
        return like
    learned = "learned" if stage.diffusion.variance == "learned" else "small"
    return dataclasses.replace(
        like,
        name=name,
        variance=learned if name == "ancestral" else None,
        variance_interpolation=None,
        eta=0.0 if name == "ddim" else None,
        churn=None,
    )


def eval_sampler(config: RunConfig) -> SamplerConfig:
    """The sampler by which checkpoints are scored: the stage's, as far as `eval` sets no other."""
    sampler, eval_config = config.stage.sampler, config.eval
    if eval_config.sampler is not None:
        sampler = sampler_named(eval_config.sampler, sampler, config.stage)
    if eval_config.num_steps is not None:
        sampler = dataclasses.replace(sampler, num_steps=eval_config.num_steps)
    return sampler

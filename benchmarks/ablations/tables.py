"""What the tables compare: rows, the models they need, and what a row may cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from cascaded_diffusion.config.schema import SamplerConfig, StageConfig, sampler_named

# Dotted keys of a config and their values.
Changes = Mapping[str, object]
Settings = tuple[tuple[str, object], ...]
Label = dict[str, str | float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a row may cost, and the size of the networks that fit that."""

    name: str
    variant: str | None  # of the config files
    flops: float  # of training all stages of a row
    num_samples: int
    batch_size: int  # of samples
    cas_seeds: int  # seeds whose samples train a classifier
    long_chain: int  # steps of the chain that table "samplers" compares with
    seconds: float  # of training a row of the table "peer"
    peer_steps: int  # by which the peer is sampled: 1,000 of DDPM, or fewer of DDIM
    min_steps: int = 50  # of a training: fewer say nothing about a model
    network: str = "resnet"  # whose features measure
    changes: Changes = dataclasses.field(default_factory=dict)  # of every config

    def file_of(self, config: str) -> str:
        """A config's file with the variant for this budget."""
        variant = self.variant
        if config.startswith("mnist") and variant != "smoke":
            variant = None  # the digits' networks are as small as two cores need already
        return f"{config}.py:{variant}" if variant else f"{config}.py"


BUDGETS = {
    "cpu": Budget(
        name="cpu",
        variant="cpu",
        flops=8e13,
        num_samples=2000,
        batch_size=200,
        cas_seeds=1,
        long_chain=1000,
        seconds=900,
        peer_steps=50,
    ),
    # The same networks, for twelve times as long: larger ones would learn less in these minutes.
    "gpu": Budget(
        name="gpu",
        variant="cpu",
        flops=1e15,
        num_samples=5000,
        batch_size=1000,
        cas_seeds=1,
        long_chain=1000,
        seconds=90,
        peer_steps=1000,
        changes={"train.batch_size": 256},
    ),
    # Of no meaning: it shows that everything runs.
    "smoke": Budget(
        name="smoke",
        variant="smoke",
        flops=1e12,
        num_samples=40,
        batch_size=20,
        cas_seeds=1,
        long_chain=20,
        seconds=2,
        peer_steps=2,
        min_steps=3,
        network="small",
        changes={
            "stage.channels": 3,
            "stage.num_classes": 10,
            "data.name": "shapes",
            "data.prepared_dir": None,
            "data.train_split": "train",
            "data.eval_split": "test",
        },
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A stage to train: a config, what is changed in it, and its share of the row's FLOPs."""

    config: str  # a file of configs/
    share: float
    changes: Settings = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table.

    `images` says what is scored: what the models make as a "cascade", what the one model makes of
    "real_low_res" images, or without a model "real" held-out images, the same "enlarged" from half
    their size, images of "train", "noise", or what a "peer" makes, a network of diffusers.
    """

    label: Label  # the cells that tell rows apart
    images: Literal["cascade", "real_low_res", "real", "train", "enlarged", "noise", "peer"] = (
        "cascade"
    )
    models: tuple[Model, ...] = ()  # in order of resolution
    aug_levels: tuple[float, ...] = ()  # of each stage above the first
    truncated: bool = False
    sampler: Settings = ()  # what is changed in every stage's sampler
    base_sampler: Settings = ()  # and in that of the first stage
    base_ema: float | None = None  # which average of the first stage; None: what its config says
    # A single model is sampled as the first stage of that row, in as many steps as cost the same.
    as_costly_as: Row | None = None
    num_samples: int | None = None  # None: the budget's
    by_time: bool = False  # the models' training is bounded by the budget's seconds, not its FLOPs
    peer_widths: tuple[int, ...] = ()  # of the levels of a peer's network

    def sampler_of(self, stage: StageConfig) -> SamplerConfig:
        """A stage's sampler, changed as the row says."""
        changes = dict(self.sampler)
        if stage.kind == "base":
            changes.update(self.base_sampler)
        name = changes.pop("name", stage.sampler.name)
        return dataclasses.replace(sampler_named(name, stage.sampler, stage), **changes)


BASE = Model(config="cifar10_base16", share=0.5)
ENLARGE = Model(config="cifar10_sr32", share=0.5)
_WITHOUT_AUGMENT = (
    ("stage.augment", {"name": "none"}),
    ("stage.low_res_schedule", None),
    ("eval.aug_level", 0.0),
)
NO_AUGMENT = dataclasses.replace(ENLARGE, changes=_WITHOUT_AUGMENT)
# The enlarging stage's network without an image to enlarge.
SINGLE = Model(
    config="cifar10_sr32",
    share=1.0,
    changes=(
        *_WITHOUT_AUGMENT,
        ("stage.name", "single32"),
        ("stage.kind", "base"),
        ("stage.low_res_resolution", None),
    ),
)
LEVELS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6)
_WIDE_LEVELS = (0.0, 0.15, 0.3, 0.45, 0.6)
LEVEL = 0.15  # where a table is not about it


def _ends(column: str, low_res: int) -> list[Row]:
    """Rows between which all others lie: real images, the same enlarged, noise."""
    return [
        Row(label={column: "real held-out images"}, images="real"),
        Row(label={column: f"the same, from {low_res} px enlarged bilinearly"}, images="enlarged"),
        Row(label={column: "Gaussian noise"}, images="noise"),
    ]


def _augmentation(budget: Budget) -> list[Row]:
    """Table 1: one model, a cascade without augmentation, with it, at every level."""
    plain = Row(
        label={"model": "cascade without augmentation"},
        models=(BASE, NO_AUGMENT),
        aug_levels=(0.0,),
    )
    rows = [
        Row(label={"model": "single model"}, models=(SINGLE,), as_costly_as=plain),
        plain,
    ]
    for truncated in (False, True):
        how = "truncated" if truncated else "non-truncated"
        rows += [
            Row(
                label={"model": f"cascade, {how}", "s": level},
                models=(BASE, ENLARGE),
                aug_levels=(level,),
                truncated=truncated,
            )
            for level in LEVELS
            if level > 0 or not truncated  # at 0 the two are one
        ]
    return [*rows, *_ends("model", 16)]


# Four-fold, as in the paper's ablation. The base model's images are a quarter as large.
BASE8 = dataclasses.replace(
    BASE, share=0.2, changes=(("stage.name", "base8"), ("stage.resolution", 8))
)
_FROM8 = dataclasses.replace(ENLARGE, share=0.8, changes=(("stage.low_res_resolution", 8),))


def _fourfold(budget: Budget) -> list[Row]:
    """Table 1 from 8 to 32 px, where the enlarging stage has more to invent."""
    plain = dataclasses.replace(_FROM8, changes=(*_FROM8.changes, *_WITHOUT_AUGMENT))
    kinds = [("without augmentation", plain, LEVELS[:1]), ("augmented", _FROM8, LEVELS)]
    inputs = [("generated", "cascade", (BASE8,)), ("real", "real_low_res", ())]
    return [
        Row(
            label={"low-res input": name, "enlarging stage": kind, "s": level},
            images=images,
            models=(*below, model),
            aug_levels=(level,),
        )
        for name, images, below in inputs
        for kind, model, levels in kinds
        for level in levels
    ]


def _of_length(model: Model, length: float) -> Model:
    # A training of its own, whose learning rate rises and falls within it.
    return dataclasses.replace(model, share=length * model.share)


def _flops(model: Model, budget: Budget) -> str:
    return f"{model.share * budget.flops:.2g}"


def _mistakes(budget: Budget) -> list[Row]:
    """Base models of short trainings below the same enlarging stages; no guidance (paper)."""
    base, top = dataclasses.replace(BASE, share=0.2), dataclasses.replace(ENLARGE, share=0.8)
    plain = dataclasses.replace(top, changes=_WITHOUT_AUGMENT)
    kinds = [("without augmentation", plain, LEVELS[:1]), ("augmented", top, _WIDE_LEVELS)]
    return [
        Row(
            label={"FLOP, base": _flops(below, budget), "enlarging stage": kind, "s": level},
            models=(below, model),
            aug_levels=(level,),
            base_sampler=(("guidance_scale", 1.0),),
        )
        for below in (_of_length(base, length) for length in _LENGTHS[1:])
        for kind, model, levels in kinds
        for level in levels
    ]


_LENGTHS = (0.125, 0.25, 0.5, 1.0)


def _training(budget: Budget) -> list[Row]:
    """How table 1 changes with longer trainings, of both stages or only of the enlarging one."""
    kinds = [
        ("without augmentation", NO_AUGMENT, 0.0),
        *((f"augmented, s = {s:g}", ENLARGE, s) for s in (0.0, 0.15, 0.3)),
    ]
    # Both stages for as many FLOPs; then the best base model below the other enlarging stages.
    pairs = [(x, x) for x in _LENGTHS] + [(1.0, x) for x in _LENGTHS[:-1]]
    return [
        Row(
            label={
                "FLOP, base": _flops(_of_length(BASE, below), budget),
                "FLOP, enlarging": _flops(_of_length(above, length), budget),
                "enlarging stage": name,
            },
            models=(_of_length(BASE, below), _of_length(above, length)),
            aug_levels=(level,),
        )
        for below, length in pairs
        for name, above, level in kinds
    ]


def _inputs(budget: Budget) -> list[Row]:
    """Table 2: the same enlargements of real low-res images and of generated ones."""
    return [
        Row(
            label={"low-res input": name, "s": level},
            images=images,
            models=models,
            aug_levels=(level,),
        )
        for name, images, models in (
            ("real", "real_low_res", (ENLARGE,)),
            ("generated", "cascade", (BASE, ENLARGE)),
        )
        for level in LEVELS
    ]


_METHODS = ("ancestral", "ddim", "dpmpp_2m", "heun")


def _samplers(budget: Budget) -> list[Row]:
    """Table 4: quality against network evaluations; the whole cascade on one sampler."""
    long = budget.long_chain
    steps = [n for n in (5, 10, 20, 50, 100, 250) if n < long]
    # Only the first-order method that draws noise gains from very many steps.
    chains = [
        ("ancestral", long),
        *((name, n) for name in _METHODS for n in steps if n <= 100 or name == "ancestral"),
    ]
    return [
        Row(
            label={"sampler": name, "steps": n},
            models=(BASE, ENLARGE),
            aug_levels=(LEVEL,),
            sampler=(("name", name), ("num_steps", n)),
            num_samples=min(1000, budget.num_samples),
        )
        for name, n in chains
    ]


_PREDICTS, _WEIGHTS = "stage.diffusion.parameterization", "stage.diffusion.weighting"
# The demo's digits: with 4.1e13 FLOP the stages are trained for as many steps as there.
DIGITS16 = Model(config="mnist_base16", share=0.58)
DIGITS32 = Model(config="mnist_sr32", share=0.42)


def _choices(
    budget: Budget,
    below: Model = BASE,
    above: Model = ENLARGE,
    decays: tuple[float, ...] = (0.99, 0.999, 0.9999),
) -> list[Row]:
    """Table 5: what is predicted, how errors weigh, the average, guidance: of the base model."""
    eps = {_PREDICTS: "eps", _WEIGHTS: "none"}
    learned = {
        **eps,
        "stage.diffusion.variance": "learned",
        "stage.diffusion.loss": "hybrid",
        "stage.diffusion.vlb_weight": 0.001,
        "stage.schedule.num_timesteps": 1000,
        "stage.schedule.noise_levels": "discrete",
    }
    interval = dict(guidance_scale=3.0, guidance_interval=(0.1, 0.8))
    ancestral = dict(name="ancestral", num_steps=min(100, budget.long_chain))
    # What the row says, what is changed in training, in the first stage's sampler, its average.
    kinds: list[tuple[str, dict[str, object], dict[str, object], float | None]] = [
        *((f"predicts {p}", {**eps, _PREDICTS: p}, {}, None) for p in ("eps", "x0", "v")),
        *(
            (f"predicts v, weighted by {w}", {_PREDICTS: "v", _WEIGHTS: w}, {}, None)
            for w in ("snr", "truncated_snr", "min_snr", "sigmoid")
        ),
        ("predicts eps, fixed variance, ancestral", eps, ancestral, None),
        ("predicts eps, learned variance, ancestral", learned, ancestral, None),
        *((f"EMA of {d}", {"train.ema_decays": decays}, {}, d) for d in decays),
        ("guidance 1", {}, dict(guidance_scale=1.0), None),
        ("guidance 3", {}, dict(guidance_scale=3.0), None),
        ("guidance 3 for t in 0.1 to 0.8", {}, interval, None),
    ]
    return [
        Row(
            label={"base model": name},
            models=(dataclasses.replace(below, changes=tuple(changes.items())), above),
            aug_levels=(LEVEL,),
            base_sampler=tuple(sampler.items()),
            base_ema=ema,
        )
        for name, changes, sampler, ema in kinds
    ]


def _conditioning(budget: Budget) -> list[Row]:
    """Table 3, in part: classes and mirrored images, of all stages."""
    kinds: dict[str, Changes] = {
        "as it is": {},
        "without classes": {
            "stage.num_classes": 0,
            "stage.diffusion.label_dropout_prob": 0.0,
            "stage.sampler.guidance_scale": 1.0,
            "eval.features": "rotation",
        },
        "without flips": {"data.random_flip": False},
    }
    return [
        Row(
            label={"cascade": name},
            models=tuple(
                dataclasses.replace(model, changes=tuple(changes.items()))
                for model in (BASE, ENLARGE)
            ),
            aug_levels=(LEVEL,),
        )
        for name, changes in kinds.items()
    ]


def _peer(budget: Budget) -> list[Row]:
    """Table 6: our cascade and diffusers' network, trained for as many seconds."""
    steps = budget.peer_steps
    chain = "DDPM, 1000 steps" if steps == 1000 else f"DDIM, {steps} steps"
    return [
        Row(
            label={"trained": "our cascade"},
            models=(BASE, ENLARGE),
            aug_levels=(LEVEL,),
            by_time=True,
        ),
        *(
            Row(label={"trained": f"diffusers, {size}; {chain}"}, images="peer", peer_widths=widths)
            for size, widths in (
                ("a smaller network", (64, 128, 128)),
                ("its script's network", (128, 128, 256, 256, 512, 512)),
            )
        ),
    ]


def _memorised(budget: Budget) -> list[Row]:
    """Table 7: how near samples are to training images, and to held-out ones."""
    return [
        Row(label={"images": "cascade's samples"}, models=(BASE, ENLARGE), aug_levels=(LEVEL,)),
        Row(label={"images": "real held-out images"}, images="real"),
        Row(label={"images": "training images"}, images="train"),
    ]


# Three stages on Caltech-101; the networks' feature maps are of 12 and 6 px, at the top also of 24.
_PHOTOS = {
    "stage.num_classes": 101,
    "stage.network.attention_resolutions": (),  # but in the middle, where all networks attend
    "train.batch_size": 32,  # of 7,800 images: more steps for the same FLOPs
    "eval.num_samples": 1010,
    "eval.final_num_samples": 1010,
    "data.name": "folder",
    "data.prepared_dir": None,
    "data.resolution": 96,
    "data.train_split": "train[:90%]",
    "data.eval_split": "train[90%:]",
}
BASE24 = dataclasses.replace(
    BASE, share=0.4, changes=(("stage.name", "base24"), ("stage.resolution", 24))
)
SR48 = dataclasses.replace(
    ENLARGE,
    share=0.2,
    changes=(
        ("stage.name", "sr48"),
        ("stage.resolution", 48),
        ("stage.low_res_resolution", 24),
    ),
)


def _sr96(sigmas: tuple[float, float] | None) -> Model:
    blur = {"blur_kernel_size": 7, "blur_sigmas": sigmas, "blur_prob": 0.5}
    return dataclasses.replace(
        ENLARGE,
        share=0.4,
        changes=(
            *_WITHOUT_AUGMENT,
            ("stage.name", "sr96"),
            ("stage.resolution", 96),
            ("stage.low_res_resolution", 48),
            ("stage.network.channel_mults", (1, 2, 2)),
            ("stage.network.num_res_blocks", (1, 1, 1)),
            ("stage.augment", {"name": "blur", **blur} if sigmas else {"name": "none"}),
        ),
    )


_BLURS = (None, (0.2, 0.4), (0.4, 0.6), (0.6, 1.0), (1.0, 1.8))


def _blur(budget: Budget) -> list[Row]:
    """Table 3: ranges of the blur of the top stage; 0.4 to 0.6 is the paper's at 128 and 256 px."""
    inputs = [("generated", "cascade", (BASE24, SR48)), ("real", "real_low_res", ())]
    rows = [
        Row(
            label={
                "blur, sigma": f"{sigmas[0]:g} to {sigmas[1]:g}" if sigmas else "none",
                "low-res input": kind,
            },
            images=images,
            models=(*below, _sr96(sigmas)),
            aug_levels=(LEVEL, 0.0) if below else (0.0,),
        )
        for kind, images, below in inputs
        for sigmas in _BLURS
    ]
    return [*_ends("low-res input", 48), *rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the results page."""

    title: str
    rows: Callable[[Budget], Sequence[Row]]
    images: str = "cifar10_base16"  # the config by which the real images are read and prepared
    across: str | None = None  # the label along a plot's x axis, if it has a plot
    changes: Changes = dataclasses.field(default_factory=lambda: {"data.resolution": 32})
    cas: bool = True  # whether the samples of its rows train a classifier
    neighbours: bool = False  # the nearest real images are measured instead of distances of sets
    shown: int = 0  # the first so many cascades, above one base model, have a picture


TABLES = {
    "augmentation": Table(
        title="Cascades with and without conditioning augmentation", rows=_augmentation, across="s"
    ),
    "mistakes": Table(
        title="Base models that make more or fewer mistakes",
        rows=_mistakes,
        across="s",
        cas=False,
        shown=1 + len(_WIDE_LEVELS),  # above the worst base model
    ),
    "fourfold": Table(
        title="Four-fold enlargement, from 8 to 32 px", rows=_fourfold, across="s", cas=False
    ),
    "training": Table(title="Augmentation and the length of training", rows=_training, cas=False),
    "inputs": Table(title="Real and generated low-res inputs", rows=_inputs, across="s"),
    "samplers": Table(
        title="Samplers and network evaluations", rows=_samplers, across="evaluations"
    ),
    "choices": Table(title="Choices of the base model", rows=_choices),
    "digits": Table(
        title="Choices of the digits' base model",
        # Of so few steps, averages of larger decays are one.
        rows=lambda budget: _choices(budget, DIGITS16, DIGITS32, (0.9, 0.98, 0.995)),
        images="mnist_base16",
    ),
    # Ten samples of a class train no classifier of photos.
    "blur": Table(
        title="Blur of the top stage's low-res input, Caltech-101",
        rows=_blur,
        changes=_PHOTOS,
        cas=False,
        shown=len(_BLURS),
    ),
    "conditioning": Table(title="Classes and flips", rows=_conditioning),
    "peer": Table(title="Beside diffusers, at equal time", rows=_peer),
    "memorised": Table(title="Samples and their nearest images", rows=_memorised, neighbours=True),
}

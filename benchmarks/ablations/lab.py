"""Where rows are made: stages are trained for given FLOPs, sampled, and their samples scored.

What takes long is kept in a folder and made once: trained stages by a digest of everything that
decides them (config, seed, data, code), the network whose features measure distances, and the
statistics of the training images.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property, reduce

import jax
import numpy as np
from tables import Budget, Changes, Model, Row

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.cascade.pixels import UPSAMPLERS, float_from_uint8, uint8_from_float
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.commands import config_flags
from cascaded_diffusion.commands.run_images import real_split
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.config.schema import RunConfig, SamplerConfig, ema_name, to_dict
from cascaded_diffusion.data.records import DataMissing
from cascaded_diffusion.data.sources import load_splits
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation import reference as reference_lib
from cascaded_diffusion.evaluation.evaluator import Evaluator
from cascaded_diffusion.evaluation.features import classifier_training
from cascaded_diffusion.evaluation.features.classifier_extractor import Classifier, load_or_train
from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages, Task
from cascaded_diffusion.evaluation.measure import metric_name
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.sample_sources import RealSplit
from cascaded_diffusion.files.json_files import Record, read_record, write_json
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.whole import write_npz_whole
from cascaded_diffusion.networks import classifier as networks
from cascaded_diffusion.networks.flops import count_flops
from cascaded_diffusion.runtime import pictures
from cascaded_diffusion.runtime.mesh import build_mesh, host_array
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.training import step as step_lib
from cascaded_diffusion.types import Params

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Fewer optimizer steps say nothing about a model.
MIN_STEPS = 50
_TIMED_STEPS = 30  # by which the time of a step is measured
# Whose `data` section, changed as the table says, the images are read by.
_DATA_CONFIG = "cifar10_base16"
Scores = dict[str, float]


class OutOfTime(Exception):
    """The minutes given are over."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the images are, as the config's `data` says it; None is what the config says."""

    name: str | None = None
    path: str | None = None
    prepared_dir: str | None = None

    def applied(self, values: Record) -> Record:
        """The values of a config with this data. Raises UserError if a folder is not named."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if "path" in given and "prepared_dir" not in given:
            given["prepared_dir"] = None  # raw images are read as they are
        data = values["data"]
        data.update(given)
        if data["name"] == "folder" and data.get("path") is None:
            expected = "expected the folder with train/CLASS/*.jpg of the table's images"
            raise UserError(f"--data_path is not given: {expected}")
        return values


@dataclasses.dataclass(frozen=True)
class Trained:
    """A stage at the end of its training."""

    config: RunConfig
    stage: Stage
    ema_params: dict[str, Params]  # by `ema_name`
    digest: str

    ema_decay: float | None = None  # of the average that is sampled; None: the config's

    @property
    def params(self) -> Params:
        """The average that is sampled."""
        return self.ema_params[ema_name(self.ema_decay or self.config.eval.ema_decays[0])]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images to be scored, and what making one of them cost."""

    images: np.ndarray  # uint8 [n, H, W, C]
    labels: np.ndarray | None  # int [n]
    evaluations: int = 0  # of networks
    flops: float = 0.0


class Lab:
    """Trains, samples and scores for one data set and one budget.

    Args:
      budget: what a row may cost.
      changes: of every config of the table.
      data: where the images are.
      folder: where trained networks are kept.
      code: a digest of the program; networks that another one trained are trained again.
      torch_python: a Python with PyTorch and diffusers, for the table that trains them.
      deadline: on `time.monotonic`'s clock; what runs then raises `OutOfTime`.
    """

    def __init__(
        self,
        budget: Budget,
        changes: Changes,
        data: Data,
        folder: pathlib.Path,
        *,
        code: str,
        deadline: float,
        torch_python: str | None = None,
    ):
        self.torch_python = torch_python
        self.budget, self._data, self._root, self._code = budget, data, folder, code
        self._changes = {**changes, **budget.changes}
        self._deadline = deadline
        self._kept: dict[str, np.ndarray] = {}
        self._files: dict[str, Record] = {}

    # Configs and their cost.

    def config(self, model: Model, seed: int, *, by_time: bool = False) -> RunConfig:
        """The model's config, trained for its share of the budget's FLOPs, or of its seconds."""
        values = self._values(model.config, dict(model.changes))
        values["train"]["seed"] = seed
        config = run_config_from(values)
        if by_time:
            steps = int(model.share * self.budget.seconds / self._seconds_of_step(config))
        else:
            steps = int(model.share * self.budget.flops / self._flops_of_step(config))
        train = dataclasses.replace(
            config.train, train_steps=max(1, steps), warmup_steps=steps // 10
        )
        return dataclasses.replace(config, train=train)

    def _values(self, name: str, changes: Changes) -> Record:
        variant = f":{self.budget.variant}" if self.budget.variant else ""
        # Once, so that a file that is edited meanwhile changes no row.
        if name not in self._files:
            path = f"{name}.py{variant}"
            self._files[name] = config_flags.load_config_file(ROOT / "configs", path)
        values = copy.deepcopy(self._files[name])
        for key, value in {**self._changes, **changes}.items():
            *sections, last = key.split(".")
            reduce(dict.__getitem__, sections, values)[last] = value
        return self._data.applied(values)

    def _flops_of_step(self, config: RunConfig) -> float:
        """Model FLOPs of an optimizer step: three forward passes."""
        return 3.0 * config.train.batch_size * _forward_flops(build_stage(config.stage))

    def _seconds_of_step(self, config: RunConfig) -> float:
        """Seconds of an optimizer step here, measured once for all seeds."""
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=0))
        about = json.dumps([to_dict(config.stage), to_dict(config.train), self._code])
        digest = hashlib.sha256(about.encode()).hexdigest()[:16]
        path = self._folder / "rates" / f"{config.stage.name}_{digest}.json"
        if not path.exists():
            config = dataclasses.replace(
                config, train=dataclasses.replace(config.train, train_steps=_TIMED_STEPS)
            )
            self._train(config, build_stage(config.stage))  # the first time compiles
            start = time.monotonic()
            self._train(config, build_stage(config.stage))
            write_json(path, {"seconds": (time.monotonic() - start) / _TIMED_STEPS})
        return read_record(path, {"seconds": float})["seconds"]

    def check(self, rows: Sequence[Row]) -> None:
        """Raises UserError if the budget is too small for a row."""
        needed = 0.0
        for model in (model for row in rows for model in row.models):
            step = self._flops_of_step(self.config(model, 0))
            needed = max(needed, MIN_STEPS * step / model.share)
        if self.budget.flops < needed:
            raise UserError(
                f"--flops={self.budget.flops:g}: expected at least {needed:.3g}, by which every"
                f" stage of the table is trained for {MIN_STEPS} steps"
            )

    # Training.

    def trained(self, model: Model, seed: int, *, by_time: bool = False) -> Trained:
        """A model at the end of its training, from the folder if it is there."""
        config = self.config(model, seed, by_time=by_time)
        about = [to_dict(config.stage), to_dict(config.train), config.data.random_flip]
        about += [self.images["train"].identity, self._code]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        path = self._folder / "models" / f"{config.stage.name}_{digest}.npz"
        stage = build_stage(config.stage)
        if path.exists():
            params = networks.unflatten_params(read_arrays(path))
        else:
            params = self._train(config, stage)
            write_npz_whole(path, networks.flatten_params(params))
        return Trained(config, stage, params, digest)

    def _train(self, config: RunConfig, stage: Stage) -> dict[str, Params]:
        train, images = config.train, self.images["train"].whole
        state = step_lib.init_state(stage, train, self._mesh)
        program = _train_program(
            dataclasses.replace(config, train=dataclasses.replace(train, seed=0)), self._mesh
        )
        flip = config.data.random_flip
        order = np.random.default_rng([train.seed, 1])
        label = f"{config.stage.name}, seed {train.seed}"
        progress = Progress(train.train_steps, unit="steps", label=label)
        rows = np.empty(0, np.int64)
        for step in range(train.train_steps):
            while len(rows) < train.batch_size:
                rows = np.concatenate([rows, order.permutation(len(images.labels))])
            chosen, rows = np.split(rows, [train.batch_size])
            batch = images.images[chosen]
            if flip:
                mirrored = order.random(len(batch)) < 0.5
                batch[mirrored] = batch[mirrored, :, ::-1]
            records = {"image": batch, "label": images.labels[chosen]}
            records = {k: generate.put_batch(v, self._mesh) for k, v in records.items()}
            state, metrics = program(state, records)
            if (step + 1) % 50 == 0 or step + 1 == train.train_steps:
                progress.update(step + 1, loss=f"{float(metrics['loss']):.4f}")
                self.check_time()
        progress.close()
        if not np.isfinite(float(metrics["loss"])):
            raise UserError(f"{label}: the loss is {float(metrics['loss'])}, expected a number")
        return jax.device_get(state.ema_params)

    # Sampling.

    def samples(self, row: Row, seed: int) -> Samples:
        """The images that a row is about."""
        count = self.budget.num_samples if row.num_samples is None else row.num_samples
        if row.images == "peer":
            return self._of_peer(row, seed, count)
        if not row.models:
            split = self.images["train" if row.images == "train" else "val"]
            return _without_a_model(row.images, split, count, seed)
        chain = [self.trained(model, seed, by_time=row.by_time) for model in row.models]
        chain[0] = dataclasses.replace(chain[0], ema_decay=row.base_ema)
        samplers = [row.sampler_of(t.config.stage) for t in chain]
        if row.as_costly_as is not None:
            samplers = [self._as_costly(chain[0], row.as_costly_as, seed)]
        levels = row.aug_levels
        cost = self._cost(chain, samplers, levels, truncated=row.truncated)
        if row.images == "real_low_res":
            (top,), (sampler,), (level,) = chain, samplers, levels
            return self._enlarged(top, sampler, level, seed, count, cost)
        below, first = None, 0
        if not row.truncated:  # the stages below make the same images for every level
            for i in range(len(chain) - 1):
                below = self._of_stage(chain, samplers, levels, i, seed, count, below)
                first = i + 1
        images = self._run(
            chain, samplers, levels, seed, count, truncated=row.truncated, below=below, first=first
        )
        num_classes = chain[-1].config.stage.num_classes
        labels = generate.labels_of(np.arange(count), num_classes) if num_classes else None
        return Samples(images, labels, *cost)

    def _run(
        self,
        chain: Sequence[Trained],
        samplers: Sequence[SamplerConfig],
        levels: Sequence[float],
        seed: int,
        count: int,
        *,
        truncated: bool,
        below: np.ndarray | None,
        first: int,
    ) -> np.ndarray:
        self.check_time()
        cascade = Cascade(stages=[t.stage for t in chain], samplers=samplers, truncated=truncated)
        sample = generate.make_cascade_sampler(
            cascade, levels, seed=seed, mesh=self._mesh, below=below, first=first
        )
        params = [t.params for t in chain]

        def timed(given: Sequence[Params], indices: np.ndarray) -> Sequence[jax.Array]:
            self.check_time()
            return sample(given, indices)

        return generate.generate(
            timed,
            params,
            num_samples=count,
            batch_size=self._batch(count),
            label=f"samples of {' > '.join(t.config.stage.name for t in chain)}, seed {seed}",
        )[-1]

    def _of_stage(
        self,
        chain: Sequence[Trained],
        samplers: Sequence[SamplerConfig],
        levels: Sequence[float],
        index: int,
        seed: int,
        count: int,
        below: np.ndarray | None,
    ) -> np.ndarray:
        """Samples of a stage below the last, which many rows enlarge."""
        parts = [chain[: index + 1], samplers[: index + 1], levels[:index]]
        key = repr(([(t.digest, t.ema_decay) for t in parts[0]], *parts[1:], seed, count))
        if key not in self._kept:
            part = slice(index + 1)
            self._kept[key] = self._run(
                chain[part],
                samplers[part],
                levels[:index],
                seed,
                count,
                truncated=False,
                below=below,
                first=index,
            )
        return self._kept[key]

    def _enlarged(
        self,
        top: Trained,
        sampler: SamplerConfig,
        level: float,
        seed: int,
        count: int,
        cost: tuple[int, float],
    ) -> Samples:
        low_res = self.images["val"].some(count, top.config.stage.low_res_resolution)
        enlarge = generate.make_enlarger(
            top.stage, low_res, sampler=sampler, seed=seed, mesh=self._mesh
        )

        def batch(params: Sequence[Params], indices: np.ndarray) -> list[jax.Array]:
            self.check_time()
            return [enlarge(params[0], indices, level)]

        (images,) = generate.generate(
            batch,
            [top.params],
            num_samples=count,
            batch_size=self._batch(count),
            label=f"{top.config.stage.name} on real images, seed {seed}",
        )
        return Samples(images, low_res.labels, *cost)

    def _cost(
        self,
        chain: Sequence[Trained],
        samplers: Sequence[SamplerConfig],
        levels: Sequence[float],
        *,
        truncated: bool,
    ) -> tuple[int, float]:
        """Network evaluations and FLOPs of one sample."""
        stops = [*levels, 0.0] if truncated else [0.0] * len(chain)
        counts = [
            t.stage.evaluations(s, stop_t=stop)
            for t, s, stop in zip(chain, samplers, stops, strict=True)
        ]
        return sum(counts), sum(
            n * _forward_flops(t.stage) for n, t in zip(counts, chain, strict=True)
        )

    def _as_costly(self, model: Trained, other: Row, seed: int) -> SamplerConfig:
        """The sampler of another row's first stage, with the steps by which it costs as much."""
        chain = [self.trained(m, seed) for m in other.models]
        samplers = [other.sampler_of(t.config.stage) for t in chain]
        _, wanted = self._cost(chain, samplers, other.aug_levels, truncated=other.truncated)
        sampler = samplers[0]
        _, per_step = self._cost([model], [sampler], [], truncated=False)
        steps = max(1, round(sampler.num_steps * wanted / per_step))
        return dataclasses.replace(sampler, num_steps=steps)

    def _of_peer(self, row: Row, seed: int, count: int) -> Samples:
        """Samples of diffusers' network, which another Python trains."""
        if self.torch_python is None:
            expected = "expected a Python with PyTorch and diffusers, for the table's peers"
            raise UserError(f"--torch_python is not given: {expected}")
        self.check_time()
        with tempfile.TemporaryDirectory() as temporary:
            images, output = (pathlib.Path(temporary, n) for n in ("images.npz", "samples.npz"))
            write_npz_whole(images, {"arr_0": self.images["train"].whole.images})
            flags = {
                "images": images,
                "output": output,
                "widths": ",".join(map(str, row.peer_widths)),
                "seconds": self.budget.seconds,
                "seed": seed,
                "num_samples": count,
                "num_steps": self.budget.peer_steps,
            }
            script = str(pathlib.Path(__file__).with_name("peer_torch.py"))
            command = [self.torch_python, script, *(f"--{k}={v}" for k, v in flags.items())]
            print(f"training {row.label['trained']}, {self.budget.seconds:g} s", flush=True)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise UserError(f"--torch_python={self.torch_python}: {lines[-1]}")
            print(f"  {done.stdout.strip()}", flush=True)
            return Samples(read_arrays(output)["arr_0"], None, self.budget.peer_steps)

    # Scores.

    def scores(self, samples: Samples, *, cas: bool, seed: int) -> Scores:
        """Distances and rates of samples in the features of a network trained on real images.

        `fd` is the Fréchet distance to the training images, `accuracy` the share of samples whose
        label the network recognises, `cas` the accuracy on real test images of the same network
        trained on the samples alone.
        """
        self.check_time()
        count = len(samples.images)
        found = self._evaluator.scores(samples.images, samples.labels)
        names = {"fd": "fid", **{n: n for n in ("precision", "recall", "is", "accuracy")}}
        scores = {
            name: found[key]
            for name, metric in names.items()
            if (key := metric_name(metric, self._evaluator.extractor.name, count)) in found
        }
        if cas and samples.labels is not None:
            self.check_time()
            task = dataclasses.replace(self.network.task, seed=seed)
            labels = samples.labels.astype(np.int32)
            made = classifier_training.train_classifier(
                task, LabelledImages(samples.images, labels), label="CAS"
            )
            test = self.images["val"].whole
            hits = Classifier(task, made).predictions(test.images) == test.labels
            scores["cas"] = float(hits.mean())
        return scores

    def neighbours(self, samples: Samples, picture: pathlib.Path | None) -> Scores:
        """Median distances of samples to their nearest real images, by pixels and by features.

        Training and held-out images are as many, so that neither are nearer by chance. Held-out
        images that are samples themselves are none of them. Pixels differ by a root mean square in
        grey levels. With a `picture`, the first samples and their nearest training images, of all
        of them, are drawn there.
        """
        self.check_time()
        held_out = self.images["val"].whole.images
        others = held_out[~_is_among(held_out, samples.images)]
        train = self.images["train"].whole.images
        some = np.random.default_rng(0).permutation(len(train))[: len(others)]

        def features(images: np.ndarray) -> np.ndarray:
            parts = range(0, len(images), 500)
            return np.concatenate([self.network(images[i : i + 500]).pooled for i in parts])

        def pixels(images: np.ndarray) -> np.ndarray:
            return images.reshape(len(images), -1).astype(np.float32)

        found: Scores = {}
        per_pixel = train[0].size  # the features are not averaged
        for name, of, scale in (("pixels", pixels, per_pixel), ("features", features, 1)):
            own = of(samples.images)
            for role, real in (("train", train[some]), ("held_out", others)):
                distances, _ = _nearest(own, of(real))
                found[f"{name}_{role}"] = float(np.median(distances) / np.sqrt(scale))
        if picture is not None:
            shown = samples.images[:10]
            rows = [("the first ten, not selected", shown)]
            for name, of in (("pixels", pixels), ("features", features)):
                _, nearest = _nearest(of(shown), of(train))
                rows.append((f"the nearest training image by {name}", train[nearest]))
            pictures.save_png(picture, pictures.labelled_rows(rows, scale=3))
        return found

    @cached_property
    def network(self) -> Classifier:
        """The network whose features measure; `accuracy` is that on held-out real images."""
        train, held_out = self.images["train"], self.images["val"]
        num_classes = int(train.whole.labels.max()) + 1
        how = dict(network=self.budget.network, num_classes=num_classes, mesh=self._mesh)
        task = Task(**how, seed=0, flip=self.config_of_data.data.random_flip)
        path = self._folder / f"{self.budget.network}.npz"
        return load_or_train(path, task, train.whole, held_out.whole)

    @cached_property
    def _evaluator(self) -> Evaluator:
        train, path = self.images["train"], self._folder / "reference.npz"
        origin = {"data": train.identity, "split": train.name, "crop": "none", "resize": "none"}
        wanted = {**origin, "features": self.network.identity}
        if path.exists():
            stored = reference_lib.read_reference(str(path), flag="workdir")
            if reference_lib.differing_field(stored, **wanted) is None:
                return Evaluator(self.network, {"train": stored}, classes=True)
        images = train.whole.images
        parts = (images[i : i + 500] for i in range(0, len(images), 500))
        reference = reference_lib.measure_reference(
            parts, self.network, num_images=len(images), label="reference", **origin
        )
        reference_lib.save_reference(path, reference)
        return Evaluator(self.network, {"train": reference}, classes=True)

    # The rest.

    def _batch(self, count: int) -> int:
        """Samples at a time: as many for every device."""
        return -(-min(self.budget.batch_size, count) // self._mesh.size) * self._mesh.size

    @cached_property
    def _folder(self) -> pathlib.Path:
        """Where what was made from these images is kept."""
        digest = hashlib.sha256(self.images["train"].identity.encode()).hexdigest()[:8]
        return self._root / digest

    @cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return build_mesh(self.config_of_data.mesh)

    @cached_property
    def config_of_data(self) -> RunConfig:
        """The config whose `data` section the images are read by."""
        return run_config_from(self._values(_DATA_CONFIG, {}))

    @cached_property
    def images(self) -> dict[str, Split]:
        """The real images by role, "train" and "val". Raises UserError if they are not there."""
        config = self.config_of_data
        splits = {"train": config.data.train_split, "val": config.data.eval_split}
        try:
            sources = load_splits(config.data, list(splits.values()), config.stage)
        except DataMissing as e:
            raise UserError(
                f"{e}; make it by `python -m cascaded_diffusion.prepare"
                f" --config=configs/{_DATA_CONFIG}.py`, or name a folder of images by"
                " --data_name=folder --data_path=PATH"
            ) from e
        return {
            role: Split(real_split(config, name, sources[name]), sources[name].identity)
            for role, name in splits.items()
        }

    def check_time(self) -> None:
        """Raises OutOfTime at the deadline."""
        if time.monotonic() > self._deadline:
            raise OutOfTime


class Split:
    """A split in memory, read when it is first needed."""

    def __init__(self, split: RealSplit, identity: str):
        self._split, self.identity, self.name = split, identity, split.split

    @cached_property
    def whole(self) -> LabelledImages:
        """All images at the data set's resolution."""
        return self._split.raw(range(len(self._split)))

    def some(self, count: int, resolution: int) -> LabelledImages:
        """`count` images chosen at random, the same every time; of too few, all in turn."""
        rows = np.random.default_rng(0).permutation(len(self._split))
        return self._split.rows(np.resize(rows, count), resolution)


def _without_a_model(kind: str, split: Split, count: int, seed: int) -> Samples:
    """Rows between which all others lie: real images, enlarged ones, noise."""
    size = split.whole.images.shape[1]
    real = split.some(count, size)
    if kind in ("real", "train"):
        return Samples(real.images, real.labels)
    if kind == "enlarged":
        low = split.some(count, size // 2)
        large = UPSAMPLERS["bilinear"](float_from_uint8(low.images), (size, size))
        return Samples(host_array(uint8_from_float(large)), low.labels)
    noise = np.random.default_rng(seed).normal(
        real.images.mean(), real.images.std(), real.images.shape
    )
    return Samples(noise.round().clip(0, 255).astype(np.uint8), real.labels)


def _is_among(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which of the images are among the others, bool [n]."""
    known = {x.tobytes() for x in others}
    return np.asarray([x.tobytes() in known for x in images])


def _nearest(points: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each point's distance to its nearest neighbour among the others, and which that is."""
    squares = np.square(others).sum(1)
    distances, which = [], []
    for i in range(0, len(points), 200):
        part = points[i : i + 200]
        nearest = (squares - 2 * part @ others.T).argmin(1)
        which.append(nearest)
        distances.append(np.linalg.norm(part - others[nearest], axis=1))
    return np.concatenate(distances), np.concatenate(which)


@cache
def _forward_flops(stage: Stage) -> float:
    return count_flops(stage.network.apply, *stage.shapes())


@cache
def _train_program(config: RunConfig, mesh: jax.sharding.Mesh) -> Callable:
    """The compiled step, which all seeds and rows of a config share."""
    stage = build_stage(config.stage)
    return step_lib.compile_train_step(
        stage,
        config.train,
        mesh,
        step_lib.abstract_state(stage, config.train, mesh),
        step_lib.record_shapes(config)["image_shape"],
    )

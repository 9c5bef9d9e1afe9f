"""Where rows are made: stages are trained for given FLOPs, or seconds, and sampled.

What takes long is kept in a folder and made once: trained stages and samples by a digest of
everything that decides them (config, seed, data, code), the network whose features measure
distances, and the statistics of the training images.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property, reduce

import jax
import numpy as np
from peers import check_python, samples_of_peer
from real_images import Data, Samples, Split, load_images, without_a_model
from scores import Scorer
from tables import Budget, Changes, Model, Row, Table

from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.cascade.cascade import Cascade
from cascaded_diffusion.cascade.stage import Stage
from cascaded_diffusion.commands import config_flags
from cascaded_diffusion.config.run_checks import run_config_from
from cascaded_diffusion.config.schema import RunConfig, SamplerConfig, ema_name, to_dict
from cascaded_diffusion.data.manifests import digest_of_json
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.features.inception_extractor import load_inception
from cascaded_diffusion.evaluation.samples import generate
from cascaded_diffusion.evaluation.samples.sample_store import (
    Arrays,
    DamagedBatchError,
    SampleStore,
)
from cascaded_diffusion.evaluation.settings import chain_of
from cascaded_diffusion.files.json_files import Record, read_record, write_json
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.whole import write_npz_whole
from cascaded_diffusion.networks import classifier as networks
from cascaded_diffusion.planning import plans
from cascaded_diffusion.runtime import pictures
from cascaded_diffusion.runtime.mesh import build_mesh
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.runtime.run_folder import RunFolder
from cascaded_diffusion.training import step as step_lib
from cascaded_diffusion.types import Params

ROOT = pathlib.Path(__file__).resolve().parents[2]
_REPORT_STEPS = 50  # between lines of progress, and looks at the clock
_STORE_SECS = 120  # between states that a training stores, to go on where it is killed
_TIMED_STEPS = 30  # by which the time of a step is measured
_SHOWN, _SHOWN_SIZE = 10, 96  # samples in a row of a picture, and pixels of one


class OutOfTime(Exception):
    """The minutes given are over."""


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
class Chain:
    """Trained stages in order of resolution, and how they are sampled."""

    stages: Sequence[Trained]
    samplers: Sequence[SamplerConfig]
    aug_levels: Sequence[float]  # of each stage that enlarges
    truncated: bool

    def cost(self) -> tuple[int, float]:
        """Network evaluations and FLOPs of one sample."""
        configs = [t.config for t in self.stages]
        section = dataclasses.replace(
            chain_of(configs),
            samplers=tuple(self.samplers),
            # A stage that enlarges given images has a level, but is a cascade of one.
            aug_levels=tuple(self.aug_levels[: len(configs) - 1]),
            truncated=self.truncated,
        )
        plan = plans.summed("", plans.cascade_plans(section, configs))
        return plan["calls_per_sample"], plan["flops_per_sample"]


class Lab:
    """Trains and samples for one data set and one budget.

    Args:
      budget: what a row may cost.
      table: whose configs are changed, and of which images.
      data: where the images are.
      folder: where trained networks are kept.
      made_by: program, device and versions; what others have made is made again.
      torch_python: a Python with PyTorch and diffusers, for the table that trains them.
      inception_weights: a file of FID's network, for the FID besides.
      deadline: on `time.monotonic`'s clock; what runs then raises `OutOfTime`.
    """

    def __init__(
        self,
        budget: Budget,
        table: Table,
        data: Data,
        folder: pathlib.Path,
        *,
        made_by: str,
        deadline: float,
        torch_python: str | None = None,
        inception_weights: str | None = None,
    ):
        self.torch_python = torch_python
        self._inception_weights = inception_weights
        self.budget, self._data, self._root, self._made_by = budget, data, folder, made_by
        self._table = table
        self._deadline = deadline
        self._files: dict[str, Record] = {}

    # Configs and their cost.

    def config(self, model: Model, seed: int, *, by_time: bool = False) -> RunConfig:
        """The model's config, trained for its share of the budget's FLOPs, or of its seconds."""
        values = self._values(model.config, dict(model.changes))
        values["train"]["seed"] = seed
        config = run_config_from(values)
        if by_time:
            seconds = self._seconds_of_step(config) / model.share
            steps = int(self.budget.seconds / seconds)
            if steps < self.budget.min_steps:
                raise UserError(
                    f"--seconds={self.budget.seconds:g}: expected at least"
                    f" {self.budget.min_steps * seconds:.3g}, in which {config.stage.name} is"
                    f" trained for {self.budget.min_steps} steps here"
                )
        else:
            steps = int(model.share * self.budget.flops / self._flops_of_step(config))
        return _with_train(config, train_steps=max(1, steps), warmup_steps=steps // 10)

    def _values(self, name: str, changes: Changes) -> Record:
        # Once, so that a file that is edited meanwhile changes no row.
        if name not in self._files:
            path = self.budget.file_of(name)
            self._files[name] = config_flags.load_config_file(ROOT / "configs", path)
        values = copy.deepcopy(self._files[name])
        for key, value in {**self._table.changes, **self.budget.changes, **changes}.items():
            *sections, last = key.split(".")
            reduce(dict.__getitem__, sections, values)[last] = value
        return self._data.applied(values)

    def _flops_of_step(self, config: RunConfig) -> float:
        plan = plans.stage_plan(config, config.stage.sampler)
        return plan["training_flops"] / config.train.train_steps

    def _seconds_of_step(self, config: RunConfig) -> float:
        """Seconds of an optimizer step here, measured once for all seeds."""
        config = _with_train(config, seed=0)
        digest = digest_of_json([to_dict(config.stage), to_dict(config.train), self._made_by])[:16]
        path = self._folder / "rates" / f"{config.stage.name}_{digest}.json"
        if not path.exists():
            config = _with_train(config, train_steps=_TIMED_STEPS, warmup_steps=0)
            self._train(config, build_stage(config.stage))  # the first time compiles
            start = time.monotonic()
            self._train(config, build_stage(config.stage))
            write_json(path, {"seconds": (time.monotonic() - start) / _TIMED_STEPS})
        return read_record(path, {"seconds": float})["seconds"]

    def check(self, rows: Sequence[Row]) -> None:
        """Raises UserError if the budget is too small for a row, or a peer's Python not given.

        What can be trained within given seconds is measured.
        """
        least = self.budget.min_steps
        needed = 0.0
        for row in rows:
            if row.images == "peer":
                check_python(self.torch_python)
            for model in row.models:
                if row.by_time:
                    self.config(model, 0, by_time=True)
                    continue
                step = self._flops_of_step(self.config(model, 0))
                needed = max(needed, least * step / model.share)
        if self.budget.flops < needed:
            raise UserError(
                f"--flops={self.budget.flops:g}: expected at least {needed:.3g}, by which every"
                f" stage of the table is trained for {least} steps"
            )

    # Training.

    def trained(self, model: Model, seed: int, *, by_time: bool = False) -> Trained:
        """A model at the end of its training, from the folder if it is there."""
        config = self.config(model, seed, by_time=by_time)
        about = [to_dict(config.stage), to_dict(config.train), config.data.random_flip]
        about += [self.images["train"].identity, self._made_by]
        digest = digest_of_json(about)[:16]
        path = self._folder / "models" / f"{config.stage.name}_{digest}.npz"
        stage = build_stage(config.stage)
        if not path.exists():
            part = path.with_suffix(".part")
            write_npz_whole(path, networks.flatten_params(self._train(config, stage, part)))
            part.unlink(missing_ok=True)
        return Trained(config, stage, networks.unflatten_params(read_arrays(path)), digest)

    def _train(
        self, config: RunConfig, stage: Stage, part: pathlib.Path | None = None
    ) -> dict[str, Params]:
        """Trains, and returns the averages at the end. Until then the state is stored in `part`."""
        train, images = config.train, self.images["train"].whole
        state = step_lib.init_state(stage, train, self._mesh)
        program = _train_program(_with_train(config, seed=0), self._mesh)
        flip = config.data.random_flip
        order = np.random.default_rng([train.seed, 1])
        label = f"{config.stage.name}, seed {train.seed}"
        progress = Progress(train.train_steps, unit="steps", label=label)
        rows = np.empty(0, np.int64)
        if part is not None and part.exists():
            state = _restored(part, state)
        first, stored = int(state.step), time.monotonic()
        for step in range(train.train_steps):
            while len(rows) < train.batch_size:
                rows = np.concatenate([rows, order.permutation(len(images.labels))])
            chosen, rows = np.split(rows, [train.batch_size])
            mirrored = order.random(len(chosen)) < 0.5 if flip else np.zeros(len(chosen), bool)
            if step < first:
                continue  # taken before; the order of the images goes on from here
            batch = images.images[chosen]
            batch[mirrored] = batch[mirrored, :, ::-1]
            records = {"image": batch, "label": images.labels[chosen]}
            records = {k: generate.put_batch(v, self._mesh) for k, v in records.items()}
            state, metrics = program(state, records)
            if (step + 1) % _REPORT_STEPS == 0 or step + 1 == train.train_steps:
                progress.update(step + 1, loss=f"{float(metrics['loss']):.4f}")
                if part is None or step + 1 == train.train_steps:
                    continue
                late = self._is_late()
                if late or time.monotonic() - stored >= _STORE_SECS:
                    write_npz_whole(part, _stored(state))
                    stored = time.monotonic()
                if late:
                    raise OutOfTime
        progress.close()
        loss = float(metrics["loss"])
        if not np.isfinite(loss):
            raise UserError(f"{label}: the loss is {loss}, expected a number")
        return jax.device_get(state.ema_params)

    # Sampling.

    def samples(self, row: Row, seed: int) -> Samples:
        """The images that a row is about."""
        count = self.budget.num_samples if row.num_samples is None else row.num_samples
        if row.images == "peer":
            self.check_time()
            return samples_of_peer(
                row,
                self.budget,
                self.images["train"].whole.images,
                torch_python=self.torch_python,
                seed=seed,
                count=count,
            )
        if not row.models:
            return without_a_model(row.images, self.images, count, seed)
        chain = self._chain(row, seed)
        if row.images == "real_low_res":
            return self._enlarged(chain, seed, count)
        below = None
        if len(chain.stages) > 1 and not chain.truncated:
            below = self._below(chain, seed, count)
        images = self._sampled(chain, below, seed, count)
        num_classes = chain.stages[-1].config.stage.num_classes
        labels = generate.labels_of(np.arange(count), num_classes) if num_classes else None
        return Samples(images, labels, *chain.cost())

    def shown(self, rows: Sequence[Row]) -> np.ndarray:
        """A picture of the first samples of rows above one base model, and of what that made."""
        first = [dataclasses.replace(row, num_samples=_SHOWN) for row in rows]
        below = dataclasses.replace(first[0], models=first[0].models[:1], aug_levels=())
        captions = ["; ".join(f"{k}: {v}" for k, v in row.label.items()) for row in first]
        strips = list(zip(captions, (self.samples(row, 0).images for row in first), strict=True))
        small, size = self.samples(below, 0).images, strips[0][1].shape[1]
        enlarged = small.repeat(size // small.shape[1], 1).repeat(size // small.shape[2], 2)
        rows = [("the base model's samples", enlarged), *strips]
        return pictures.labelled_rows(rows, scale=max(1, _SHOWN_SIZE // size))

    def _chain(self, row: Row, seed: int) -> Chain:
        stages = [self.trained(model, seed, by_time=row.by_time) for model in row.models]
        stages[0] = dataclasses.replace(stages[0], ema_decay=row.base_ema)
        samplers = [row.sampler_of(t.config.stage) for t in stages]
        chain = Chain(stages, samplers, row.aug_levels, row.truncated)
        if row.as_costly_as is None:
            return chain
        # The sampler of the other row's first stage, with the steps by which it costs as much.
        other = self._chain(row.as_costly_as, seed)
        sampler = other.samplers[0]
        chain = dataclasses.replace(chain, samplers=[sampler])
        steps = max(1, round(sampler.num_steps * other.cost()[1] / chain.cost()[1]))
        return dataclasses.replace(chain, samplers=[dataclasses.replace(sampler, num_steps=steps)])

    def _below(self, chain: Chain, seed: int, count: int) -> np.ndarray:
        """Samples of all stages but the last, which many rows enlarge."""
        lower = dataclasses.replace(
            chain,
            stages=chain.stages[:-1],
            samplers=chain.samplers[:-1],
            aug_levels=chain.aug_levels[:-1],
        )
        return self._sampled(lower, None, seed, count)

    def _sampled(self, chain: Chain, below: np.ndarray | None, seed: int, count: int) -> np.ndarray:
        """Samples of the last stage, where the stages before it made `below` if that is given."""
        sample = generate.make_cascade_sampler(
            Cascade(
                stages=[t.stage for t in chain.stages],
                samplers=chain.samplers,
                truncated=chain.truncated,
            ),
            chain.aug_levels,
            seed=seed,
            mesh=self._mesh,
            below=below,
            first=0 if below is None else len(chain.stages) - 1,
        )
        params = [t.params for t in chain.stages]
        names = " > ".join(t.config.stage.name for t in chain.stages)
        label = f"samples of {names}, seed {seed}"
        return self._generate(lambda rows: sample(params, rows)[-1], chain, seed, count, label)

    def _enlarged(self, chain: Chain, seed: int, count: int) -> Samples:
        """Enlargements of real images."""
        (top,), (sampler,), (level,) = chain.stages, chain.samplers, chain.aug_levels
        held_out = self.images["val"]
        low_res = held_out.some(count, top.config.stage.low_res_resolution)
        enlarge = generate.make_enlarger(
            top.stage, low_res, sampler=sampler, seed=seed, mesh=self._mesh
        )
        label = f"{top.config.stage.name} on real images, seed {seed}"
        images = self._generate(
            lambda rows: enlarge(top.params, rows, level), chain, seed, count, label
        )
        return Samples(images, low_res.labels, *chain.cost(), made_of=held_out.chosen(count))

    def _generate(
        self,
        sample: Callable[[np.ndarray], jax.Array],
        chain: Chain,
        seed: int,
        count: int,
        label: str,
    ) -> np.ndarray:
        """Images by their indices, batch by batch from a store, which is filled where it is not."""

        def make(rows: np.ndarray) -> Arrays:
            self.check_time()
            return {"images": np.asarray(sample(rows))}

        made_by = [(t.digest, t.ema_decay) for t in chain.stages]
        how = (label, made_by, chain.samplers, chain.aug_levels, chain.truncated, seed)
        store = SampleStore(
            self._folder / "samples",
            {"how": repr(how), "real": self.images["val"].identity},
            num_samples=count,
            batch_size=min(self.budget.batch_size, count),
        )
        generate.fill(store, make, label=label, devices=self._mesh.size)
        try:
            return np.concatenate([batch["images"] for batch in store.batches()])
        except DamagedBatchError as e:
            raise UserError(str(e)) from e

    # The rest.

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
        return run_config_from(self._values(self._table.images, {}))

    @cached_property
    def images(self) -> dict[str, Split]:
        """The real images by role, "train" and "val"."""
        raw = "data.prepared_dir" in self._table.changes
        return load_images(self.config_of_data, prepared_by=None if raw else self._table.images)

    @cached_property
    def scorer(self) -> Scorer:
        """What measures samples."""
        config = self.config_of_data
        at_size = dataclasses.replace(config.stage, resolution=config.data.resolution)
        weights, inception = self._inception_weights, None
        if weights is not None:
            inception = load_inception(
                weights, resize=config.eval.resize or "legacy", mesh=self._mesh
            )
        return Scorer(
            dataclasses.replace(config, stage=at_size),
            self.images,
            network=self.budget.network,
            folder=RunFolder(self._folder),
            mesh=self._mesh,
            check_time=self.check_time,
            inception=inception,
        )

    def check_time(self) -> None:
        """Raises OutOfTime at the deadline."""
        if self._is_late():
            raise OutOfTime

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline


def _with_train(config: RunConfig, **values: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **values))


def _without_key(state: step_lib.TrainState) -> step_lib.TrainState:
    """What steps change: the key is that of the seed."""
    return dataclasses.replace(state, key=None)


def _stored(state: step_lib.TrainState) -> dict[str, np.ndarray]:
    """A state as arrays of a file."""
    leaves = jax.device_get(jax.tree.leaves(_without_key(state)))
    return {f"arr_{i}": leaf for i, leaf in enumerate(leaves)}


def _restored(path: pathlib.Path, state: step_lib.TrainState) -> step_lib.TrainState:
    """The state that `_stored` made of one that began as `state`."""
    arrays = read_arrays(path)
    leaves, tree = jax.tree.flatten(_without_key(state))
    values = [jax.device_put(arrays[f"arr_{i}"], x.sharding) for i, x in enumerate(leaves)]
    return dataclasses.replace(jax.tree.unflatten(tree, values), key=state.key)


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

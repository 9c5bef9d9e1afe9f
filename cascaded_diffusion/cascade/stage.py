"""A stage: one diffusion model of the cascade, as pure functions of its parameters."""

import dataclasses
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from cascaded_diffusion.cascade import augment
from cascaded_diffusion.cascade.pixels import area_downsample, quantized
from cascaded_diffusion.cascade.sampler import AnySampler, step_of
from cascaded_diffusion.config.schema import SamplerConfig, StageConfig
from cascaded_diffusion.diffusion import (
    bound,
    gaussian,
    grids,
    guidance,
    losses,
    samplers,
    schedules,
)
from cascaded_diffusion.networks.kernels.execution import Execution
from cascaded_diffusion.networks.unet import Network
from cascaded_diffusion.types import Batch, Conditioning, DenoiseFn, Params, Prediction, Schedule

Loss = tuple[jax.Array, dict[str, jax.Array]]  # the loss, and scalars to log by name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisedBatch:
    """A training batch with everything that was drawn for it. Every leaf is [B, ...]."""

    x0: jax.Array  # [B, H, W, C] the targets
    eps: jax.Array  # [B, H, W, C] their noise
    t: jax.Array  # [B] their times
    cond: Conditioning
    rows: jax.Array  # [B] int32, each example's row in the global batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One diffusion model, made by `build.build_stage`. It holds no parameters.

    `augment` says how the low-res input is damaged; it is None for a base model.

        stage = cd.build_stage(config.stage)
        params = stage.init(jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), 2)
        images = stage.sample(params, keys, label=jnp.array([3, 7]))  # [2, H, W, C] float32
    """

    config: StageConfig
    schedule: Schedule
    network: Network
    augment: augment.Augment | None

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters. Pure, so it can run under `jit` or `eval_shape`."""
        return self.network.init(key, *self.example_inputs(batch_size=1))

    def example_inputs(self, batch_size: int) -> tuple[jax.Array, jax.Array, Conditioning]:
        """(xt, logsnr, conditioning) of the right shapes and dtypes; all zeros."""
        config, scalars = self.config, jnp.zeros(batch_size)

        def images(size: int) -> jax.Array:
            return jnp.zeros((batch_size, size, size, config.channels))

        cond = Conditioning(
            label=jnp.zeros(batch_size, jnp.int32) if config.num_classes else None,
            low_res=None if self.augment is None else images(config.low_res_resolution),
            aug_level=scalars if config.has_aug_level else None,
        )
        return images(config.resolution), scalars, cond

    def shapes(self) -> tuple[Params, jax.Array, jax.Array, Conditioning]:
        """The shapes of what `network.apply` takes for one image: parameters, then inputs."""
        params = jax.eval_shape(self.init, jax.random.key(0))
        return params, *jax.eval_shape(lambda: self.example_inputs(batch_size=1))

    def target_from(self, image: jax.Array) -> jax.Array:
        """What this stage should generate, [B, H, W, C], from data of that size or larger."""
        return quantized(area_downsample(image, self.config.resolution))

    def low_res_from(self, image: jax.Array) -> jax.Array:
        """The clean low-res input [B, h, w, C] from data: the target of the stage below."""
        return quantized(area_downsample(image, self.config.low_res_resolution))

    def with_execution(self, execution: Execution) -> Self:
        """The same stage, whose network is computed as `execution` says."""
        return dataclasses.replace(self, network=self.network.with_execution(execution))

    def loss(self, params: Params, batch: Batch, key: jax.Array) -> Loss:
        """The training loss (paper, algorithm 1), averaged over the global batch.

        The images of `batch` have any resolution from this stage's upwards; `key` is the step's,
        so noise is a function of (seed, step, row).
        """
        return self.loss_of(params, self.noised(batch, key), key)

    def noised(self, batch: Batch, key: jax.Array) -> NoisedBatch:
        """Draws everything for a batch, which `loss_of` may then be given in parts."""
        t_key, eps_key, damage_key, drop_key, _ = jax.random.split(key, 5)
        config = self.config
        x0 = self.target_from(batch.image)
        batch_size = x0.shape[0]
        t = losses.uniform_t(t_key, (batch_size,), num_timesteps=config.schedule.discrete_timesteps)
        eps = jax.random.normal(eps_key, x0.shape)

        label = batch.label if config.num_classes else None
        drop_prob = config.diffusion.label_dropout_prob
        if label is not None and drop_prob > 0:
            dropped = jax.random.bernoulli(drop_key, drop_prob, (batch_size,))
            label = jnp.where(dropped, config.null_label, label)
        cond = Conditioning(label=label)
        if self.augment is not None:
            low_res = self.low_res_from(batch.image) if batch.low_res is None else batch.low_res
            damage = self.augment.for_training(damage_key, low_res.shape)
            cond = augment.condition(low_res, damage, label=label)
        return NoisedBatch(x0=x0, eps=eps, t=t, cond=cond, rows=jnp.arange(batch_size))

    def loss_of(self, params: Params, noised: NoisedBatch, key: jax.Array) -> Loss:
        """The loss of a batch or of some of its rows, averaged over them.

        `noised` comes from `self.noised` with the same `key`, this step's.
        """
        means = {k: jnp.mean(x) for k, x in self.losses_of(params, noised, key).items()}
        return means["loss"], means

    def losses_of(
        self, params: Params, noised: NoisedBatch, key: jax.Array
    ) -> dict[str, jax.Array]:
        """What `loss_of` averages: the loss and, if it has several, its parts, name -> [B]."""
        logsnr = self.schedule(noised.t)
        xt = gaussian.diffuse(noised.x0, logsnr, noised.eps)
        *_, dropout_key = jax.random.split(key, 5)  # the others are those of `noised`
        if self.config.network.dropout_rate == 0:
            dropout_key = None
        output = self.network.apply(
            params, xt, logsnr, noised.cond, dropout_key=dropout_key, rows=noised.rows
        )
        return self._losses(output, xt, logsnr, noised)

    def _losses(
        self, output: jax.Array, xt: jax.Array, logsnr: jax.Array, noised: NoisedBatch
    ) -> dict[str, jax.Array]:
        """The same, from the network's output."""
        diffusion, x0 = self.config.diffusion, noised.x0
        steps = self.config.schedule.discrete_timesteps
        simple = losses.simple_loss(
            output[..., : x0.shape[-1]],
            x0,
            logsnr,
            noised.eps,
            parameterization=diffusion.parameterization,
            weighting=diffusion.weighting,
            slope=schedules.slope_of(self.schedule, noised.t, num_timesteps=steps),
        )
        if diffusion.loss == "simple":
            return {"loss": simple}
        num_timesteps = self.config.schedule.num_timesteps
        last_times = np.asarray([2.0, 1.0, 0.0]) / num_timesteps
        kind = "learned" if diffusion.variance == "learned" else "small"
        prediction = self._prediction(output, xt, logsnr)
        if diffusion.loss == "hybrid":
            prediction = bound.mean_detached(prediction)
        term = bound.vlb_term(
            prediction,
            x0,
            xt,
            self.schedule(noised.t - 1.0 / num_timesteps),
            logsnr,
            log_variance=samplers.make_log_variance(kind),
            # Half a step of margin: t is a multiple of 1 / T up to rounding.
            is_first=noised.t < 1.5 / num_timesteps,
            min_logvar=bound.second_step_logvar(self.schedule, last_times),
        )
        vlb = num_timesteps * term
        loss = vlb if diffusion.loss == "vlb" else simple + diffusion.vlb_weight * vlb
        return {"loss": loss, "loss_simple": simple, "loss_vlb": vlb}

    def _prediction(self, output: jax.Array, xt: jax.Array, logsnr: jax.Array) -> Prediction:
        return gaussian.prediction_from_output(
            output, xt, logsnr, parameterization=self.config.diffusion.parameterization
        )

    def denoise_fn(self, params: Params, cond: Conditioning, sampler: AnySampler) -> DenoiseFn:
        """The network as samplers see it, guided and thresholded as `sampler` says."""

        def denoise(cond: Conditioning, xt: jax.Array, logsnr: jax.Array) -> Prediction:
            return self._prediction(self.network.apply(params, xt, logsnr, cond), xt, logsnr)

        unconditional = cond
        if cond.label is not None:
            null = jnp.full_like(cond.label, self.config.null_label)
            unconditional = dataclasses.replace(cond, label=null)
        low_t, high_t = sampler.guidance_interval
        everywhere = (low_t, high_t) == (0.0, 1.0)
        guided = guidance.classifier_free(
            partial(denoise, cond),
            partial(denoise, unconditional),
            sampler.guidance_scale,
            logsnr_range=None if everywhere else (self.schedule(high_t), self.schedule(low_t)),
        )
        return guidance.with_threshold(guided, sampler.threshold, sampler.threshold_percentile)

    def time_grid(self, sampler: AnySampler) -> np.ndarray:
        """The times that a sampler visits, [num_steps + 1] from 1 down to 0."""
        steps = self.config.schedule.discrete_timesteps
        return grids.time_grid(
            sampler.grid, sampler.num_steps, schedule=self.schedule, discrete_timesteps=steps
        )

    def evaluations(self, sampler: SamplerConfig, *, stop_t: float = 0.0) -> int:
        """How many network evaluations one sample takes; a guided one counts twice."""
        at = samplers.evaluation_times(sampler.name, self.time_grid(sampler), stop_t)
        low, high = sampler.guidance_interval
        guided = (low <= at) & (at <= high) if sampler.guidance_scale != 1.0 else at < 0
        return len(at) + int(guided.sum())

    def _conditioning(
        self,
        keys: jax.Array,
        label: jax.Array | None,
        low_res: jax.Array | None,
        aug_level: jax.Array | float | None,
        already_noisy: bool = False,
    ) -> Conditioning:
        if self.augment is None:
            return Conditioning(label=label)
        damage = self.augment.for_sampling(keys, low_res.shape, aug_level)
        return augment.condition(low_res, damage, label=label, already_noisy=already_noisy)

    def sample(
        self,
        params: Params,
        keys: jax.Array,
        *,
        label: jax.Array | None = None,
        low_res: jax.Array | None = None,
        aug_level: jax.Array | float | None = None,
        low_res_is_noisy: bool = False,
        stop_t: jax.Array | float = 0.0,
        sampler: AnySampler | None = None,
    ) -> jax.Array:
        """One image per key, [B, H, W, C] float32: in [-1, 1] if the sampler clips.

        Args:
          keys: [B] typed PRNG keys. An image depends on its own key alone.
          label: [B] class labels.
          low_res: [B, h, w, C] images to enlarge, clean unless `low_res_is_noisy`, that is from a
            chain truncated at `aug_level`.
          aug_level: strength of the conditioning augmentation, scalar; may be traced.
          stop_t: where to stop this stage's own chain; the image is then noisy. May be traced.
          sampler: overrides the stage's own sampler.
        """
        config, sampler = self.config, sampler or self.config.sampler
        xt_keys, step_keys, low_res_keys = (samplers.fold_in_each(keys, n) for n in range(3))
        cond = self._conditioning(low_res_keys, label, low_res, aug_level, low_res_is_noisy)
        image_shape = (config.resolution, config.resolution, config.channels)
        return samplers.sample(
            self.denoise_fn(params, cond, sampler),
            samplers.normal_per_image(xt_keys, image_shape),
            step_keys,
            schedule=self.schedule,
            step=step_of(sampler),
            times=self.time_grid(sampler),
            stop_t=augment.nearest_level(stop_t, config.schedule.discrete_timesteps),
        )

    def bits_per_dim(
        self,
        params: Params,
        keys: jax.Array,
        image: jax.Array,
        *,
        sampler: SamplerConfig,
        label: jax.Array | None = None,
        low_res: jax.Array | None = None,
        aug_level: jax.Array | float | None = None,
    ) -> jax.Array:
        """The variational bound of real images under this stage, [B] bits per dimension.

        For a super-resolution stage it is the bound of the image given its damaged low-res
        version, by default made from the image. There is no guidance, and x0 is kept in [-1, 1].
        `image` [B, H', W', C] has any resolution from this stage's upwards; `sampler` is an
        ancestral chain. The other arguments are those of `sample`.
        """
        if self.augment is not None and low_res is None:
            low_res = self.low_res_from(image)
        cond = self._conditioning(samplers.fold_in_each(keys, 0), label, low_res, aug_level)
        plain = dataclasses.replace(sampler, guidance_scale=1.0, threshold="static")
        log_variance = samplers.make_log_variance(sampler.variance, sampler.variance_interpolation)
        return bound.bits_per_dim(
            self.denoise_fn(params, cond, plain),
            self.target_from(image),
            samplers.fold_in_each(keys, 1),
            schedule=self.schedule,
            times=self.time_grid(sampler),
            log_variance=log_variance,
        )

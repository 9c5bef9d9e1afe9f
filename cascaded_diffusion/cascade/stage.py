"""A stage: one diffusion model of the cascade, as pure functions of its parameters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from cascaded_diffusion.cascade import resize
from cascaded_diffusion.cascade.augment import Augment, GaussianAugment, NoAugment, low_res_noise
from cascaded_diffusion.config import SamplerConfig, StageConfig
from cascaded_diffusion.diffusion import gaussian, guidance, losses, samplers
from cascaded_diffusion.diffusion.schedules import SCHEDULES
from cascaded_diffusion.networks.unet import Network, UNet
from cascaded_diffusion.types import Batch, Conditioning, DenoiseFn, Params, Prediction, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One diffusion model. Holds no parameters.

    Attributes:
      config: the stage's config section.
      schedule: its forward process.
      network: its network.
      augment: how its low-res input is damaged; None for a base model.
    """

    config: StageConfig
    schedule: Schedule
    network: Network
    augment: Augment | None

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters. Pure, so that it can run under `jit` or `eval_shape`."""
        config = self.config
        label = jnp.zeros((1,), jnp.int32) if config.num_classes else None
        cond = Conditioning(label=label)
        if self.augment is not None:
            size = config.low_res_resolution
            low_res = jnp.zeros((1, size, size, config.channels))
            level = jnp.zeros((1,)) if self.augment.has_level else None
            cond = self.augment.condition(low_res, level, low_res, label=label)
        xt = jnp.zeros((1, config.resolution, config.resolution, config.channels))
        return self.network.init(key, xt, jnp.zeros((1,)), cond)

    def low_res_from(self, image: jax.Array) -> jax.Array:
        """The clean low-res input [B, h, w, C] that belongs to data [B, H, W, C]."""
        return resize.area_resize(image, self.config.low_res_resolution)

    def loss(
        self, params: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The training loss (paper, algorithm 1), averaged over the global batch.

        Args:
          params: the network's parameters.
          batch: images at any resolution from this stage's upwards.
          key: the key of this step: noise is a function of (seed, step, row).

        Returns:
          The scalar loss, and a dict of scalars to log.
        """
        t_key, eps_key, level_key, low_res_key, drop_key, dropout_key = jax.random.split(key, 6)
        config = self.config
        x0 = resize.area_resize(batch.image, config.resolution)
        batch_size = x0.shape[0]

        t = losses.uniform_t(t_key, (batch_size,), num_timesteps=config.diffusion.num_timesteps)
        logsnr = self.schedule(t)
        eps = jax.random.normal(eps_key, x0.shape)
        xt = gaussian.diffuse(x0, logsnr, eps)

        label = batch.label if config.num_classes else None
        drop_prob = config.diffusion.label_dropout_prob
        if label is not None and drop_prob > 0:
            dropped = jax.random.bernoulli(drop_key, drop_prob, (batch_size,))
            label = jnp.where(dropped, config.null_label, label)
        cond = Conditioning(label=label)
        if self.augment is not None:
            low_res = self.low_res_from(batch.image)
            cond = self.augment.condition(
                low_res,
                self.augment.training_level(level_key, batch_size),
                jax.random.normal(low_res_key, low_res.shape),
                label=label,
            )

        output = self.network.apply(
            params,
            xt,
            logsnr,
            cond,
            dropout_key=dropout_key if config.network.dropout_rate > 0 else None,
        )
        per_example = losses.simple_loss(
            output, x0, logsnr, eps, parameterization=config.diffusion.parameterization
        )
        loss = jnp.mean(per_example)
        return loss, {"loss": loss}

    def denoise_fn(self, params: Params, cond: Conditioning, sampler: SamplerConfig) -> DenoiseFn:
        """The network as samplers see it, guided and clipped as `sampler` says."""

        def with_conditioning(cond: Conditioning) -> DenoiseFn:
            def denoise(xt: jax.Array, logsnr: jax.Array) -> Prediction:
                output = self.network.apply(params, xt, logsnr, cond)
                return gaussian.prediction_from_output(
                    output, xt, logsnr, parameterization=self.config.diffusion.parameterization
                )

            return denoise

        unconditional = cond
        if cond.label is not None:
            null = jnp.full_like(cond.label, self.config.null_label)
            unconditional = dataclasses.replace(cond, label=null)
        guided = guidance.classifier_free(
            with_conditioning(cond), with_conditioning(unconditional), sampler.guidance_scale
        )
        return guidance.with_clipping(guided) if sampler.clip else guided

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
        sampler: SamplerConfig | None = None,
    ) -> jax.Array:
        """Generates one image per key.

        Args:
          params: the network's parameters (the EMA, usually).
          keys: [B] typed PRNG keys. An image depends on its own key alone.
          label: [B] class labels.
          low_res: [B, h, w, C] images to enlarge, clean unless `low_res_is_noisy`.
          aug_level: strength of the conditioning augmentation, scalar; may be traced.
          low_res_is_noisy: `low_res` comes from a chain truncated at `aug_level`.
          stop_t: truncate this stage's own chain here and return the noisy image.
          sampler: overrides the stage's own sampler settings.

        Returns:
          [B, H, W, C] float32: in [-1, 1] if the sampler clips and stop_t is 0.
        """
        config = self.config
        sampler = config.sampler if sampler is None else sampler
        batch_size = keys.shape[0]
        xt_keys, step_keys, low_res_keys = (
            jax.vmap(lambda key, n=n: jax.random.fold_in(key, n))(keys) for n in range(3)
        )
        cond = Conditioning(label=label)
        if self.augment is not None:
            level = None
            if self.augment.has_level:
                value = 0.0 if aug_level is None else aug_level
                level = jnp.full((batch_size,), value, jnp.float32)
            cond = self.augment.condition(
                low_res,
                level,
                low_res_noise(low_res_keys, low_res),
                label=label,
                already_noisy=low_res_is_noisy,
            )
        image_shape = (config.resolution, config.resolution, config.channels)
        return samplers.sample(
            self.denoise_fn(params, cond, sampler),
            samplers.normal_per_image(xt_keys, image_shape),
            step_keys,
            schedule=self.schedule,
            transition=samplers.SAMPLERS[sampler.name],
            num_steps=sampler.num_steps,
            stop_t=stop_t,
        )


def build_stage(config: StageConfig) -> Stage:
    """The stage that a config section describes."""
    augment: Augment | None = None
    if config.low_res_resolution is not None:
        augment = NoAugment()
        if config.augment.name == "gaussian":
            augment = GaussianAugment(
                schedule=SCHEDULES[config.augment.schedule](),
                num_timesteps=config.augment.num_timesteps,
            )
    network = config.network
    module = UNet(
        out_channels=config.channels,
        num_classes=config.num_classes,
        channels=network.channels,
        channel_mults=network.channel_mults,
        num_res_blocks=network.num_res_blocks,
        attention_resolutions=network.attention_resolutions,
        num_heads=network.num_heads,
        dropout_rate=network.dropout_rate,
        patch_size=network.patch_size,
        resample=network.resample,
        aug_level_input=augment is not None and augment.has_level,
        upsample=None if augment is None else resize.UPSAMPLERS[network.upsample],
        dtype=jnp.dtype(network.dtype),
    )
    return Stage(
        config=config,
        schedule=SCHEDULES[config.diffusion.schedule](),
        network=Network(module=module),
        augment=augment,
    )

"""Training a classifier by its recipe, on labelled images, over the mesh.

Images without labels are classified by rotation: each is turned by 0, 90, 180 or 270 degrees, and
the turn is its label (Gidaris et al. 2018, "Unsupervised Representation Learning by Predicting
Image Rotations").

The batch is split over all devices. Its images are a function of (seed, step); how they are
shifted, cropped, flipped and turned is a function of (seed, step, row).
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.networks import classifier as networks
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.progress import Progress
from cascaded_diffusion.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained."""

    epochs: int  # over the training images
    batch_size: int  # global; less if there are fewer images
    learning_rate: float  # the peak, from which it falls to 0 along a cosine
    warmup_epochs: float  # of a linear rise before the peak
    optimizer: str  # "adamw", or "sgd" with Nesterov's momentum of 0.9
    weight_decay: float  # "sgd" applies it to kernels alone
    crop: str  # of `_CROPS`


RECIPES: dict[str, Recipe] = {
    "small": Recipe(
        epochs=14, batch_size=64, learning_rate=2e-3, warmup_epochs=0.0,
        optimizer="adamw", weight_decay=1e-3, crop="shift",
    ),
    "resnet": Recipe(
        epochs=15, batch_size=64, learning_rate=3e-3, warmup_epochs=1.0,
        optimizer="adamw", weight_decay=1e-2, crop="shift",
    ),
    # The usual ImageNet recipe: 90 epochs, 0.1 per 256 images of a batch.
    "resnet50": Recipe(
        epochs=90, batch_size=1024, learning_rate=0.4, warmup_epochs=5.0,
        optimizer="sgd", weight_decay=1e-4, crop="resized",
    ),
}  # fmt: skip
# The network whose classes are rotations, by 0, 90, 180 and 270 degrees.
ROTATION, NUM_TURNS = "rotation", 4
RECIPES[ROTATION] = RECIPES["small"]  # the same network
_State = tuple[networks.Variables, optax.OptState]
# A share of the image's size: 2 px of 32.
_SHIFT_FRACTION = 1 / 16
_SMALLEST_AREA, _ASPECTS = 0.08, (3 / 4, 4 / 3)


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Images: uint8 [n, H, W, C] and int32 labels [n]."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, and where."""

    network: str  # its name in `networks.classifier.CLASSIFIERS`
    num_classes: int  # of the data; rotations do not depend on them
    seed: int  # of weights, order and augmentation
    mesh: Mesh
    flip: bool = False  # whether a mirrored image is of the same class

    @property
    def module(self) -> networks.Module:
        """The network."""
        num_classes = NUM_TURNS if self.network == ROTATION else self.num_classes
        return networks.CLASSIFIERS[self.network](num_classes=num_classes)


def _shifted(image: jax.Array, key: jax.Array) -> jax.Array:
    """Moves an image by up to a sixteenth and repeats its border."""
    shift = round(image.shape[0] * _SHIFT_FRACTION)
    padded = jnp.pad(image, ((shift, shift), (shift, shift), (0, 0)), mode="edge")
    offset = jax.random.randint(key, (2,), 0, 2 * shift + 1)
    return jax.lax.dynamic_slice(padded, (offset[0], offset[1], 0), image.shape)


def _cropped(image: jax.Array, key: jax.Array) -> jax.Array:
    """A random part of 8 to 100 % of the area, enlarged to the whole, as is usual for photos."""
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    size = jnp.asarray(image.shape[:2], jnp.float32)
    area = jax.random.uniform(area_key, minval=_SMALLEST_AREA, maxval=1.0)
    low, high = jnp.log(jnp.asarray(_ASPECTS))
    aspect = jnp.exp(jax.random.uniform(aspect_key, minval=low, maxval=high))
    part = jnp.minimum(jnp.sqrt(area * jnp.stack([aspect, 1 / aspect])), 1.0)
    start = jax.random.uniform(place_key, (2,)) * (1 - part) * size
    return jax.image.scale_and_translate(
        image, image.shape, (0, 1), 1 / part, -start / part, "linear", antialias=False
    )


_CROPS = {"shift": _shifted, "resized": _cropped}


def _augmented(images: jax.Array, keys: jax.Array, *, crop: str, flip: bool) -> jax.Array:
    def augment(image: jax.Array, key: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(key)
        image = _CROPS[crop](image, crop_key)
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image

    return jax.vmap(augment)(images, keys)


def turned(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Square images [B, H, H, C], each turned `turns` [B] times by 90 degrees."""
    ways = [partial(jnp.rot90, k=k) for k in range(NUM_TURNS)]
    return jax.vmap(lambda image, k: jax.lax.switch(k, ways, image))(images, turns)


def _optimizer(recipe: Recipe, total: int, warmup: int) -> optax.GradientTransformation:
    peak = recipe.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, total)
    if recipe.optimizer == "adamw":
        return optax.adamw(schedule, weight_decay=recipe.weight_decay)
    decay = optax.add_decayed_weights(
        recipe.weight_decay, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    )
    return optax.chain(decay, optax.sgd(schedule, momentum=0.9, nesterov=True))


def batch_size_for(task: Task, num_images: int) -> int:
    """The recipe's batch size, or less if there are fewer images; a multiple of the devices.

    Raises UserError if there are fewer images than devices.
    """
    devices = task.mesh.size
    size = min(RECIPES[task.network].batch_size, num_images) // devices * devices
    if not size:
        wanted = f"expected at least {devices}, one for each device"
        raise UserError(f"a classifier of {num_images} training images: {wanted}")
    return size


@cache
def _programs(
    task: Task, recipe: Recipe, shape: tuple[int, ...], batch_size: int, total: int, warmup: int
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """Initialization and step, compiled once for all seeds and images of a shape."""
    module, everywhere = task.module, mesh_lib.replicated(task.mesh)
    optimizer = _optimizer(recipe, total, warmup)

    @partial(jax.jit, out_shardings=everywhere)
    def init(key: jax.Array) -> _State:
        variables = networks.init_classifier(module, key, (1, *shape))
        return variables, optimizer.init(variables["params"])

    @partial(jax.jit, donate_argnums=0, out_shardings=everywhere)
    def train_step(
        state: _State, images: jax.Array, labels: jax.Array | None, key: jax.Array, step: jax.Array
    ) -> tuple[_State, jax.Array]:
        variables, opt_state = state
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, step))
        keys = jax.vmap(partial(jax.random.fold_in, augment_key))(jnp.arange(batch_size))
        x = _augmented(float_from_uint8(images), keys, crop=recipe.crop, flip=task.flip)
        if labels is None:
            turn_key = jax.random.fold_in(augment_key, batch_size)
            labels = jax.random.randint(turn_key, (batch_size,), 0, NUM_TURNS)
            x = turned(x, labels)

        def loss_of(params: Params) -> tuple[jax.Array, networks.Variables]:
            how = dict(train=True, rngs={"dropout": dropout_key}, mutable=["batch_stats"])
            (_, logits), updated = module.apply({**variables, "params": params}, x, **how)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated

        (loss, updated), grads = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **updated, "params": params}, opt_state), loss

    return init, train_step


def train_classifier(
    task: Task,
    train: LabelledImages,
    *,
    train_steps: int | None = None,
    batch_size: int | None = None,
    label: str = "classifier",
) -> networks.Variables:
    """Trains a network and returns its variables, on the host. Rotations need no labels.

    By default the number of epochs and the batch size are the recipe's. `label` is for messages.
    Raises UserError if the images are all of one class, or fewer than the devices, or if the loss
    is not finite in the end.
    """
    images, labels = train.images, None if task.network == ROTATION else train.labels
    if labels is not None and len(np.unique(labels)) < 2:
        found = f"all {len(labels)} training images are of one class"
        raise UserError(f"{label}: {found}, expected at least 2 classes to tell apart")
    recipe, split = RECIPES[task.network], mesh_lib.batch_sharding(task.mesh)
    init_key, order_key, run_key = jax.random.split(jax.random.key(task.seed), 3)
    batch_size = batch_size or batch_size_for(task, len(images))
    per_epoch = len(images) // batch_size
    total = recipe.epochs * per_epoch if train_steps is None else train_steps
    warmup = min(round(recipe.warmup_epochs * per_epoch), total // 2)
    settings = (recipe, images.shape[1:], batch_size, total, warmup)
    init, train_step = _programs(dataclasses.replace(task, seed=0), *settings)
    state = init(init_key)
    progress = Progress(total, unit="steps", label=label)
    for step in range(total):
        epoch, i = divmod(step, per_epoch)
        if i == 0:  # each image once an epoch, except those that fill no whole batch
            key = jax.random.fold_in(order_key, epoch)
            order = np.asarray(jax.random.permutation(key, len(images)))
        rows = order[i * batch_size : (i + 1) * batch_size]
        own = None if labels is None else labels[rows].astype(np.int32)
        batch = jax.device_put((np.asarray(images[rows]), own), split)
        state, loss = train_step(state, *batch, run_key, step)
        if (step + 1) % 50 == 0 or step + 1 == total:
            progress.update(step + 1, loss=f"{float(loss):.3f}")
    progress.close()
    if not np.isfinite(last := float(loss)):
        raise UserError(f"{label}: its loss is {last} after {total} steps, expected a number")
    return jax.device_get(state[0])

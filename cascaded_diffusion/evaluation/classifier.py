"""Features from a classifier that is trained on the spot on the real images.

For data on which Inception's features mean little. Its Fréchet distance is
called `fd_classifier`: it is comparable between checkpoints of one run, and to
nothing else. The classifier is a function of (data, resolution, seed); it is
trained once per run folder and kept there as plain arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.networks import classifier as networks
from cascaded_diffusion.runtime.run_folder import write_whole

_EPOCHS = 14
_BATCH_SIZE = 64
# Of the image's size: 2 px of 32.
_SHIFT_FRACTION = 1 / 16
# Goes up with every change to how the classifier is built or trained.
_RECIPE = 1


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Real images: uint8 [n, H, W, C] and int32 labels [n]."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier.

    Attributes:
      module: its network.
      params: its parameters.
      accuracy: on the held-out real images.
      digest: SHA-256 of the parameters, first 16 digits: the features' identity.
    """

    module: networks.SmallClassifier
    params: dict
    accuracy: float
    digest: str

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, H, W, C] -> features [n, F] and predicted labels [n]."""
        features, predictions = [], []
        for start in range(0, len(images), 500):
            f, logits = _forward(self.module, self.params, images[start : start + 500])
            features.append(np.asarray(f))
            predictions.append(np.asarray(logits).argmax(-1))
        return np.concatenate(features), np.concatenate(predictions)


@partial(jax.jit, static_argnums=0)
def _forward(
    module: networks.SmallClassifier, params: dict, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return networks.apply_classifier(module, params, float_from_uint8(images))


def _fingerprint(train: LabelledImages, seed: int) -> str:
    digest = hashlib.sha256(f"{_RECIPE} {seed} {train.images.shape}".encode())
    digest.update(np.ascontiguousarray(train.images).tobytes())
    digest.update(np.ascontiguousarray(train.labels).tobytes())
    return digest.hexdigest()


def _digest(flat: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(flat):
        digest.update(name.encode() + np.ascontiguousarray(flat[name]).tobytes())
    return digest.hexdigest()[:16]


def _unflatten(flat: Mapping[str, np.ndarray]) -> dict:
    tree: dict = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _random_shift(images: jax.Array, key: jax.Array) -> jax.Array:
    """Moves each image by up to a sixteenth; what enters is the border's value."""
    n, height, width, channels = images.shape
    shift = round(height * _SHIFT_FRACTION)
    padded = jnp.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (n, 2), 0, 2 * shift + 1)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, offsets)


def train_classifier(
    train: LabelledImages, held_out: LabelledImages, *, num_classes: int, seed: int
) -> Classifier:
    """Trains a classifier on real images. Deterministic for a seed and a machine."""
    module = networks.SmallClassifier(num_classes=num_classes)
    _, height, _, channels = train.images.shape
    init_key, order_key, run_key = jax.random.split(jax.random.key(seed), 3)
    params = jax.jit(lambda key: networks.init_classifier(module, key, height, channels))(init_key)
    steps_per_epoch = len(train.images) // _BATCH_SIZE
    schedule = optax.cosine_decay_schedule(2e-3, _EPOCHS * steps_per_epoch)
    optimizer = optax.adamw(schedule, weight_decay=1e-3)

    def loss_fn(params: dict, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        shift_key, dropout_key = jax.random.split(key)
        image = _random_shift(float_from_uint8(images), shift_key)
        _, logits = networks.apply_classifier(module, params, image, dropout_key=dropout_key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(
        params: dict, opt_state: optax.OptState, images: jax.Array, labels: jax.Array, step: int
    ) -> tuple[dict, optax.OptState]:
        grads = jax.grad(loss_fn)(params, images, labels, jax.random.fold_in(run_key, step))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for epoch in range(_EPOCHS):
        order = np.asarray(
            jax.random.permutation(jax.random.fold_in(order_key, epoch), len(train.images))
        )
        for i in range(steps_per_epoch):
            rows = order[i * _BATCH_SIZE : (i + 1) * _BATCH_SIZE]
            params, opt_state = train_step(
                params,
                opt_state,
                train.images[rows],
                train.labels[rows],
                epoch * steps_per_epoch + i,
            )
    return _finished(module, params, held_out)


def _finished(
    module: networks.SmallClassifier, params: dict, held_out: LabelledImages
) -> Classifier:
    params = jax.device_get(params)
    classifier = Classifier(module, params, 0.0, _digest(networks.flatten_params(params)))
    _, predictions = classifier(held_out.images)
    accuracy = float((predictions == held_out.labels).mean())
    return dataclasses.replace(classifier, accuracy=accuracy)


def load_or_train(
    path: pathlib.Path,
    train: LabelledImages,
    held_out: LabelledImages,
    *,
    num_classes: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> Classifier:
    """The classifier kept at `path`, or a new one that is then kept there.

    A file that was made from other images, another seed or another recipe, or that
    cannot be read, is replaced, and `say` is told.
    """
    fingerprint = _fingerprint(train, seed)
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as stored:
                flat = {name: stored[name] for name in stored.files}
        except Exception as e:  # whatever a damaged zip makes numpy raise
            say(f"{path}: cannot be read ({type(e).__name__}); training the classifier again")
            flat = {}
        # The array names begin with "params/": anything else is about the file.
        stored_params = {
            name.removeprefix("params/"): value
            for name, value in flat.items()
            if name.startswith("params/")
        }
        if flat and str(flat.get("fingerprint")) == fingerprint:
            if str(flat.get("digest")) == _digest(stored_params):
                module = networks.SmallClassifier(num_classes=num_classes)
                return _finished(module, _unflatten(stored_params), held_out)
            say(f"{path}: its arrays have changed; training the classifier again")
        elif flat:
            say(f"{path}: made from other data or settings; training the classifier again")
    classifier = train_classifier(train, held_out, num_classes=num_classes, seed=seed)
    flat = networks.flatten_params(classifier.params)
    data = io.BytesIO()
    np.savez(
        data,
        fingerprint=fingerprint,
        digest=_digest(flat),
        **{f"params/{name}": value for name, value in flat.items()},
    )
    write_whole(path, data.getvalue())
    return classifier

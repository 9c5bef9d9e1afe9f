"""Features from a classifier that is trained on the run's own real images.

It serves data on which Inception's features mean little. Its Fréchet distance is called
`fd_classifier` (with the networks of CAS `fd_resnet` and `fd_resnet50`; with a network that tells
by how much an image was turned, and needs no labels, `fd_rotation`). It can be compared between
checkpoints of one run, and with nothing else. The classifier is a function of (data, resolution,
seed); it is trained once per run folder and kept there as plain arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.config.schema import MeshConfig
from cascaded_diffusion.evaluation.features.classifier_training import NUM_TURNS, train_classifier
from cascaded_diffusion.evaluation.features.extractor import Features, extract_in_batches
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.whole import sha256_of_arrays, write_npz_whole
from cascaded_diffusion.networks import classifier as networks
from cascaded_diffusion.runtime import mesh as mesh_lib

# Goes up with every change to how the classifier is built or trained.
_RECIPE = 2
_BATCH = 500
# The network whose classes are rotations.
ROTATION = "rotation"


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Images: uint8 [n, H, W, C] and int32 labels [n]."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier as a feature extractor: uint8 images [n, H, W, C] -> `Features`.

    Logits are over the data's classes; a network that tells rotations returns none.

    Attributes:
      network: its name in `networks.classifier.CLASSIFIERS`.
      module: the network.
      variables: its parameters, and its batch statistics if it has any.
      digest: SHA-256 of the variables, first 16 digits.
      mesh: the device mesh.
      accuracy: on the held-out real images; for rotations, on each image in all of them.
    """

    network: str
    module: Any
    variables: networks.Variables
    digest: str
    mesh: Mesh
    accuracy: float = 0.0

    @property
    def name(self) -> str:
        """Part of metric names."""
        return "classifier" if self.network == "small" else self.network

    @property
    def identity(self) -> str:
        """Network and weights."""
        return f"{self.name}:{self.digest}"

    def __call__(self, images: np.ndarray) -> Features:
        features = self._outputs(images)
        if self.network == ROTATION:
            return dataclasses.replace(features, logits=None)
        return features

    def predictions(self, images: np.ndarray) -> np.ndarray:
        """int [n]: each image's likeliest class, or how often it was turned by 90 degrees."""
        return self._outputs(images).logits.argmax(-1)

    def _outputs(self, images: np.ndarray) -> Features:
        size = -(-min(_BATCH, len(images)) // self.mesh.size) * self.mesh.size
        sharding = mesh_lib.batch_sharding(self.mesh)

        def extract(batch: np.ndarray) -> Iterable[np.ndarray]:
            outputs = _forward(self.module, self.variables, jax.device_put(batch, sharding))
            return map(mesh_lib.host_array, outputs)

        return extract_in_batches(images, size, extract)


@partial(jax.jit, static_argnums=0)
def _forward(
    module: Any, variables: networks.Variables, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Devices differ in their default precision; the features must not.
    with jax.default_matmul_precision("highest"):
        return networks.apply_classifier(module, variables, float_from_uint8(images))


def _fingerprint(train: LabelledImages, network: str, seed: int) -> str:
    digest = hashlib.sha256(f"{_RECIPE} {network} {seed} {train.images.shape}".encode())
    digest.update(np.ascontiguousarray(train.images).tobytes())
    if network != ROTATION:
        digest.update(np.ascontiguousarray(train.labels).tobytes())
    return digest.hexdigest()


def _variables_digest(flat: Mapping[str, np.ndarray]) -> str:
    return sha256_of_arrays(flat)[:16]


def _finished(
    network: str,
    module: Any,
    variables: networks.Variables,
    held_out: LabelledImages,
    mesh: Mesh,
) -> Classifier:
    digest = _variables_digest(networks.flatten_params(variables))
    classifier = Classifier(network, module, variables, digest, mesh)
    tests = [(held_out.images, held_out.labels)]
    if network == ROTATION:
        tests = [(np.rot90(held_out.images, k, (1, 2)), k) for k in range(NUM_TURNS)]
    right = [(classifier.predictions(images) == labels).mean() for images, labels in tests]
    return dataclasses.replace(classifier, accuracy=float(np.mean(right)))


def _fits(module: Any, flat: Mapping[str, np.ndarray], image: np.ndarray) -> bool:
    """Whether arrays are a network's variables for images [H, W, C]."""
    shapes = jax.eval_shape(
        lambda: networks.init_classifier(module, jax.random.key(0), image.shape[0], image.shape[2])
    )
    wanted = {k: (x.shape, x.dtype) for k, x in networks.flatten_params(shapes).items()}
    return wanted == {k: (x.shape, x.dtype) for k, x in flat.items()}


def load_or_train(
    path: pathlib.Path,
    train: LabelledImages,
    held_out: LabelledImages,
    *,
    num_classes: int,
    seed: int,
    network: str = "small",
    mesh: Mesh | None = None,
    say: Callable[[str], None] = print,
) -> Classifier:
    """The classifier stored at `path`, or a new one, which is then stored there.

    A file that was made from other images, another seed or another recipe, or that cannot be read,
    is replaced, and `say` is told why.

    Args:
      path: of the file.
      train: real images; for the network "rotation" their labels do not matter.
      held_out: other images, for the accuracy.
      num_classes: of the labels.
      seed: of weights, order and augmentation.
      network: its name in `CLASSIFIERS`.
      mesh: the device mesh; by default the first device.
      say: told why a file is replaced.

    Raises:
      UserError: training images of a single class, or fewer of them than devices.
    """
    if mesh is None:
        mesh = mesh_lib.build_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    labels = train.labels
    if network == ROTATION:
        labels, num_classes = None, NUM_TURNS
    fingerprint = _fingerprint(train, network, seed)
    if path.exists():
        try:
            flat = read_arrays(path)
        except (ValueError, OSError) as e:
            say(f"{path}: cannot be read ({e}); training the classifier again")
            flat = {}
        arrays = {k: v for k, v in flat.items() if k not in ("fingerprint", "digest")}
        if flat and str(flat.get("fingerprint")) == fingerprint:
            module = networks.CLASSIFIERS[network](num_classes=num_classes)
            if str(flat.get("digest")) != _variables_digest(arrays):
                say(f"{path}: its arrays have changed; training the classifier again")
            elif not _fits(module, arrays, train.images[0]):
                say(f"{path}: made for other classes; training the classifier again")
            else:
                return _finished(network, module, networks.unflatten_params(arrays), held_out, mesh)
        elif flat:
            say(f"{path}: made from other data or settings; training the classifier again")
    module, variables = train_classifier(
        network,
        train.images,
        labels,
        num_classes=num_classes,
        seed=seed,
        mesh=mesh,
        label=f"{network} classifier of the real images",
    )
    classifier = _finished(network, module, variables, held_out, mesh)
    about = {"fingerprint": fingerprint, "digest": classifier.digest}
    write_npz_whole(path, {**about, **networks.flatten_params(variables)})
    return classifier

"""Features from a classifier that is trained on the spot on the real images.

For data on which Inception's features mean little. Its Fréchet distance is called
`fd_classifier` (`fd_resnet`, `fd_resnet50` of the networks of CAS): it is comparable
between checkpoints of one run, and to nothing else. The classifier is a function of
(data, resolution, seed); it is trained once per run folder and kept there as plain arrays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.config import MeshConfig
from cascaded_diffusion.evaluation.classifier_training import train_classifier
from cascaded_diffusion.evaluation.features import Features, concatenated
from cascaded_diffusion.networks import classifier as networks
from cascaded_diffusion.npz_file import read_arrays
from cascaded_diffusion.runtime import mesh as mesh_lib
from cascaded_diffusion.runtime.run_folder import write_whole

# Goes up with every change to how the classifier is built or trained.
_RECIPE = 2
_BATCH = 500


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Images: uint8 [n, H, W, C] and int32 labels [n]."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier, as a feature extractor: uint8 images [n, H, W, C] -> `Features`.

    Attributes:
      network: its name in `networks.classifier.CLASSIFIERS`.
      module: the network.
      variables: its parameters, and batch statistics if it has them.
      digest: SHA-256 of the variables, first 16 digits.
      mesh: the devices that a batch is split over.
      accuracy: on the held-out real images.
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
        size = -(-min(_BATCH, len(images)) // self.mesh.size) * self.mesh.size
        parts = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            # Filled up to one shape; what is too much is thrown away.
            padded = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), axis=0)])
            placed = jax.device_put(padded, mesh_lib.batch_sharding(self.mesh))
            outputs = _forward(self.module, self.variables, placed)
            parts.append(Features(*(mesh_lib.host_array(x)[: len(batch)] for x in outputs)))
        return concatenated(parts)


@partial(jax.jit, static_argnums=0)
def _forward(
    module: Any, variables: networks.Variables, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # The same features on every kind of device, whose defaults may round more.
    with jax.default_matmul_precision("highest"):
        return networks.apply_classifier(module, variables, float_from_uint8(images))


def _fingerprint(train: LabelledImages, network: str, seed: int) -> str:
    digest = hashlib.sha256(f"{_RECIPE} {network} {seed} {train.images.shape}".encode())
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


def _finished(
    network: str,
    module: Any,
    variables: networks.Variables,
    held_out: LabelledImages,
    mesh: Mesh,
) -> Classifier:
    digest = _digest(networks.flatten_params(variables))
    classifier = Classifier(network, module, variables, digest, mesh)
    predictions = classifier(held_out.images).logits.argmax(-1)
    return dataclasses.replace(classifier, accuracy=float((predictions == held_out.labels).mean()))


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
    """The classifier kept at `path`, or a new one that is then kept there.

    A file that was made from other images, another seed or another recipe, or that
    cannot be read, is replaced, and `say` is told.
    """
    if mesh is None:
        mesh = mesh_lib.build_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    fingerprint = _fingerprint(train, network, seed)
    if path.exists():
        try:
            flat = read_arrays(path)
        except (OSError, ValueError) as e:
            say(f"{path}: cannot be read ({e}); training the classifier again")
            flat = {}
        arrays = {k: v for k, v in flat.items() if k not in ("fingerprint", "digest")}
        if flat and str(flat.get("fingerprint")) == fingerprint:
            if str(flat.get("digest")) == _digest(arrays):
                module = networks.CLASSIFIERS[network](num_classes=num_classes)
                return _finished(network, module, _unflatten(arrays), held_out, mesh)
            say(f"{path}: its arrays have changed; training the classifier again")
        elif flat:
            say(f"{path}: made from other data or settings; training the classifier again")
    module, variables = train_classifier(
        network,
        train.images,
        train.labels,
        num_classes=num_classes,
        seed=seed,
        mesh=mesh,
        label=f"{network} classifier of the real images",
    )
    classifier = _finished(network, module, variables, held_out, mesh)
    data = io.BytesIO()
    np.savez(
        data,
        fingerprint=fingerprint,
        digest=classifier.digest,
        **networks.flatten_params(variables),
    )
    write_whole(path, data.getvalue())
    return classifier

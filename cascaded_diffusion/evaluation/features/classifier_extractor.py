"""Features from a classifier that is trained on the run's own real images.

It serves data on which Inception's features mean little. Its Fréchet distance is called
`fd_classifier` (with the networks of CAS `fd_resnet` and `fd_resnet50`; with a network that tells
by how much an image was turned, and needs no labels, `fd_rotation`). It can be compared between
checkpoints of one run, and with nothing else. The classifier, a function of (data, resolution,
seed), is trained once per run folder and kept there.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from cascaded_diffusion.cascade.pixels import float_from_uint8
from cascaded_diffusion.evaluation.features import classifier_training as training
from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages, Task
from cascaded_diffusion.evaluation.features.extractor import Features, extract_in_batches
from cascaded_diffusion.files.bucket import AnyPath
from cascaded_diffusion.files.npz_archive import read_arrays
from cascaded_diffusion.files.whole import sha256_of_arrays, write_npz_whole
from cascaded_diffusion.networks import classifier as networks

# Goes up with every change to how the classifier is built or trained.
_RECIPE = 2
_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trained classifier: uint8 images [n, H, W, C] -> `Features`; rotations have no logits."""

    task: Task
    variables: networks.Variables
    digest: str = ""  # SHA-256 of the variables, first 16 digits
    accuracy: float = 0.0  # on held-out real images; for rotations, on each image in all of them

    @property
    def name(self) -> str:
        """Part of metric names."""
        return "classifier" if self.task.network == "small" else self.task.network

    @property
    def identity(self) -> str:
        """Network and weights."""
        return f"{self.name}:{self.digest}"

    def __call__(self, images: np.ndarray) -> Features:
        features = self._outputs(images)
        is_rotation = self.task.network == training.ROTATION
        return dataclasses.replace(features, logits=None) if is_rotation else features

    def predictions(self, images: np.ndarray) -> np.ndarray:
        """int [n]: each image's likeliest class, or how often it was turned by 90 degrees."""
        return self._outputs(images).logits.argmax(-1)

    def _outputs(self, images: np.ndarray) -> Features:
        mesh = self.task.mesh
        size = -(-min(_BATCH, len(images)) // mesh.size) * mesh.size
        program = partial(_forward, self.task.module, self.variables)
        return extract_in_batches(images, size, mesh, program)


@partial(jax.jit, static_argnums=0)
def _forward(
    module: networks.Module, variables: networks.Variables, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Devices differ in their default precision; the features must not.
    with jax.default_matmul_precision("highest"):
        return module.apply(variables, float_from_uint8(images))


def _fingerprint(task: Task, train: LabelledImages) -> str:
    about = f"{_RECIPE} {task.network} {task.seed} {train.images.shape}"
    digest = hashlib.sha256(about.encode())
    digest.update(np.ascontiguousarray(train.images).tobytes())
    if task.network != training.ROTATION:
        digest.update(np.ascontiguousarray(train.labels).tobytes())
    return digest.hexdigest()


def _stored(
    path: AnyPath, task: Task, fingerprint: str, shape: tuple[int, ...]
) -> networks.Variables:
    """The variables of a file. Raises ValueError: why they cannot be used."""
    try:
        arrays = read_arrays(path)
    except (ValueError, OSError) as e:
        raise ValueError(f"cannot be read ({e})") from e
    about, digest = (str(arrays.pop(name, "")) for name in ("fingerprint", "digest"))
    if about != fingerprint:
        raise ValueError("made from other data or settings")
    if digest != sha256_of_arrays(arrays)[:16]:
        raise ValueError("its arrays have changed")
    expected = networks.flatten_params(
        jax.eval_shape(lambda: networks.init_classifier(task.module, jax.random.key(0), shape))
    )
    if arrays.keys() != expected.keys() or any(
        (arrays[k].shape, arrays[k].dtype) != (x.shape, x.dtype) for k, x in expected.items()
    ):
        raise ValueError("made for other classes")
    return networks.unflatten_params(arrays)


def load_or_train(
    path: AnyPath,
    task: Task,
    train: LabelledImages,
    held_out: LabelledImages,
    *,
    say: Callable[[str], None] = print,
) -> Classifier:
    """The classifier stored at `path`, or a new one, which is then stored there.

    A file that was made from other images, another seed or another recipe, or that cannot be read,
    is replaced, and `say` is told why. The labels of `train` do not matter to the network
    "rotation"; `held_out` images measure the accuracy. Raises UserError as `train_classifier`.
    """
    fingerprint, variables = _fingerprint(task, train), None
    if path.exists():
        try:
            variables = _stored(path, task, fingerprint, train.images.shape)
        except ValueError as e:
            say(f"{path}: {e}; training the classifier again")
    known = variables is not None
    if not known:
        label = f"{task.network} classifier of the real images"
        variables = training.train_classifier(task, train, label=label)
    arrays = networks.flatten_params(variables)
    digest = sha256_of_arrays(arrays)[:16]
    if not known:
        write_npz_whole(path, {"fingerprint": fingerprint, "digest": digest, **arrays})
    classifier = Classifier(task, variables, digest)
    tests = [(held_out.images, held_out.labels)]
    if task.network == training.ROTATION:
        tests = [(np.rot90(held_out.images, k, (1, 2)), k) for k in range(training.NUM_TURNS)]
    right = [(classifier.predictions(images) == labels).mean() for images, labels in tests]
    return dataclasses.replace(classifier, accuracy=float(np.mean(right)))

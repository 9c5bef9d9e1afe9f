"""The classification accuracy score (Ravuri & Vinyals 2019), the paper's second metric.

A classifier that is trained on generated samples alone is tested on real images. Samples
that lack detail or variety teach it less than real images do; beside it stands the same
network, trained for as many steps on real images.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.evaluator import Splits, default_mesh
from cascaded_diffusion.evaluation.features.classifier_extractor import Classifier, LabelledImages
from cascaded_diffusion.evaluation.features.classifier_training import (
    RECIPES,
    batch_size_for,
    train_classifier,
)
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages, check_labels
from cascaded_diffusion.files.json_files import append_line
from cascaded_diffusion.runtime.run_folder import RunFolder

# ResNet-50, as published, is trained from this resolution on; below, a small ResNet.
_LARGE = 64


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How often a classifier is right on test images.

    Attributes:
      top1: the share of images whose best class is the label.
      top5: the share of images whose label is among the best five classes.
      of_class: `top1` per class [K]; NaN for a class without test images.
      num_train: number of training images.
    """

    top1: float
    top5: float
    of_class: np.ndarray
    num_train: int


def accuracy_of(logits: np.ndarray, labels: np.ndarray, *, num_train: int) -> Accuracy:
    """The accuracy of logits [n, K] of images with labels [n]."""
    ranked = np.argsort(-logits, axis=-1, kind="stable")
    hits = ranked == labels[:, None]
    right = hits[:, 0]
    num_classes = logits.shape[1]
    counts = np.bincount(labels, minlength=num_classes)
    with np.errstate(invalid="ignore"):
        of_class = np.bincount(labels, right, minlength=num_classes) / counts
    return Accuracy(float(right.mean()), float(hits[:, :5].any(1).mean()), of_class, num_train)


def accuracy_after_training(
    train: LabelledImages,
    test: LabelledImages,
    *,
    num_classes: int,
    network: str,
    train_steps: int,
    batch_size: int,
    seed: int,
    flip: bool,
    mesh: Mesh,
    label: str,
) -> Accuracy:
    """Trains a network on `train` for `train_steps` and tests it on `test`.

    Raises:
      UserError: images differ in size, or a label is no class.
    """
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"--samples: images of {train.images.shape[1:]}, expected {test.images.shape[1:]}, as"
            " the real ones are"
        )
    for images in (train, test):
        check_labels(images.labels, num_classes, label)
    missing = num_classes - len(np.unique(train.labels))
    if missing:
        print(f"{label}: no training image of {missing} of the {num_classes} classes", flush=True)
    module, variables = train_classifier(
        network,
        train.images,
        train.labels,
        num_classes=num_classes,
        seed=seed,
        mesh=mesh,
        flip=flip,
        train_steps=train_steps,
        batch_size=batch_size,
        label=label,
    )
    classifier = Classifier(network, module, variables, "", mesh)
    logits = classifier(test.images).logits
    return accuracy_of(logits, test.labels, num_train=len(train.labels))


def cas_record(
    generated: LabelledImages,
    real: LabelledImages,
    test: LabelledImages,
    *,
    num_classes: int,
    network: str,
    epochs: int | None,
    seed: int,
    flip: bool,
    mesh: Mesh,
) -> dict[str, Any]:
    """CAS of generated samples, beside the same network's accuracy when trained on real images.

    `epochs` are over the generated samples; None stands for the recipe's number. `test` are real
    images of another split than `real`. Returns a record for JSON.

    Raises:
      UserError: images differ in size, or a label is no class.
    """
    recipe = RECIPES[network]
    epochs = recipe.epochs if epochs is None else epochs
    batch_size = batch_size_for(recipe, min(len(generated.labels), len(real.labels)), mesh)
    train_steps = epochs * (len(generated.labels) // batch_size)
    found = {}
    how = dict(num_classes=num_classes, network=network, seed=seed, flip=flip, mesh=mesh)
    for name, train in (("generated", generated), ("real", real)):
        label = f"CAS, {network} on {name} images"
        found[name] = accuracy_after_training(
            train, test, train_steps=train_steps, batch_size=batch_size, label=label, **how
        )
    better = found["generated"].of_class > found["real"].of_class
    return {
        "metric": "cas",
        "network": network,
        "epochs": epochs,
        "train_steps": train_steps,
        "num_classes": num_classes,
        "resolution": int(test.images.shape[1]),
        **{
            name: {"top1": a.top1, "top5": a.top5, "num_images": a.num_train}
            for name, a in found.items()
        },
        "per_class": {"generated_better": int(better.sum())},
        "test_images": len(test.labels),
        "seed": seed,
    }


def classification_accuracy(
    folder: RunFolder,
    splits: Splits,
    samples: StoredImages,
    *,
    network: str | None = None,
    epochs: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """The classification accuracy score of stored samples, appended to RUN/eval/cas.jsonl.

    Args:
      folder: the run.
      splits: its real images by role, "train" and "val".
      samples: from `stored_images.load_samples`, with labels.
      network: "resnet" or "resnet50"; by default the latter from 64 px on.
      epochs: over the samples; by default the network's usual number.
      mesh: the device mesh; by default all devices.

    Raises:
      UserError: another process evaluates the run.
    """
    config = folder.read_config()
    stage, data = config.stage, config.data
    mesh = mesh or default_mesh(config)
    with folder.writer_lock("eval"):
        record = cas_record(
            LabelledImages(samples.images, samples.labels.astype("int32")),
            splits["train"].whole(stage.resolution),
            splits["val"].whole(stage.resolution),
            num_classes=stage.num_classes,
            network=network or ("resnet50" if stage.resolution >= _LARGE else "resnet"),
            epochs=epochs,
            seed=config.eval.seed,
            flip=data.random_flip,
            mesh=mesh,
        )
        record |= {
            "samples": samples.path,
            "samples_digest": samples.digest(),
            "data": f"{data.name}:{data.train_split}:{data.eval_split}",
        }
        append_line(folder.cas_path, record)
    return record

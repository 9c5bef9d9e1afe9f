"""The classification accuracy score (Ravuri & Vinyals 2019), the paper's second metric.

A classifier that is trained on generated samples alone is tested on real images. Samples
that lack detail or variety teach it less than real images do; beside it stands the same
network, trained for as many steps on real images.
"""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.evaluator import Splits, default_mesh
from cascaded_diffusion.evaluation.features.classifier_extractor import Classifier
from cascaded_diffusion.evaluation.features.classifier_training import (
    RECIPES,
    LabelledImages,
    Task,
    batch_size_for,
    train_classifier,
)
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages, check_labels
from cascaded_diffusion.files.json_files import append_line
from cascaded_diffusion.runtime.run_folder import RunFolder

# ResNet-50, as published, is trained from this resolution on; below, a small ResNet.
_LARGE = 64


def accuracy_of(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Top-1 and top-5 accuracy of logits [n, K] of images with labels [n]; top-1 per class [K].

    The latter is NaN for a class without images.
    """
    hits = np.argsort(-logits, axis=-1, kind="stable") == labels[:, None]
    num_classes = logits.shape[1]
    with np.errstate(invalid="ignore"):
        of_class = np.bincount(labels, hits[:, 0], num_classes) / np.bincount(
            labels, minlength=num_classes
        )
    return float(hits[:, 0].mean()), float(hits[:, :5].any(1).mean()), of_class


def cas_record(
    task: Task,
    generated: LabelledImages,
    real: LabelledImages,
    test: LabelledImages,
    *,
    epochs: int | None,
) -> dict[str, Any]:
    """CAS of generated samples, beside the same network's accuracy when trained on real images.

    `epochs` are over the generated samples; None stands for the recipe's number. `test` are real
    images of another split than `real`. Returns a record for JSON.

    Raises UserError if images differ in size, or a label is no class.
    """
    if generated.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"--samples: images of {generated.images.shape[1:]}, expected"
            f" {test.images.shape[1:]}, as the real ones are"
        )
    epochs = RECIPES[task.network].epochs if epochs is None else epochs
    batch_size = batch_size_for(task, min(len(generated.labels), len(real.labels)))
    train_steps = epochs * (len(generated.labels) // batch_size)
    found, of_class = {}, {}
    for name, train in (("generated", generated), ("real", real)):
        label = f"CAS, {task.network} on {name} images"
        for images in (train, test):
            check_labels(images.labels, task.num_classes, label)
        missing = task.num_classes - len(np.unique(train.labels))
        if missing:
            print(
                f"{label}: no training image of {missing} of the {task.num_classes} classes",
                flush=True,
            )
        variables = train_classifier(
            task, train, train_steps=train_steps, batch_size=batch_size, label=label
        )
        logits = Classifier(task, variables)(test.images).logits
        top1, top5, of_class[name] = accuracy_of(logits, test.labels)
        found[name] = {"top1": top1, "top5": top5, "num_images": len(train.labels)}
    return {
        "metric": "cas",
        "network": task.network,
        "epochs": epochs,
        "train_steps": train_steps,
        "num_classes": task.num_classes,
        "resolution": int(test.images.shape[1]),
        **found,
        "per_class": {"generated_better": int((of_class["generated"] > of_class["real"]).sum())},
        "test_images": len(test.labels),
        "seed": task.seed,
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

    `splits` are the run's real images by role, "train" and "val"; `samples` are from
    `stored_images.load_samples` and have labels. The network is "resnet", or by default from
    64 px on "resnet50". `epochs` are over the samples, by default the network's usual number.

    Raises UserError if another process evaluates the run.
    """
    config = folder.read_config()
    stage, data = config.stage, config.data
    task = Task(
        network=network or ("resnet50" if stage.resolution >= _LARGE else "resnet"),
        num_classes=stage.num_classes,
        seed=config.eval.seed,
        mesh=mesh or default_mesh(config),
        flip=data.random_flip,
    )
    with folder.writer_lock("eval"):
        record = cas_record(
            task,
            LabelledImages(samples.images, samples.labels.astype("int32")),
            splits["train"].whole(stage.resolution),
            splits["val"].whole(stage.resolution),
            epochs=epochs,
        )
        record |= {
            "samples": samples.path,
            "samples_digest": samples.digest(),
            "data": f"{data.name}:{data.train_split}:{data.eval_split}",
        }
        append_line(folder.cas_path, record)
    return record

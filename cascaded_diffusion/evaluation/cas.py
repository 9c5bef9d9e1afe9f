"""The classification accuracy score (Ravuri & Vinyals 2019), the paper's second metric.

A classifier that is trained on generated samples alone is tested on real images. Samples that lack
detail or variety teach it less than as many steps on real images teach the same network.
"""

from collections.abc import Mapping

import numpy as np

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.evaluator import Splits, default_mesh
from cascaded_diffusion.evaluation.features import classifier_training
from cascaded_diffusion.evaluation.features.classifier_extractor import Classifier
from cascaded_diffusion.evaluation.features.classifier_training import LabelledImages, Task
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages, check_labels
from cascaded_diffusion.files.json_files import Record, append_line
from cascaded_diffusion.runtime.run_folder import RunFolder


def accuracy_of(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Top-1 and top-5 accuracy of logits [n, K] for labels [n]; top-1 per class [K], or NaN."""
    hits = np.argsort(-logits, axis=-1, kind="stable") == labels[:, None]
    counts = np.bincount(labels, minlength=logits.shape[1])
    with np.errstate(invalid="ignore"):
        of_class = np.bincount(labels, hits[:, 0], logits.shape[1]) / counts
    return float(hits[:, 0].mean()), float(hits[:, :5].any(1).mean()), of_class


def cas_record(
    task: Task, train: Mapping[str, LabelledImages], test: LabelledImages, *, epochs: int | None
) -> Record:
    """CAS of the samples train["generated"], beside that of the real images train["real"].

    `epochs` are over the generated samples; None stands for the recipe's number. `test` are real
    images of another split. Returns a record for JSON. Raises UserError if images differ in size,
    or a label is no class.
    """
    generated = train["generated"]
    size, wanted = (x.images.shape[1:] for x in (generated, test))
    if size != wanted:
        raise UserError(f"--samples: images of {size}, expected {wanted}, as the real ones are")
    epochs = classifier_training.RECIPES[task.network].epochs if epochs is None else epochs
    fewest = min(len(images.labels) for images in train.values())
    batch_size = classifier_training.batch_size_for(task, fewest)
    steps = epochs * (len(generated.labels) // batch_size)
    found, of_class = {}, {}
    for name, images in train.items():
        label = f"CAS, {task.network} on {name} images"
        for labels in (images.labels, test.labels):
            check_labels(labels, task.num_classes, label)
        if missing := task.num_classes - len(np.unique(images.labels)):
            of_how_many = f"{missing} of the {task.num_classes} classes"
            print(f"{label}: no training image of {of_how_many}", flush=True)
        how = dict(train_steps=steps, batch_size=batch_size, label=label)
        variables = classifier_training.train_classifier(task, images, **how)
        logits = Classifier(task, variables)(test.images).logits
        top1, top5, of_class[name] = accuracy_of(logits, test.labels)
        found[name] = {"top1": top1, "top5": top5, "num_images": len(images.labels)}
    return {
        "metric": "cas",
        "network": task.network,
        "epochs": epochs,
        "train_steps": steps,
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
) -> Record:
    """The classification accuracy score of stored samples, appended to RUN/eval/cas.jsonl.

    `splits` are the run's real images by role, "train" and "val"; `samples` are from
    `stored_images.load_samples` and have labels. The network is "resnet", or by default from
    64 px on "resnet50". `epochs` are over the samples, by default the network's usual number.
    Raises UserError if another process evaluates the run.
    """
    config = folder.read_config()
    stage, data = config.stage, config.data
    # ResNet-50, as published, from this resolution on; below, a small ResNet.
    network = network or ("resnet50" if stage.resolution >= 64 else "resnet")
    how = dict(seed=config.eval.seed, mesh=default_mesh(config), flip=data.random_flip)
    task = Task(network=network, num_classes=stage.num_classes, **how)
    with folder.writer_lock("eval"):
        train = {
            "generated": LabelledImages(samples.images, samples.labels.astype("int32")),
            "real": splits["train"].whole(stage.resolution),
        }
        record = cas_record(task, train, splits["val"].whole(stage.resolution), epochs=epochs)
        record |= {
            "samples": samples.path,
            "samples_digest": samples.digest(),
            "data": f"{data.name}:{data.train_split}:{data.eval_split}",
        }
        append_line(folder.cas_path, record)
    return record

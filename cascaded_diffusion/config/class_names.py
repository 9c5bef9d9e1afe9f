"""Classes by name: whether labels mean the same in several splits, runs and stages."""

from collections.abc import Mapping, Sequence

from cascaded_diffusion.config.convert import fail
from cascaded_diffusion.config.schema import DataConfig, StageConfig
from cascaded_diffusion.errors import UserError


def class_difference(
    first: str, expected: Sequence[str], second: str, found: Sequence[str]
) -> str | None:
    """How the classes of two sides, in order of label, differ; None if they do not."""
    if tuple(expected) == tuple(found):
        return None
    parts = []
    for side, names, others in ((second, found, expected), (first, expected, found)):
        here = set(names)
        lacking = [name for name in dict.fromkeys(others) if name not in here]
        if lacking:
            more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            parts.append(f"{side} has no {lacking[0]!r}{more}")
    if parts:
        return " and ".join(parts)
    for at, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a != b:
            return f"class {at} of {first} is {a!r}, and of {second} {b!r}"
    return f"{first} has {len(expected)} classes, and {second} {len(found)}"


_SAME_SPLITS = (
    "give all splits the same class folders (or class_names), or take parts of one split, as"
    " --config.data.train_split='train[:90%]' --config.data.eval_split='train[90%:]'"
)


def check_same_classes(
    class_names: Mapping[str, tuple[str, ...]], *, remedy: str = _SAME_SPLITS
) -> None:
    """Raises UserError if labels do not mean the same in several splits, or to several models.

    `class_names` are in order of label, by what people call the side, for example "train_split
    'train'"; sides without classes are skipped. `remedy` is what the user can do.
    """
    sides = [(side, names) for side, names in class_names.items() if names]
    for side, names in sides[1:]:
        if difference := class_difference(*sides[0], side, names):
            raise UserError(
                f"{difference}; labels are numbers of classes, which must be the same everywhere:"
                f" {remedy}"
            )


def check_classes(
    config: DataConfig, stage: StageConfig, class_names: Mapping[str, tuple[str, ...]]
) -> None:
    """Raises UserError if splits have different classes, or not as many as the stage has.

    A stage without classes accepts any. `class_names` is by split.
    """
    if not stage.num_classes:
        return
    keys = {config.eval_split: "eval_split", config.train_split: "train_split"}
    sides = {f"{keys.get(split, 'split')} {split!r}": n for split, n in class_names.items()}
    check_same_classes(sides)
    for split, names in class_names.items():
        if len(names) != stage.num_classes:
            expected = "0, a model without classes"
            if names:
                own = f"{len(names)}, as {config.name!r} has in {split!r}"
                expected = f"{own}, or 0 for a model without classes"
            fail("stage.num_classes", stage.num_classes, expected)

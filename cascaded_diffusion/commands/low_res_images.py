"""The images that `sample --low_res` enlarges."""

import sys
from collections.abc import Sequence

import numpy as np
from absl import flags

from cascaded_diffusion.config.schema import RunConfig
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.evaluation.samples.stored_images import StoredImages, open_images


def read_low_res(
    fv: flags.FlagValues, sizes: Sequence[int], last: RunConfig
) -> tuple[StoredImages, list[str] | None]:
    """The images of --low_res, of one of the sizes that the cascade enlarges.

    Returns names for the PNG files of their enlargements as well, if their own files have names.
    Raises UserError if they cannot be read, or are of another size or kind.
    """
    # Imported here: decoding takes OpenCV, which need not be there without images.
    from cascaded_diffusion.data.given_images import fitted, output_names, read_given_images

    path, resize_to, channels = fv.low_res, fv.resize_low_res, last.stage.channels
    given = f"--low_res={path}"
    if not sizes:
        raise UserError(f"{given}: the cascade is a base model alone, which enlarges nothing")
    if resize_to is not None and resize_to not in sizes:
        raise UserError(
            f"--resize_low_res={resize_to}: expected {' or '.join(map(str, sizes))}, the sizes that"
            " the cascade enlarges"
        )
    if channels not in (1, 3):
        raise UserError(f"{given}: the model's images have {channels} channels, not 1 or 3")
    if path.endswith(".npz"):
        stored = open_images(path, flag="low_res", at_least=1)
        if stored.images.shape[-1] != channels:
            raise UserError(
                f"{given}: arr_0 is {tuple(stored.images.shape)}, expected {channels}"
                f" channel{'s' * (channels != 1)}"
            )
        images = [
            fitted(x, sizes=sizes, resize_to=resize_to, where=f"{given}: image {i}")
            for i, x in enumerate(stored.images)
        ]
        return StoredImages(path, np.stack(images), stored.labels), None
    most = last.data.pixel_limit
    read = read_given_images(
        path, channels=channels, sizes=sizes, resize_to=resize_to, max_pixels=most
    )
    rest = f" ({read.passed_over})" if read.passed_over else ""
    for note in (f"low_res: {len(read.images)} images{rest}", *read.notes):
        print(note, file=sys.stderr, flush=True)
    return StoredImages(path, read.images, None), output_names(read.names)

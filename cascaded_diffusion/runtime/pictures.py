"""Picture files: grids and labelled rows of images, and plots of numbers."""

import io
import itertools
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cascaded_diffusion.files.bucket import AnyPath, BucketPath
from cascaded_diffusion.files.whole import files_below, write_whole


def grid(images: np.ndarray, *, columns: int, gap: int = 1) -> np.ndarray:
    """uint8 [n, H, W, C] -> one uint8 picture [h, w, 3], row by row, the last row padded."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    picture = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 64, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        picture[y : y + height, x : x + width] = image
    return picture


def enlarge_nearest(images: np.ndarray, resolution: int) -> np.ndarray:
    """Enlarges images [n, h, h, C] to [n, resolution, resolution, C] by repeating pixels."""
    source = np.arange(resolution) * images.shape[1] // resolution
    return images[:, source][:, :, source]


def save_png(path: AnyPath, picture: np.ndarray, *, scale: int = 1) -> None:
    """Writes uint8 [H, W, 3] as PNG, each pixel `scale` wide."""
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="PNG")
    write_whole(path, data.getvalue())


def labelled_rows(
    rows: Sequence[tuple[str, np.ndarray]], *, scale: int = 2, names: Sequence[str] = ()
) -> np.ndarray:
    """Rows of images with a caption above each: [(caption, uint8 [n, H, W, C])] -> [h, w, 3].

    All images have the same size. The picture is as wide as its longest row or caption. `names` are
    those of the columns, above them and as much of each as there is room for.
    """
    font = ImageFont.load_default(size=12)
    strips = []
    for caption, images in rows:
        strip = grid(images, columns=len(images)).repeat(scale, axis=0).repeat(scale, axis=1)
        width = max(strip.shape[1], math.ceil(font.getlength(caption)) + 8)
        header = Image.new("RGB", (width, 18), "white")
        ImageDraw.Draw(header).text((4, 2), caption, fill="black", font=font)
        strips += [np.asarray(header), strip]
    width = max(strip.shape[1] for strip in strips)
    if names:
        strips.insert(0, _names_of_columns(names, width, scale * (rows[0][1].shape[2] + 1)))
    return np.concatenate(
        [np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in strips]
    )


def _names_of_columns(names: Sequence[str], width: int, column: int) -> np.ndarray:
    header = Image.new("RGB", (width, 18), "white")
    draw, font = ImageDraw.Draw(header), ImageFont.load_default(size=11)
    for i, name in enumerate(names):
        while len(name) > 1 and font.getlength(name) > column - 4:
            name = name[:-1]
        draw.text((i * column + 4, 3), name, fill="black", font=font)
    return np.asarray(header)


def save_png_folder(folder: AnyPath, names: Iterable[str], images: Iterable[np.ndarray]) -> None:
    """Writes images uint8 [H, W, 1 or 3] as PNG files of these names below a folder.

    A rename makes the folder appear, or replaces it, once all files are written. In a bucket the
    files appear one by one; the command that writes them says when all are there.
    """
    if isinstance(folder, BucketPath):
        wanted = set()
        for name, image in zip(names, images, strict=True):
            wanted.add(name)
            write_whole(folder / name, _png(image))
        for name, path in files_below(folder).items():
            if name not in wanted:
                path.unlink(missing_ok=True)
        return
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir(parents=True)
    for name, image in zip(names, images, strict=True):
        path = part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(image))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def _png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(data, format="PNG")
    return data.getvalue()


def line_plot(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    markers: bool = True,
    log_scale: bool = False,
    log_x: bool = False,
) -> bytes:
    """A PNG of 960 x 600 pixels with one line per series.

    `series` holds the (x, y) points of each line, in the order to join them, by the line's name in
    the legend. `log_scale` is that of y, `log_x` that of x.
    """
    from matplotlib.figure import Figure  # takes a while

    # Without pyplot, a Figure needs no display and leaves nothing open.
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for (name, points), marker in zip(series.items(), itertools.cycle("os^Dv"), strict=False):
        x, y = np.reshape(points, (-1, 2)).T
        axes.plot(x, y, marker=marker if markers else None, label=name)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if log_scale:
        axes.set_yscale("log")
    if log_x:
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:  # an empty legend is a warning
        axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()

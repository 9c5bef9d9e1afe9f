"""Plots of numbers. The only home of matplotlib."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


def line_plot(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    markers: bool = True,
    log_scale: bool = False,
) -> bytes:
    """A PNG of 960 x 600 pixels with one line per series.

    `series` holds the (x, y) points of each line, in the order to join them, by the line's name in
    the legend. `log_scale` is that of y.
    """
    # Without pyplot, a Figure needs no display and leaves nothing open.
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for (name, points), marker in zip(series.items(), itertools.cycle("os^Dv"), strict=False):
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            marker=marker if markers else None,
            label=name,
        )
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if log_scale:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    # An empty legend is a warning.
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()

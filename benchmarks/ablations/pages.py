"""Results as people read them: tables in Markdown, plots, and their places in the docs."""

from __future__ import annotations

import itertools
import pathlib
import re
from collections.abc import Sequence

from store import by_label
from tables import BUDGETS, TABLES

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.files.json_files import Record
from cascaded_diffusion.files.whole import write_whole
from cascaded_diffusion.runtime import pictures

# The columns of scores: name, heading, decimals, factor.
SCORES = (
    ("fd", "Fréchet distance", 2, 1),
    ("fid", "FID", 2, 1),
    ("precision", "precision", 3, 1),
    ("recall", "recall", 3, 1),
    ("is", "inception score", 2, 1),
    ("accuracy", "recognised, %", 1, 100),
    ("cas", "CAS, %", 1, 100),
    ("pixels_train", "to training images, pixels", 2, 1),
    ("pixels_held_out", "to held-out images, pixels", 2, 1),
    ("pixels_nearer", "nearer to a training image, pixels, %", 1, 100),
    ("pixels_least", "least to a training image, pixels", 2, 1),
    ("features_train", "to training images, features", 3, 1),
    ("features_held_out", "to held-out images, features", 3, 1),
    ("features_nearer", "nearer to a training image, features, %", 1, 100),
    ("features_least", "least to a training image, features", 3, 1),
)


def _cell(values: Sequence[float], decimals: int) -> str:
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.{decimals}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{decimals}f} to {max(values):.{decimals}f})"


def table_of(about: Record, rows: Sequence[Record]) -> str:
    """Markdown: a line per row, with the mean of its seeds, and the least and the greatest."""
    groups = by_label(rows)
    labels = list(dict.fromkeys(key for rows_ in groups for key in rows_[0]["label"]))
    scores = [s for s in SCORES if any(s[0] in row["scores"] for row in rows)]
    sampled = any(row["evaluations"] for row in rows)
    sizes = {row["num_samples"] for row in rows}
    head = [*labels, *(["samples"] if len(sizes) > 1 else [])]
    head += ["evaluations", "GFLOP a sample"] if sampled else []
    head += [heading for _, heading, _, _ in scores]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for group in groups:
        first = group[0]
        cells = [_plain(first["label"].get(key, "")) for key in labels]
        if len(sizes) > 1:
            cells.append(f"{first['num_samples']:,}")
        if sampled:
            cells.append(f"{first['evaluations']}" if first["evaluations"] else "")
            flops = first["flops_per_sample"] / 1e9
            cells.append(f"{flops:,.0f}" if flops >= 100 else f"{flops:.2g}" if flops else "")
        for name, _, decimals, factor in scores:
            values = [factor * row["scores"][name] for row in group if name in row["scores"]]
            cells.append(_cell(values, decimals))
        lines.append(f"| {' | '.join(cells)} |")
    count = f"{sizes.pop():,} samples a row, " if len(sizes) == 1 else ""
    return "\n".join([*lines, "", count + _origin(about, rows)])


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _origin(about: Record, rows: Sequence[Record]) -> str:
    settings, seeds = about["settings"], len({row["seed"] for row in rows})
    minutes = sum(row["wall_s"] for row in rows) / 60
    by_time = any(row.by_time for row in TABLES[about["table"]].rows(BUDGETS[about["budget"]]))
    cost = f"{settings['seconds']:g} s" if by_time else f"{settings['flops']:.2g} FLOP"
    several = "one seed"
    if seeds > 1:
        measured = {len(group) for group in by_label(rows)}
        several = f"the mean of {seeds} seeds (the least to the greatest)"
        if measured != {seeds}:
            several = f"the mean of {min(measured)} to {seeds} seeds, as the table is not complete"
        with_cas = {row["seed"] for row in rows if "cas" in row["scores"]}
        if 0 < len(with_cas) < seeds:
            several += f", CAS of {len(with_cas)}"
    return (
        f"{several}; at most {cost} of training a row; {minutes:.0f} min for all rows, less what"
        f" earlier tables or interrupted calls had made. Features: {about['features_about']}."
        f" Device: {about['device']}. {about['machine']}. Command: `{about['command']}`."
    )


def plot_of(about: Record, rows: Sequence[Record]) -> bytes | None:
    """A PNG of the distance along what the table varies, a line per kind of row.

    None if the table has no plot, or no row of one yet.
    """
    table = TABLES[about["table"]]
    if table.across is None:
        return None
    series: dict[str, list[tuple[float, float]]] = {}
    for group in by_label(rows):
        label = dict(group[0]["label"])
        x = label.pop(table.across, group[0].get(table.across))
        label.pop("steps", None)
        if x is None or not group[0]["evaluations"]:
            continue
        values = [row["scores"]["fd"] for row in group]
        name = ", ".join(map(str, label.values()))
        series.setdefault(name, []).append((float(x), sum(values) / len(values)))
    if not series:
        return None
    places, heights = zip(*itertools.chain.from_iterable(series.values()), strict=True)
    return pictures.line_plot(
        {name: sorted(points) for name, points in series.items()},
        x_label=table.across,
        y_label="Fréchet distance (lower is better)",
        title=table.title,
        log_scale=_are_far_apart(heights),
        log_x=_are_far_apart(places),
    )


def _are_far_apart(values: Sequence[float]) -> bool:
    return 0 < 10 * min(values) < max(values)


def name_of(about: Record) -> str:
    """The name of a table's files."""
    return f"{about['table']}_{about['budget']}"


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- ablations: {name} -->", "<!-- end -->"


def section_in(page: str, name: str) -> str | None:
    """The table that a page has between its marks, or None."""
    begin, end = _marks(name)
    found = re.search(f"{re.escape(begin)}\n(.*?)\n{re.escape(end)}", page, re.DOTALL)
    return found and found.group(1)


def write_into(path: pathlib.Path, name: str, text: str) -> None:
    """Puts a table between its marks on a page. Raises UserError if they are not there."""
    page, (begin, end) = path.read_text(), _marks(name)
    old = section_in(page, name)
    if old is None:
        raise UserError(f"{path}: expected the lines {begin!r} and {end!r}, to write between them")
    new = page.replace(f"{begin}\n{old}\n{end}", f"{begin}\n{text}\n{end}")
    write_whole(path, new.encode())

"""Matplotlib figures of samples and fairness, and their way into any logger.

Matplotlib is imported by the functions, so that this module stays light, and pyplot's global state is never used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Colours that the colour-blind tell apart (Okabe and Ito, 2008), ordered by contrast on white."""
TRUTH, PREDICTION = "#56B4E9", "#F0E442"
"""Contours of the truth and of the prediction: apart in hue and lightness, both visible on skin and on fundus."""
_PICTURE_INCHES = 2.56


def overlay(image: ArrayLike, truth: ArrayLike, prediction: ArrayLike) -> Figure:
    """Draw the contours of the truth and of the prediction over an image, without margins.

    Args:
        image: (C, H, W), see :func:`to_pixels`.
        truth: (1, H, W) or (H, W) class indices, 0 the background.
        prediction: class indices of the same size.
    """
    pixels = to_pixels(image)
    height, width = pixels.shape[:2]
    scale = _PICTURE_INCHES / max(height, width)
    figure = _figure(width * scale, height * scale, dpi=200)
    axes = figure.add_axes((0, 0, 1, 1))
    show(axes, pixels)
    draw_contours(axes, truth, TRUTH, width=3.2)
    draw_contours(axes, prediction, PREDICTION, width=1.4)
    return figure


def sample_grid(images: Sequence[ArrayLike], truths: Sequence[ArrayLike], predictions: Sequence[ArrayLike]) -> Figure:
    """Draw a column for each sample: the image, the truth's contours on it, the prediction's contours on it.

    Args:
        images: N images (C, H, W).
        truths: N masks (1, H, W) of class indices.
        predictions: N masks (1, H, W) of class indices.
    """
    height, width = np.shape(images[0])[-2:]
    # Event files keep every grid of a run, so its resolution is low.
    figure = _figure(1.5 * len(images) + 0.4, 4.7 * height / width, dpi=80, layout="constrained")
    grid = figure.subplots(3, len(images), squeeze=False)
    for column, (image, truth, prediction) in enumerate(zip(images, truths, predictions, strict=True)):
        for axes in grid[:, column]:
            show(axes, to_pixels(image))
        draw_contours(grid[1, column], truth, TRUTH)
        draw_contours(grid[2, column], prediction, PREDICTION)
    for axes, label in zip(grid[:, 0], ("image", "truth", "prediction"), strict=True):
        axes.text(-0.06, 0.5, label, rotation=90, ha="right", va="center", transform=axes.transAxes)
    return figure


def picture_grid(rows: Mapping[str, Sequence[ArrayLike]], columns: Sequence[str]) -> Figure:
    """Draw pictures in named rows and columns.

    Args:
        rows: label -> pictures (C, H, W) in [0, 1], one for each column.
        columns: titles of the columns.
    """
    height, width = np.shape(next(iter(rows.values()))[0])[-2:]
    size = (1.5 * len(columns) + 0.4, (1.5 * height / width + 0.05) * len(rows) + 0.3)
    figure = _figure(*size, dpi=80, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (label, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            show(axes, to_pixels(picture))
        line[0].text(-0.06, 0.5, label, rotation=90, ha="right", va="center", transform=line[0].transAxes)
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title, fontsize=9)
    return figure


def class_colours(mask: ArrayLike) -> NDArray[np.float64]:
    """Colour class indices (1, H, W) as a picture (3, H, W) in [0, 1]; the background is white."""
    from matplotlib.colors import to_rgb

    colours = np.array([to_rgb("white"), *map(to_rgb, PALETTE)])
    indices = np.asarray(mask)[0]
    inner = 1 + (indices - 1) % len(PALETTE)
    painted: NDArray[np.float64] = colours[np.where(indices > 0, inner, 0)].transpose(2, 0, 1)
    return painted


def group_bars(
    groups: Sequence[str],
    counts: Sequence[int],
    values: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    overall: ArrayLike,
    classes: Sequence[str],
    metric: str = "Dice",
) -> Figure:
    """Draw a panel of horizontal bars for each class: a bar for each group, its interval, the overall value as a line.

    Args:
        groups: names of the G groups.
        counts: images of each group.
        values: (G, C) in [0, 1]; NaN draws no bar.
        low: (G, C) lower ends of the intervals; NaN draws none.
        high: (G, C) upper ends.
        overall: (C,) values over all groups.
        classes: names of the C classes.
        metric: name on the axis.
    """
    value, lower, upper, line = (np.asarray(x, dtype=float) for x in (values, low, high, overall))
    figure = _figure(1.8 + 3.1 * len(classes), 1.0 + 0.42 * len(groups), layout="constrained")
    panels = figure.subplots(1, len(classes), sharey=True, squeeze=False, gridspec_kw={"wspace": 0.06})[0]
    rows, ticks = np.arange(len(groups)), (0, 0.2, 0.4, 0.6, 0.8, 1)
    for index, (axes, name) in enumerate(zip(panels, classes, strict=True)):
        bars = np.nan_to_num(value[:, index])
        axes.barh(rows, bars, height=0.62, color=PALETTE[index % len(PALETTE)], alpha=0.85, zorder=2)
        known = ~np.isnan(lower[:, index] + upper[:, index])
        reach = np.clip(np.stack((bars - lower[:, index], upper[:, index] - bars))[:, known], 0, None)
        axes.errorbar(bars[known], rows[known], xerr=reach, fmt="none", ecolor="#222222", capsize=3, lw=1.3, zorder=3)
        if not np.isnan(line[index]):
            axes.axvline(line[index], color="#222222", lw=1, ls=(0, (4, 3)), zorder=4)
        axes.set(xlim=(0, 1), xlabel=metric)
        axes.set_title(name, loc="left", fontweight="bold", fontsize=11)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.grid(axis="x", color="#DDDDDD", lw=0.8, zorder=0)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(rows, [f"{group}  (n={n})" for group, n in zip(groups, counts, strict=True)])
    panels[0].invert_yaxis()
    return figure


def heat_map(matrix: ArrayLike, rows: Sequence[str], columns: Sequence[str], title: str) -> Figure:
    """Draw a matrix (R, K) of shares in [0, 1] with its numbers; NaN cells are grey."""
    values = np.asarray(matrix, dtype=float)
    figure = _figure(1.8 + 0.62 * len(columns), 1.1 + 0.42 * len(rows), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("#DDDDDD")
    top = max(np.nanmax(values, initial=0.0), 1e-12)
    axes.imshow(np.ma.masked_invalid(values), cmap="cividis", vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value < top / 2 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title)
    return figure


def log_figure(trainer_or_loggers: Trainer | Iterable[Logger], tag: str, figure: Figure, step: int) -> None:
    """Hand a figure to every logger that takes pictures; the others are left alone.

    Served are ``logger.log_image`` (Weights & Biases), ``experiment.add_figure`` (TensorBoard) and
    ``experiment.log_figure`` (MLflow, where the logger has a ``run_id``; Comet).

    Args:
        trainer_or_loggers: a Trainer or its loggers.
        tag: name of the picture, such as ``val/samples``.
        figure: what to log.
        step: the global step that the picture shows.
    """
    loggers: Any = getattr(trainer_or_loggers, "loggers", trainer_or_loggers)
    for logger in loggers:
        experiment = logger.experiment
        if hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[figure], step=step)
        elif hasattr(experiment, "add_figure"):
            experiment.add_figure(tag, figure, step)
        elif hasattr(experiment, "log_figure") and hasattr(logger, "run_id"):
            experiment.log_figure(logger.run_id, figure, f"{tag}/{step:08d}.png")
        elif hasattr(experiment, "log_figure"):
            experiment.log_figure(figure_name=tag, figure=figure, step=step)


def to_pixels(image: ArrayLike) -> NDArray[np.float64]:
    """Turn an image into (H, W) grey or (H, W, 3) colour for display.

    Args:
        image: (C, H, W); three channels are RGB, otherwise the first is shown. Values outside [0, 1] are rescaled.
    """
    array = np.asarray(image, dtype=float)
    array = array.transpose(1, 2, 0) if len(array) == 3 else array[0]
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        array = (array - low) / max(high - low, 1e-12)
    return array


def show(axes: Axes, pixels: NDArray[np.float64]) -> None:
    """Show pixels without axes around them."""
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
    axes.set_axis_off()


def draw_contours(axes: Axes, mask: ArrayLike, colour: str, width: float = 1.5) -> None:
    """Draw the border of every foreground class of a mask in one colour, on a dark halo."""
    from matplotlib import patheffects

    halo = [patheffects.withStroke(linewidth=width + 0.8, foreground="#000000C0")]
    indices = np.asarray(mask).reshape(np.shape(mask)[-2:])
    for index in np.unique(indices[indices > 0]):
        region = indices == index
        if not region.all():
            axes.contour(region, levels=[0.5], colors=colour, linewidths=width, path_effects=halo)


def _figure(width: float, height: float, dpi: int = 150, layout: Any = None) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout=layout)
    FigureCanvasAgg(figure)
    return figure

"""Plots, with matplotlib from the `plot` extra."""

import importlib.util
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from vit_jax.analysis.attention import (
    attention_distance,
    embedding_filters,
    filter_components,
    inspect_attention,
    overlay,
    position_similarity,
)
from vit_jax.checkpoints.load import Loaded
from vit_jax.errors import UserError
from vit_jax.extras import install
from vit_jax.models.config import ResNetConfig, ViTConfig
from vit_jax.training.config import read_config
from vit_jax.training.metrics import read_metrics
from vit_jax.writing import make_folder, replacing

_COLOURS = "viridis"
_LAYERS, _HEADS = 6, 8  # at most, in the picture of attention maps
_SHARES = ("accuracy", "mAP", "pixel_accuracy", "miou", "map", "ap50")  # beside the loss
_TILES = 16  # to a side of the picture of positions; of larger grids some are left out


def curves(workdir: str | os.PathLike) -> Any:
    """Plots a run's loss, and accuracy, mAP, mIoU or AP, by step; returns a matplotlib Figure.

    Training metrics are those of single batches: faint, below their running mean.

    Raises:
      UserError: nothing has been measured in this run folder, or no matplotlib.
    """
    lines = read_metrics(workdir)
    if not lines:
        raise UserError(f"{os.fspath(workdir)} has no metrics.jsonl with measurements to plot")
    config = read_config(workdir)
    names = {name.partition("/")[2] for line in lines for name in line}
    shown = ["loss", *(name for name in _SHARES if name in names)]
    figure = new_figure(4.6 * len(shown), 3.5)
    for axes, name in zip(np.ravel(figure.subplots(1, len(shown))), shown, strict=True):
        for split, colour in (("train", "C0"), ("val", "C1"), ("test", "C2")):
            points = [(x["step"], x[f"{split}/{name}"]) for x in lines if f"{split}/{name}" in x]
            if points:
                _curve(axes, split, np.array(points, np.float64), colour)
        axes.set(xlabel=f"step ({config.batch_size:,} images each)", ylabel=name)
        if name == "loss" and config.classifies and not config.detects:
            axes.set_ylabel("loss (cross-entropy, nats)")
        elif name != "loss":
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.margins(x=0.03)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(Path(os.path.abspath(workdir)).name, fontsize=10)
    return figure


def _curve(axes: Any, split: str, points: Float[np.ndarray, "n 2"], colour: str) -> None:
    """Plots the steps and values of a metric; those of training with their running mean."""
    steps, values = points.T
    window = len(points) // 16 * 2 + 1 if split == "train" else 1  # odd, so that it has a centre
    if window == 1:
        marker = "o" if len(points) < 30 else None
        label = f"{split}, one batch" if split == "train" else split
        axes.plot(steps, values, marker=marker, markersize=4, label=label, color=colour, zorder=3)
        return
    ones = np.ones(window)
    mean = np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, mean, color=colour, label=f"{split}, mean of {window} batches")


def write_curves(workdir: str | os.PathLike) -> Path | None:
    """Plots `curves` to WORKDIR/curves.png; returns its path, None if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    path = Path(workdir) / "curves.png"
    with replacing(path) as temporary:
        curves(workdir).savefig(temporary, format="png", dpi=110)
    return path


def pictures(
    vit: Loaded, folder: str | os.PathLike, images: Sequence[str | os.PathLike] = ()
) -> tuple[list[Path], list[str]]:
    """Plots a model's filters.png and positions.png, and with images, its attention.

    These are attention_distance.png and, for each image file NAME.jpg, attention_NAME.png (by layer
    and head) and rollout_NAME.png (through all layers).

    Returns:
      The paths written, and a sentence on each plot that this model cannot have.

    Raises:
      UserError: no matplotlib, an image that cannot be read, or a folder that is a file.
    """
    figures, notes = {"filters": filters(filter_components(embedding_filters(vit.model)))}, []
    make_folder(folder, "--pictures")
    if isinstance(vit.config, ResNetConfig):
        notes.append("a ResNet has neither positions nor attention: there are only its filters")
        images = ()
    elif vit.config.position == "none":
        notes.append("there is no positions.png: the model has no position embeddings")
    elif vit.config.position == "rope":
        notes.append("there is no positions.png: rotary positions add nothing to the tokens")
    elif vit.config.position in ("relative", "relative_bias"):
        notes.append("there is no positions.png: relative positions are of offsets, not of places")
    else:
        figures["positions"] = positions(position_similarity(vit.model))
    if images:
        seen = inspect_attention(vit, images)
        figures["attention_distance"] = distances(seen.distance, vit.config)
        titles = _titles(vit, images)
        for i, (name, title) in enumerate(zip(_names(images), titles, strict=True)):
            maps, rollout = seen.maps[:, i], seen.rollout[i]
            figures[f"attention_{name}"] = attended_by_heads(seen.images[i], maps, title)
            figures[f"rollout_{name}"] = attended(seen.images[i], rollout, title)
    paths = [Path(folder) / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    return paths, notes


def _names(paths: Iterable[str | os.PathLike]) -> list[str]:
    """The files' names without folder and suffix, numbered if two are the same."""
    names: list[str] = []
    for path in paths:
        stem = name = Path(path).stem
        number = 1
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names.append(name)
    return names


def _titles(vit: Loaded, images: Sequence[str | os.PathLike]) -> list[str]:
    """The name of each image's file and, if the model has classes, what it predicts."""
    titles = [Path(path).name for path in images]
    if vit.labels:
        best = [top for (top,) in vit.predict(images, topk=1)]
        titles = [
            f"{t}: predicted {label}, {p:.1%}" for t, (label, p) in zip(titles, best, strict=True)
        ]
    return [title.replace("$", r"\$") for title in titles]  # else of mathematics


def filters(components: Float[np.ndarray, "n p q c"]) -> Any:
    """Plots the principal components of the first layer's filters (Figure 7, left).

    Each is scaled by its largest value; zero is grey. If the channels are not RGB, their mean is
    shown.
    """
    count = len(components)
    columns = min(7, count)
    rows = -(-count // columns)
    figure = new_figure(max(columns * 0.9, 3.6), rows * 0.9 + 0.3)
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, component in zip(cells, components, strict=False):
        _show(axes, 0.5 + component / np.abs(component).max() / 2)
    for axes in cells[count:]:
        axes.set_visible(False)
    figure.suptitle(f"Embedding filters, first {count} principal components", fontsize=10)
    return figure


def positions(similarity: Float[np.ndarray, "gh gw gh gw"]) -> Any:
    """Plots the similarity of position embeddings (Figure 7, centre): a grid of grids.

    The tile in row i and column j compares the patch there with all patches.
    """
    gh, gw = similarity.shape[:2]
    rows, columns = (
        np.linspace(0, side - 1, min(side, _TILES)).round().astype(int) for side in (gh, gw)
    )
    gap = max(1, round(max(gh, gw) / 12))
    mosaic = np.full((len(rows) * (gh + gap) - gap, len(columns) * (gw + gap) - gap), np.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            top, left = i * (gh + gap), j * (gw + gap)
            mosaic[top : top + gh, left : left + gw] = similarity[row, column]
    height = min(max(5.5 * mosaic.shape[0] / mosaic.shape[1], 2.0), 11.0)
    figure = new_figure(6.6, height)
    axes = figure.subplots()
    drawn = axes.imshow(mosaic, cmap=_COLOURS, vmin=-1, vmax=1, interpolation="nearest")
    axes.set_xticks(np.arange(len(columns)) * (gw + gap) + (gw - 1) / 2, columns + 1)
    axes.set_yticks(np.arange(len(rows)) * (gh + gap) + (gh - 1) / 2, rows + 1)
    axes.set(xlabel="patch column", ylabel="patch row")
    axes.set_title("Position embedding similarity", fontsize=10)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    figure.colorbar(drawn, label="cosine similarity", shrink=0.8)
    return figure


def distances(distance: Float[np.ndarray, "depth heads"], config: ViTConfig) -> Any:
    """Plots the attention distance of each head by depth (Figure 7, right); one dot a head.

    The dashed line is the distance of a head with uniform attention.
    """
    depth, heads = distance.shape
    n = config.grid[0] * config.grid[1]
    even = np.full((1, 1, 1, n, n), 1 / n, np.float32)
    even = float(attention_distance(even, config.grid, 0, config.patch_pixels)[0, 0])
    figure = new_figure(5.2, 3.8)
    axes = figure.subplots()
    layer, head = np.mgrid[1 : depth + 1, 1 : heads + 1]
    axes.axhline(even, color="grey", linestyle="--", linewidth=1, label="all patches alike")
    dots = axes.scatter(layer, distance, c=head, cmap=_COLOURS, s=22, alpha=0.8, linewidth=0)
    axes.set_xlim(0.4, depth + 0.6)
    axes.set_ylim(0, 1.1 * max(even, float(distance.max())) or 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("network depth (layer)")
    axes.set_ylabel("mean attention distance (pixels of {}x{})".format(*config.image_size))
    axes.set_title("Attention distance", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    ticks = np.linspace(1, heads, min(heads, 8)).round()
    figure.colorbar(dots, label="head", ticks=ticks, format="%d")
    return figure


def attended(
    image: Float[np.ndarray, "h w c"], attention: Float[np.ndarray, "gh gw"], title: str = ""
) -> Any:
    """Plots an image, the image darkened where attention is low (Figure 6), and the map."""
    h, w, _ = image.shape
    edges = (-0.5, w - 0.5, h - 0.5, -0.5)  # of the pixels, whose centres are whole numbers
    figure = new_figure(9.0, min(max(2.7 * h / w, 1), 8) + 0.5 + 0.3 * bool(title))
    figure.suptitle(title, fontsize=11)
    left, middle, right = figure.subplots(1, 3)
    for axes, name, panel in (
        (left, "image", image),
        (middle, "darkened by attention", overlay(image, attention)),
    ):
        _show(axes, panel)
        axes.set_title(name, fontsize=10)
    share = attention / max(attention.max(), np.finfo(np.float32).tiny)
    drawn = right.imshow(share, cmap=_COLOURS, vmin=0, vmax=1, extent=edges)
    right.set_title("attention by patch", fontsize=10)
    _bare(right)
    figure.colorbar(drawn, label="share of the largest", shrink=0.8)
    return figure


def attended_by_heads(
    image: Float[np.ndarray, "h w c"],
    maps: Float[np.ndarray, "depth heads gh gw"],
    title: str = "",
) -> Any:
    """Plots the output's attention by layer (rows) and head (appendix D.8).

    Each panel shows the map in colour, divided by its maximum, over the image in grey: attention
    may be on so few patches that a darkened image would be black. For deep models and many heads,
    evenly spaced ones are shown, including the first and the last.
    """
    (depth, heads), (h, w, _) = maps.shape[:2], image.shape
    layers, columns = (
        np.linspace(0, size - 1, min(size, most)).round().astype(int)
        for size, most in ((depth, _LAYERS), (heads, _HEADS))
    )
    edges = (-0.5, w - 0.5, h - 0.5, -0.5)
    across = max(1.4, 3.6 / len(columns))  # inches a panel; the title needs some width
    down = min(max(across * h / w, 0.6), 4.0)  # and the layer's name some height
    height = len(layers) * down + 0.6 + 0.3 * bool(title)
    figure = new_figure(len(columns) * across + 1.2, height)
    cells = figure.subplots(len(layers), len(columns), squeeze=False)
    for row, layer in zip(cells, layers, strict=True):
        for axes, head in zip(row, columns, strict=True):
            _show(axes, image.mean(axis=-1, keepdims=True))
            share = maps[layer, head] / max(maps[layer, head].max(), np.finfo(np.float32).tiny)
            drawn = axes.imshow(share, cmap="inferno", vmin=0, vmax=1, alpha=0.6, extent=edges)
        row[0].set_ylabel(f"layer {layer + 1}", fontsize=8)
    for axes, head in zip(cells[0], columns, strict=True):
        axes.set_title(f"head {head + 1}", fontsize=8)
    figure.suptitle(f"{title}\n".lstrip() + "Attention of the output", fontsize=10)
    scale = figure.colorbar(drawn, ax=cells, shrink=min(1.0, 3 / height), aspect=15)
    scale.set_label("share of each panel's largest", fontsize=8)
    scale.ax.tick_params(labelsize=8)
    return figure


def segmented(
    images: UInt8[np.ndarray, "n h w c"] | Float[np.ndarray, "n h w c"],
    masks: Int[np.ndarray, "n h w"],
    predictions: Int[np.ndarray, "n h w"],
) -> Any:
    """Plots images above their true and predicted masks; class 0 is black.

    Pixels are uint8, or in [0, 1].
    """
    images = images / 255 if images.dtype == np.uint8 else images
    n, h, w, _ = images.shape
    figure = new_figure(max(1.2 * n + 0.8, 2.4), 3.6 * min(max(h / w, 0.3), 3))
    cells = figure.subplots(3, n, squeeze=False)
    colours = _classes(int(max(masks.max(), predictions.max())) + 1)
    for column, image in zip(cells.T, images, strict=True):
        _show(column[0], image)
    for row, found in zip(cells[1:], (masks, predictions), strict=True):
        for axes, mask in zip(row, found, strict=True):
            axes.imshow(colours[mask], interpolation="nearest")
            _bare(axes)
    for axes, title in zip(cells[:, 0], ("image", "truth", "prediction"), strict=True):
        axes.set_ylabel(title, fontsize=8)
    return figure


def _classes(count: int) -> Float[np.ndarray, "{count} 3"]:
    """A colour for each class: black, then hues around the circle, neighbours well apart."""
    from matplotlib.colors import hsv_to_rgb

    index = np.arange(count)
    golden = (index * 0.618034) % 1  # steps of the golden section never come back
    colours = hsv_to_rgb(np.stack([golden, np.full(count, 0.7), 1 - 0.3 * (index % 2)], axis=1))
    colours[0] = 0
    return colours


def new_figure(width: float, height: float) -> Any:
    """An empty Figure, with its size in inches, that needs no display; notebooks show it."""
    try:
        from matplotlib.figure import Figure as Base
    except ImportError:
        raise UserError(
            f"pictures are drawn with matplotlib, which is missing: {install('plot')}"
        ) from None

    class Figure(Base):
        def _repr_png_(self) -> bytes:  # what a notebook asks for, even if nothing imports pyplot
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=100)
            return file.getvalue()

    return Figure(figsize=(width, height), layout="constrained")


def _show(axes: Any, image: Float[np.ndarray, "h w c"]) -> None:
    """Draws pixels in [0, 1] as they are: RGB, or else the mean of the channels in grey."""
    if image.shape[-1] != 3:
        image = image.mean(axis=-1)
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    _bare(axes)


def _bare(axes: Any) -> None:
    """Removes ticks and leaves only a thin frame, against the white of the page."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(linewidth=0.5, color="grey")

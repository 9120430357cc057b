"""Pictures of a model's quality: confusion, reliability, and a page of its worst mistakes.

Drawn with matplotlib from the `plot` extra; the page is HTML without network, scripts or fonts.
"""

import base64
import html
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Int64

from vit_jax.analysis.plots import new_figure
from vit_jax.data.pictures import fitted, stored
from vit_jax.training.evaluation.assess import FITTED_ON, Quality
from vit_jax.training.evaluation.predictions import Predictions
from vit_jax.training.evaluation.quality import Confusion, Reliability
from vit_jax.writing import make_folder, replacing, write_atomically

MOST_CLASSES = 24  # in the picture of a confusion matrix; of more, those that are most confused
MOST_MISTAKES = 60  # on the page
_NAME = 28  # characters of a class name in a picture, at most
_RIGHT, _WRONG = "#9cc3dd", "#b3401a"


def check(folder: str | os.PathLike) -> None:
    """Raises a UserError if there is no matplotlib, or the folder is a file; makes the folder."""
    new_figure(1.0, 1.0)
    make_folder(folder, "--pictures")


def write(
    folder: str | os.PathLike,
    found: Mapping[str, Quality],
    predictions: Mapping[str, Predictions],
    told: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Writes SPLIT_confusion.png, SPLIT_reliability.png, SPLIT_mistakes.html and SPLIT.json.

    Args:
      told: SPLIT.json's contents (see `evaluation_files.to_json`).

    Returns:
      A line on each file; there is no picture of what is not defined for the split.
    """
    lines = []
    for name, each in found.items():
        classes = predictions[name].source.label_names
        figures = {}
        if each.confusion is not None:
            figures["confusion"] = confusion(each.confusion, classes, name)
        if each.reliability is not None:
            figures["reliability"] = reliability(each.reliability, each.scaled, name)
        for kind, figure in figures.items():
            path = os.path.join(folder, f"{name}_{kind}.png")
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=130)
            lines.append(path)
        path = os.path.join(folder, f"{name}_mistakes.html")
        write_atomically(path, mistakes_page(name, each, predictions[name]))
        lines.append(path)
        path = os.path.join(folder, f"{name}.json")
        write_atomically(path, json.dumps(told[name], indent=1))
        lines.append(path)
    return lines


def confusion(found: Confusion, classes: Sequence[str], name: str) -> Any:
    """Plots a confusion matrix as shares of each row, with the numbers of images.

    Right predictions and mistakes have a scale each, as mistakes are few. Of more classes than
    MOST_CLASSES, those of the most frequent confusions are shown, and all others as one column.
    """
    chosen = found.chosen(MOST_CLASSES)
    rows, others = found.among(chosen)
    some, k = len(chosen) < found.num_classes, len(chosen)
    counts = np.column_stack([rows, others]) if some else rows
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    diagonal = np.eye(*counts.shape, dtype=bool)
    side = max(0.42 * k, 1.6)
    figure = new_figure(side * counts.shape[1] / k + 3.6, side + 1.9)
    axes = figure.subplots()
    for values, colours, most, what in (
        (np.ma.masked_array(shares, ~diagonal), "Blues", 1.0, "right"),
        (
            np.ma.masked_array(shares, diagonal | (counts == 0)),
            "Oranges",
            max(float(shares[~diagonal].max(initial=0.0)), 0.1),
            "mistaken",
        ),
    ):
        drawn = axes.imshow(values, cmap=colours, vmin=0, vmax=most)
        scale = figure.colorbar(drawn, shrink=min(1.0, 2.2 / side), aspect=14, pad=0.02)
        scale.set_label(f"{what}, share of the class", fontsize=8)
        scale.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        scale.ax.tick_params(labelsize=7)
    reach = np.where(diagonal, 1.0, max(float(shares[~diagonal].max(initial=0.0)), 0.1))
    for i, j in zip(*np.nonzero(counts), strict=True):
        colour = "white" if shares[i, j] > 0.6 * reach[i, j] else "#222222"
        axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=colour, fontsize=7)
    labels = [_short(classes[c]) for c in chosen]
    axes.set_xticks(range(counts.shape[1]), [*labels, "all others"] if some else labels)
    axes.set_yticks(range(k), labels)
    axes.tick_params(length=0, labelsize=8)
    if max(map(len, labels)) > 3:
        axes.tick_params(axis="x", rotation=90 if k > 2 else 0)
    axes.set_xticks(np.arange(counts.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(k + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    title = f"{name}: images of each class, by prediction"
    if some:
        title = f"{name}: the {k} most confused of {found.num_classes:,} classes"
    axes.set_title(title, fontsize=10)
    return figure


def reliability(found: Reliability, scaled: Reliability | None, name: str) -> Any:
    """Plots accuracy by confidence, and how many images have which; before and after scaling."""
    panels = [(found, "as it is")]
    if scaled is not None:
        panels.append((scaled, f"with the temperature fitted on {FITTED_ON}"))
    figure = new_figure(4.2 * len(panels) + 0.3, 5.2)
    cells = figure.subplots(2, len(panels), squeeze=False, sharex=True, height_ratios=[3, 1])
    for i, (each, title) in enumerate(panels):
        _reliability(cells[0, i], cells[1, i], each)
        cells[0, i].set_title(f"{name}, {title}: ECE {each.ece:.4f}", fontsize=10)
    cells[0, 0].set_ylabel("accuracy")
    cells[1, 0].set_ylabel("images")
    return figure


def _reliability(above: Any, below: Any, found: Reliability) -> None:
    m = len(found.images)
    left, width = np.arange(m) / m, 1 / m
    some = found.images > 0
    centre = left[some] + width / 2
    accuracy, confidence = found.accuracy[some], found.confidence[some]
    above.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="calibrated")
    above.bar(centre, accuracy, width, color=_RIGHT, edgecolor="white", label="accuracy")
    low, high = np.minimum(accuracy, confidence), np.maximum(accuracy, confidence)
    gap = dict(facecolor="none", edgecolor=_WRONG, hatch="////", linewidth=0.8)
    above.bar(centre, high - low, width, low, label="gap to the confidence", **gap)
    above.set(xlim=(0, 1), ylim=(0, 1))
    above.legend(fontsize=8, loc="upper left")
    below.bar(left + width / 2, found.images, width, color="#8a93a0", edgecolor="white")
    below.set(xlabel="confidence: probability of the prediction")
    below.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    below.locator_params(axis="y", nbins=4, integer=True)
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)


def _short(name: str, most: int = _NAME) -> str:
    name = "".join(c if c.isprintable() else " " for c in name).replace("$", r"\$")
    return name if len(name) <= most else f"{name[: most - 3]}..."


# The page of mistakes


def worst(found: Predictions, most: int = MOST_MISTAKES) -> Int64[np.ndarray, " m"]:
    """The rows of the mistakes that the model was most confident of, the worst first."""
    wrong = np.flatnonzero(~found.correct & found.labelled)
    return wrong[np.argsort(-found.log_predicted[wrong], kind="stable")][:most]


def mistakes_page(name: str, quality: Quality, found: Predictions) -> str:
    """Renders the worst mistakes as one self-contained HTML page, with their images."""
    rows = worst(found)
    wrong = quality.images - int(found.correct[found.labelled].sum())
    told = f"{wrong:,} of {quality.images:,} images are wrong, accuracy {quality.accuracy:.4f}"
    if wrong > len(rows):
        told += f", of which {len(rows)} are here"
    told += "; the model was most confident of the first" if wrong else ""
    title = f"{name}: the worst mistakes" if wrong else f"{name}: no mistakes"
    cards = "\n".join(_cards(found, rows))
    source = f"{found.split.source}, {found.split.split}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<title>{_safe(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{_safe(title)}</h1>
<p class="sub">{_safe(source)}: {_safe(told)}.</p>
<div class="grid">
{cards}
</div>
</main>
</body>
</html>
"""


def _cards(found: Predictions, rows: Int64[np.ndarray, " m"]) -> Iterator[str]:
    classes = found.source.label_names
    tiles = stored(found.source, found.positions[rows].tolist())
    for row, tile in zip(rows, tiles, strict=True):
        confidence = np.exp(found.log_predicted[row])
        if found.several is None:
            truth = classes[found.label[row]]
            bars = _bar("right", truth, np.exp(found.log_label[row]))
        else:
            truth = ", ".join(classes[c] for c in np.flatnonzero(found.label[row]))
            bars = f'<p class="who"><span>{_safe(truth)}</span></p>'
        bars = _bar("wrong", classes[found.predicted[row]], confidence) + bars
        image = '<div class="none">cannot be read</div>'
        if tile.image is not None:
            image = f'<img src="{_data(fitted(tile.image))}" alt="{_safe(truth)}">'
        yield (
            f'<figure><div class="shown">{image}</div>{bars}'
            f"<figcaption>{_safe(tile.note)}</figcaption></figure>"
        )


def _bar(kind: str, name: str, probability: float | np.floating) -> str:
    """A class with its probability, as text and as a bar."""
    share = 100 * float(probability)
    text = f"{share:.1f}%" if 0.05 <= share < 99.95 else "< 0.1%" if share < 50 else "> 99.9%"
    return (
        f'<p class="who {kind}"><span>{_safe(name)}</span><b>{_safe(text)}</b></p>'
        f'<div class="bar {kind}"><i style="width:{share:.1f}%"></i></div>'
    )


def _data(image: PIL.Image.Image) -> str:
    """An image as a data: URL, lossless if it has few colours."""
    few = image.getcolors(4096) is not None
    file = io.BytesIO()
    image.save(file, "PNG" if few else "JPEG", **({} if few else {"quality": 88}))
    kind = "png" if few else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _safe(words: str) -> str:
    return html.escape("".join(c if c.isprintable() else " " for c in words))


_STYLE = """
:root { color-scheme: light dark; --paper: #f7f6f3; --card: #fff; --ink: #1b2330; --soft: #5d6675;
 --line: #e4e1da; --right: #00795a; --wrong: #b3401a; }
@media (prefers-color-scheme: dark) { :root { --paper: #12151a; --card: #1a1e25; --ink: #e9e7e2;
 --soft: #9aa3b0; --line: #2c323c; --right: #3ccf9f; --wrong: #ff8f5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
 font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 28px 16px 40px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.02em; margin: 0; }
h1, .sub { overflow-wrap: anywhere; }
.sub { color: var(--soft); margin: 6px 0 22px; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); }
figure { margin: 0; padding: 12px; background: var(--card); border: 1px solid var(--line);
 border-radius: 12px; min-width: 0; }
.shown { height: 176px; display: flex; align-items: center; justify-content: center;
 background: var(--paper); border-radius: 8px; margin-bottom: 10px; overflow: hidden; }
.shown img { max-width: 100%; max-height: 100%; image-rendering: pixelated; }
.shown img[src^="data:image/jpeg"] { image-rendering: auto; }
.none { color: var(--soft); font-size: 13px; }
.who { display: flex; gap: 8px; justify-content: space-between; margin: 6px 0 2px;
 font-size: 14px; }
.who span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; min-width: 0; }
.who b { font-weight: 600; font-variant-numeric: tabular-nums; flex: none; }
.who span::before { color: var(--soft); font-size: 12px; }
.wrong span::before { content: "predicted "; } .right span::before { content: "true "; }
.bar { height: 5px; border-radius: 3px; background: var(--line); }
.bar i { display: block; height: 5px; border-radius: 3px; min-width: 2px; }
.bar.wrong i { background: var(--wrong); } .bar.right i { background: var(--right); }
.wrong b { color: var(--wrong); } .right b { color: var(--right); }
figcaption { color: var(--soft); font-size: 12px; margin-top: 8px; overflow: hidden;
 text-overflow: ellipsis; white-space: nowrap; }
"""

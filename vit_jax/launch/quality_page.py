"""The sections of a report's page about evaluations: tables, confusions, reliability, classes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vit_jax.launch.parts import COLOURS, html_table, safe, swatch, ticks
from vit_jax.launch.quality import (
    CLASSES,
    Evaluated,
    by_split,
    class_table,
    overview,
    pair_table,
    pairs,
)
from vit_jax.launch.report import number
from vit_jax.training.evaluation.assess import FITTED_ON
from vit_jax.training.evaluation.quality import Confusion

_CHARTS = 6  # runs with pictures, at most
_MOST = 16  # classes in a picture of confusion
_SIZE, _LEFT, _TOP = 360, 74, 8  # of a picture, and where its axes begin
_SIDE = _SIZE - _LEFT - 6  # of its square


def sections(found: Sequence[Evaluated], notes: Sequence[str], keys: Mapping[str, int]) -> str:
    """The sections as HTML; "" if nothing was evaluated.

    Args:
      notes: on files that are damaged.
      keys: the number of each run folder's colour.
    """
    parts = []
    if found:
        swatches = [swatch(keys[each.run.folder]) for each in found]
        said = "ECE is the expected calibration error in 15 bins (arXiv 1706.04599)"
        said += f", scaled that with the temperature fitted on {FITTED_ON}. Intervals are of 95%, "
        said += "by bootstrap over images."
        parts.append(_section("Evaluated", html_table(overview(found), swatches), said))
    compared, different = pairs(found)
    if compared:
        swatches = [swatch(keys[each.second.folder]) for each in compared]
        said = "Each run is beside the most accurate one on the same images. p is of McNemar's test"
        said += " (exact), for each pair alone: of many pairs, some are small by chance. The "
        said += "difference is in accuracy, its interval by bootstrap over images."
        parts.append(_section("Image by image", html_table(pair_table(compared), swatches), said))
    told = [f'<p class="said">{safe(note)}.</p>' for note in (*different, *notes)]
    parts += [f"<section>{''.join(told)}</section>"] if told else []
    for split, runs in list(by_split(found).items())[:1]:
        charts = "\n".join(chart for each in runs[:_CHARTS] for chart in _charts(each, keys))
        if charts:
            some = f" of the {_CHARTS} most accurate runs" if len(runs) > _CHARTS else ""
            title = f"Confusion and calibration <small>on {safe(split)}{some}</small>"
            parts.append(_section(title, f'<div class="grid">{charts}</div>'))
        if classes := class_table(runs):
            table, count = classes
            some = f"the {CLASSES} weakest of {count:,}, " if count > CLASSES else "weakest first, "
            title = f"Classes <small>on {safe(split)}, {some}by {safe(runs[0].run.name)}</small>"
            said = "Intervals are Wilson's, of 95%. What is not defined, as of a class without "
            said += "images, has a dash."
            parts.append(_section(title, html_table(table, [""] * len(table.rows)), said))
    return "\n".join(parts)


def _section(title: str, content: str, said: str = "") -> str:
    """A section; `title` and `content` are HTML, `said` is text below it."""
    below = f'<p class="said">{safe(said)}</p>' if said else ""
    return f"<section>\n<h2>{title}</h2>\n{content}\n{below}</section>"


def _charts(each: Evaluated, keys: Mapping[str, int]) -> Iterator[str]:
    colour = keys[each.run.folder] % COLOURS
    if each.stored.confusion is not None:
        classes = [row["name"] for row in each.stored.told["classes"]]
        yield _confusion(each.run.name, each.stored.confusion, classes)
    if (each.stored.told["calibration"] or {}).get("as_is"):
        yield _reliability(each.run.name, each.stored.told["calibration"], colour)


def _figure(name: str, what: str, kind: str, drawn: Sequence[str]) -> str:
    return f"""<figure>
<figcaption><b>{safe(name)}</b><span>{safe(what)}</span></figcaption>
<svg class="chart" viewBox="0 0 {_SIZE} {_TOP + _SIDE + 34}" role="img" \
aria-label="{safe(kind)} of {safe(name)}">
{"".join(drawn)}</svg>
</figure>"""


def _confusion(name: str, found: Confusion, classes: Sequence[str]) -> str:
    """The matrix, in shares of each row; of many classes those of the most frequent mistakes."""
    chosen = found.chosen(_MOST)
    rows, others = found.among(chosen)
    size, totals = _SIDE / len(chosen), rows.sum(axis=1) + others
    shares = rows / np.maximum(totals, 1)[:, None]
    most = shares[~np.eye(len(rows), dtype=bool)].max(initial=0.0)
    brief = max(len(classes[c]) for c in chosen) <= 3 or len(chosen) <= 4
    drawn = []
    for i, label in enumerate(chosen):
        y, title = _TOP + i * size, _cut(classes[label])
        drawn.append(f'<text x="{_LEFT - 5}" y="{y + size / 2 + 3.5:.1f}">{title}</text>')
        if brief:
            place = f'x="{_LEFT + (i + 0.5) * size:.1f}" y="{_TOP + _SIDE + 14}"'
            drawn.append(f'<text class="x" {place}>{title}</text>')
        for j, predicted in enumerate(chosen):
            if not rows[i, j]:
                continue
            kind = "hit" if i == j else "miss"
            strength = 0.85 * shares[i, j] if i == j else 0.1 + 0.75 * shares[i, j] / most
            box = f'x="{_LEFT + j * size:.1f}" y="{y:.1f}" width="{size:.1f}" height="{size:.1f}"'
            told = f"{classes[label]} as {classes[predicted]}: {rows[i, j]:,} of {totals[i]:,}"
            drawn.append(
                f'<rect class="{kind}" {box} fill-opacity="{strength:.2f}">'
                f"<title>{safe(told)}</title></rect>"
            )
            if size >= 16:
                place = f'x="{_LEFT + (j + 0.5) * size:.1f}" y="{y + size / 2 + 3.2:.1f}"'
                drawn.append(f'<text class="on" {place}>{rows[i, j]}</text>')
    lines = "".join(
        f"M{_LEFT} {_TOP + i * size:.1f}h{_SIDE}M{_LEFT + i * size:.1f} {_TOP}v{_SIDE}"
        for i in range(len(chosen) + 1)
    )
    drawn.append(f'<path class="cell" d="{lines}"/>')
    middle = _LEFT + _SIDE / 2
    drawn.append(f'<text class="x" x="{middle}" y="{_TOP + _SIDE + 30}">predicted class</text>')
    some = len(chosen) < found.num_classes
    what = f"the {len(chosen)} most confused classes" if some else "true class by predicted class"
    return _figure(name, what, "confusion", drawn)


def _cut(name: str) -> str:
    return safe(name if len(name) <= 12 else f"{name[:10]}…")


def _reliability(name: str, calibration: Mapping[str, Any], colour: int) -> str:
    """Accuracy by confidence, a circle for each bin, as large as its share of the images."""

    def at(x: int | float, y: int | float) -> str:
        return f"{_LEFT + _SIDE * x:.1f} {_TOP + _SIDE * (1 - y):.1f}"

    drawn = [f'<path class="ideal" d="M{at(0, 0)}L{at(1, 1)}"/>']
    for value in ticks(0.0, 1.0, 5):
        drawn.append(f'<path class="rule" d="M{at(0, value)}h{_SIDE}M{at(value, 0)}v-{_SIDE}"/>')
        x, y = at(0, value).split()
        drawn.append(f'<text x="{float(x) - 6:.1f}" y="{float(y) + 3.5:.1f}">{value:.1f}</text>')
        x, y = at(value, 0).split()
        drawn.append(f'<text class="x" x="{x}" y="{float(y) + 14:.1f}">{value:.1f}</text>')
    told = []
    for key, title, c in (("as_is", "as it is", colour), ("scaled", "scaled", COLOURS - 1)):
        found = calibration.get(key)
        if not found:
            continue
        told.append(f"{title} {number(found['ece'])}")
        total = sum(found["images"])
        bins = zip(found["images"], found["confidence"], found["accuracy"], strict=True)
        bins = [(n, x, y) for n, x, y in bins if n]
        places = " ".join(at(x, y).replace(" ", ",") for _, x, y in bins)
        drawn.append(f'<polyline class="c{c}" points="{places}"/>')
        for n, x, y in bins:
            cx, cy = at(x, y).split()
            radius = 2 + 9 * (n / total) ** 0.5
            drawn.append(
                f'<circle class="c{c}" cx="{cx}" cy="{cy}" r="{radius:.1f}">'
                f"<title>{n:,} images: confidence {x:.3f}, accuracy {y:.3f}</title></circle>"
            )
    middle = _LEFT + _SIDE / 2
    drawn.append(f'<text class="x" x="{middle}" y="{_TOP + _SIDE + 30}">confidence</text>')
    y = _TOP + _SIDE / 2
    turned = f'transform="rotate(-90 {_LEFT - 44} {y})"'
    drawn.append(f'<text class="x" x="{_LEFT - 44}" y="{y}" {turned}>accuracy</text>')
    return _figure(name, f"ECE {', '.join(told)}", "reliability", drawn)

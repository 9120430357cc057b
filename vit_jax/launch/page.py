"""Writes a report as one self-contained HTML page, without network, libraries or fonts.

It works without its script (page.js), which adds sorting, hiding and reading off values. Its
content security policy blocks other scripts and all requests. Its style is page.css.
"""

import base64
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from importlib import resources

from etils import epath

from vit_jax.errors import UserError
from vit_jax.launch.comparison import Run, read_runs
from vit_jax.launch.found_page import found_markdown, found_section
from vit_jax.launch.parts import COLOURS, html_table, safe, swatch, ticks
from vit_jax.launch.quality import Evaluated, markdown_of, read_all
from vit_jax.launch.quality_page import sections
from vit_jax.launch.report import (
    Group,
    Report,
    compare,
    curve_names,
    group_table,
    markdown,
    number,
    run_table,
    short,
    summary,
    text,
    title,
)
from vit_jax.writing import write_atomically

logger = logging.getLogger(__name__)

_POINTS = 200  # of a curve, at most
_WIDTH, _HEIGHT = 360, 216  # of a picture, in the pixels of a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 350, 8, 190


def write_report(folders: Sequence[str], out: str | None = None) -> str:
    """Writes the HTML report of some run folders or sweeps to `out`, with a Markdown table.

    Args:
      out: FILE.html; by default report.html in the first folder.

    Returns:
      The table, in Markdown, which is also written next to the page.

    Raises:
      UserError: a folder is neither a run's nor a sweep's, or nothing in them can be read.
    """
    path = epath.Path(out or os.path.join(folders[0], "report.html"))
    if path.suffix != ".html":
        raise UserError(f"--out is {out}; expected FILE.html, beside which FILE.md is written")
    report = compare(read_runs(folders), title(folders))
    evaluated, notes = read_all(report.runs)
    table = markdown(report) + markdown_of(evaluated, notes) + found_markdown(report)
    beside = path.with_suffix(".md")
    if beside.exists() and not path.exists():  # such as README.md
        raise UserError(
            f"{beside}, which would be written beside {path}, is there and no report: name another "
            "--out=FILE.html"
        )
    write_atomically(path, html_page(report, evaluated, notes))
    write_atomically(beside, table)
    logger.info("%s", path)
    return table


def html_page(
    report: Report, evaluated: Sequence[Evaluated] = (), notes: Sequence[str] = ()
) -> str:
    """Renders a report as HTML, with what was evaluated of its runs (see `quality.read_all`)."""
    keys = _legend(report)
    here = resources.files("vit_jax.launch")
    style, script = (here.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found = found_section(report, keys)
    images = "; img-src data:" if found else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'sha256-{policy}'{images}">
<title>{safe(report.title)}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
<h1>{safe(report.title)}</h1>
<p class="sub">{safe(summary(report))}</p>
</header>
{_best(report)}
{_groups(report, keys)}
{_curves(report, keys)}
<section>
<h2>Runs</h2>
{_runs(report, keys)}
</section>
{found}
{sections(evaluated, notes, keys)}
{_footer(report)}
</main>
<script>{script}</script>
</body>
</html>
"""


def _legend(report: Report) -> dict[str, int]:
    """Colour numbers by run folder; runs of a group share one."""
    if report.groups:
        return {run.folder: i for i, group in enumerate(report.groups) for run in group.runs}
    return {run.folder: i for i, run in enumerate(report.runs)}


def _best(report: Report) -> str:
    best = report.best
    if best is None:
        return '<p class="card">Nothing has been measured yet.</p>'
    scores = [(report.metric, best.last(report.metric)), (report.test, best.last(report.test))]
    scores_html = "".join(
        f'<div class="score"><b>{number(value)}</b><span>{safe(name)}</span></div>'
        for name, value in scores
        if name is not None and value is not None
    )
    settings = [(key, best.settings[key]) for key in report.varied if key in best.settings]
    chips = "".join(
        f"<li>{safe(short(key, report.varied))} <b>{safe(text(value))}</b></li>"
        for key, value in settings[:8]
    )
    return f"""<section class="card best">
<div class="what"><p class="label">Best by {safe(report.metric)}</p>
<h2>{safe(best.name)}</h2>
<ul class="chips">{chips}</ul></div>
<div class="scores">{scores_html}</div>
</section>"""


def _groups(report: Report, keys: Mapping[str, int]) -> str:
    if not report.groups:
        return ""
    values = [value for group in report.groups for value in group.values(report.metric)]
    table = group_table(report)
    strips = [_strip(group, report, keys, values) for group in report.groups]
    swatches = [swatch(keys[group.runs[0].folder]) for group in report.groups]
    return f"""<section>
<h2>Over seeds</h2>
{html_table(table, swatches, extra=("each seed, and the mean", strips))}
</section>"""


def _strip(group: Group, report: Report, keys: Mapping[str, int], values: Sequence[float]) -> str:
    """A dot for each seed and a bar for their mean, on the same scale for all groups."""
    low, high = min(values, default=0.0), max(values, default=1.0)

    def x(value: float) -> float:
        return 8 + 164 * ((value - low) / (high - low) if high > low else 0.5)

    dots = "".join(f'<circle cx="{x(v):.1f}" cy="11" r="4"/>' for v in group.values(report.metric))
    mean = group.mean(report.metric)
    bar = "" if mean is None else f'<path d="M{x(mean):.1f} 2v18"/>'
    return (
        f'<svg class="strip c{keys[group.runs[0].folder] % COLOURS}" viewBox="0 0 180 22" '
        f'width="180" height="22" aria-hidden="true"><path class="rule" d="M8 11h164"/>'
        f"{dots}{bar}</svg>"
    )


def _curves(report: Report, keys: Mapping[str, int]) -> str:
    names = curve_names(report)
    if not names:
        return ""
    labels = [group.label for group in report.groups] or [run.name for run in report.runs]
    drawn = {keys[run.folder] for run in report.runs if any(name in run.curves for name in names)}
    buttons = "".join(
        f'<button type="button" aria-pressed="true" data-g="{i}">{swatch(i)}'
        f"<span>{safe(label)}</span></button>"
        for i, label in enumerate(labels)
        if i in drawn
    )
    figures = "\n".join(_figure(name, report.runs, keys, report.best) for name in names)
    return f"""<section>
<h2>Curves <small>by step</small></h2>
<div class="legend">{buttons}</div>
<div class="grid">
{figures}
</div>
</section>"""


def _figure(name: str, runs: Sequence[Run], keys: Mapping[str, int], best: Run | None) -> str:
    """Plots one metric of all runs; the axes span the data."""
    shown = [(run, thinned(run.curves[name])) for run in runs if run.curves.get(name)]
    values = [value for _, points in shown for _, value in points]
    steps = [float(step) for _, points in shown for step, _ in points]
    low, high = min(values), max(values)
    room = (high - low or abs(high) or 1.0) * 0.05
    low, high, first, last = low - room, high + room, min(steps), max(steps)

    def x(step: float | int) -> float:
        return _LEFT + (_RIGHT - _LEFT) * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (value - low) / (high - low)

    lines = []
    for value in ticks(low, high, 5):
        lines.append(f'<path class="rule" d="M{_LEFT} {y(value):.1f}H{_RIGHT}"/>')
        lines.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}">{value:.6g}</text>')
    for step in ticks(first, last, 5):
        lines.append(f'<text class="x" x="{x(step):.1f}" y="{_BOTTOM + 18}">{_steps(step)}</text>')
    for run, points in sorted(shown, key=lambda each: each[0] is best):
        i = keys[run.folder]
        kind = f"c{i % COLOURS} d{i // COLOURS % 3}{' top' if run is best else ''}"
        places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        data = " ".join(f"{step}:{value:.6g}" for step, value in points)
        attributes = f'class="{kind}" data-g="{i}" data-n="{safe(run.name)}" data-p="{data}"'
        lines.append(f'<polyline {attributes} points="{places}"/>')
        step, value = points[-1]
        lines.append(
            f'<circle class="{kind}" data-g="{i}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5"/>'
        )
    return f"""<figure>
<figcaption><b>{safe(name)}</b><output></output></figcaption>
<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" \
aria-label="{safe(name)} by step, of {len(shown)} runs">
{"".join(lines)}
<circle class="mark" r="4.5"/></svg>
</figure>"""


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Thins a curve to at most _POINTS evenly spaced points, including both ends."""
    if len(points) <= _POINTS:
        return list(points)
    share = (len(points) - 1) / (_POINTS - 1)
    return [points[round(i * share)] for i in range(_POINTS)]


def _steps(step: float) -> str:
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if step >= size:
            return f"{step / min(size, 1e6 if letter == 'M' else 1e3):g}{letter}"
    return f"{step:g}"


def _runs(report: Report, keys: Mapping[str, int]) -> str:
    swatches = [swatch(keys[run.folder]) for run in report.runs]
    best = None if report.best is None else report.runs.index(report.best)
    return html_table(run_table(report), swatches, best=best)


def _footer(report: Report) -> str:
    paragraphs = []
    if report.common:
        same = ", ".join(f"{key}={text(value)}" for key, value in report.common.items())
        paragraphs.append(f"The same in all runs: {safe(same)}.")
    paragraphs.append(
        "Runs are compared by the last value of their metric, that of the weights they keep; those "
        "that are not finished count only where none is. std is of the sample (n - 1). Images/s is "
        "the median; device-hours are seconds times devices."
    )
    return f"<footer>{''.join(f'<p>{each}</p>' for each in paragraphs)}</footer>"

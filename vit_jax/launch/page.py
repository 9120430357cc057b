"""A report as one HTML page that needs nothing else: no network, no library, no font.

All of it works without its script, which adds sorting, hiding and reading off values. The page's
own policy lets no other script run, and nothing be fetched.
"""

import base64
import hashlib
import html
import math
import re
from collections.abc import Mapping, Sequence

from vit_jax.launch.compared import Run
from vit_jax.launch.report import (
    Group,
    Report,
    Table,
    curve_names,
    group_table,
    number,
    printable,
    run_table,
    short,
    summary,
    text,
)

_COLOURS = 7  # those of the style; then they come again, dashed
_POINTS = 200  # of a curve, at most
_WIDTH, _HEIGHT = 360, 216  # of a picture, in the pixels of a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 350, 8, 190
_SYMBOLS = {"finished": "✓", "running": "▸", "failed": "✕", "stopped": "■", "waiting": "…"}


def html_page(report: Report) -> str:
    """Draws the report."""
    keys = _legend(report)
    policy = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'sha256-{policy}'">
<title>{_safe(report.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{_safe(report.title)}</h1>
<p class="sub">{_safe(summary(report))}</p>
</header>
{_best(report)}
{_groups(report, keys)}
{_curves(report, keys)}
<section>
<h2>Runs</h2>
{_runs(report, keys)}
</section>
{_footer(report)}
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _safe(words: str) -> str:
    return html.escape(printable(words))


def _breakable(words: str) -> str:
    """A name that may go on in another line after what joins its parts."""
    return re.sub(r"([,_/])", r"\1<wbr>", _safe(words))


def _legend(report: Report) -> dict[str, int]:
    """The number of each run's colour, by its folder; the runs of a group share one."""
    if report.groups:
        return {run.folder: i for i, group in enumerate(report.groups) for run in group.runs}
    return {run.folder: i for i, run in enumerate(report.runs)}


def _best(report: Report) -> str:
    best = report.best
    if best is None:
        return '<p class="card">Nothing has been measured yet.</p>'
    scores = [(report.metric, best.last(report.metric)), (report.test, best.last(report.test))]
    told = "".join(
        f'<div class="score"><b>{number(value)}</b><span>{_safe(name)}</span></div>'
        for name, value in scores
        if name is not None and value is not None
    )
    settings = [(key, best.settings[key]) for key in report.varied if key in best.settings]
    chips = "".join(
        f"<li>{_safe(short(key, report.varied))} <b>{_safe(text(value))}</b></li>"
        for key, value in settings[:8]
    )
    return f"""<section class="card best">
<div class="what"><p class="label">Best by {_safe(report.metric)}</p>
<h2>{_safe(best.name)}</h2>
<ul class="chips">{chips}</ul></div>
<div class="scores">{told}</div>
</section>"""


def _groups(report: Report, keys: Mapping[str, int]) -> str:
    if not report.groups:
        return ""
    values = [value for group in report.groups for value in group.values(report.metric)]
    table = group_table(report)
    strips = [_strip(group, report, keys, values) for group in report.groups]
    swatches = [_swatch(keys[group.runs[0].folder]) for group in report.groups]
    return f"""<section>
<h2>Over seeds</h2>
{_table(table, swatches, extra=("each seed, and the mean", strips))}
</section>"""


def _strip(group: Group, report: Report, keys: Mapping[str, int], values: Sequence[float]) -> str:
    """Each seed as a dot, their mean as a bar, on the same scale for all groups."""
    low, high = min(values, default=0.0), max(values, default=1.0)

    def x(value: float) -> float:
        return 8 + 164 * ((value - low) / (high - low) if high > low else 0.5)

    dots = "".join(f'<circle cx="{x(v):.1f}" cy="11" r="4"/>' for v in group.values(report.metric))
    mean = group.mean(report.metric)
    bar = "" if mean is None else f'<path d="M{x(mean):.1f} 2v18"/>'
    return (
        f'<svg class="strip c{keys[group.runs[0].folder] % _COLOURS}" viewBox="0 0 180 22" '
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
        f'<button type="button" aria-pressed="true" data-g="{i}">{_swatch(i)}'
        f"<span>{_safe(label)}</span></button>"
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


def _swatch(i: int) -> str:
    return (
        f'<svg class="swatch c{i % _COLOURS} d{i // _COLOURS % 3}" viewBox="0 0 18 8" width="18" '
        'height="8" aria-hidden="true"><path d="M1 4h16"/></svg>'
    )


def _figure(name: str, runs: Sequence[Run], keys: Mapping[str, int], best: Run | None) -> str:
    """One metric of all runs; the scales are those of what there is."""
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
        kind = f"c{i % _COLOURS} d{i // _COLOURS % 3}{' top' if run is best else ''}"
        places = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        told = " ".join(f"{step}:{value:.6g}" for step, value in points)
        attributes = f'class="{kind}" data-g="{i}" data-n="{_safe(run.name)}" data-p="{told}"'
        lines.append(f'<polyline {attributes} points="{places}"/>')
        step, value = points[-1]
        lines.append(
            f'<circle class="{kind}" data-g="{i}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5"/>'
        )
    return f"""<figure>
<figcaption><b>{_safe(name)}</b><output></output></figcaption>
<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" \
aria-label="{_safe(name)} by step, of {len(shown)} runs">
{"".join(lines)}
<circle class="mark" r="4.5"/></svg>
</figure>"""


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most _POINTS of a curve, as far apart as each other, its ends among them."""
    if len(points) <= _POINTS:
        return list(points)
    share = (len(points) - 1) / (_POINTS - 1)
    return [points[round(i * share)] for i in range(_POINTS)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between two."""
    if not high > low:
        return [low]
    size = 10.0 ** math.floor(math.log10((high - low) / count))
    size *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * size) <= count)
    return [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _steps(step: float) -> str:
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if step >= size:
            return f"{step / min(size, 1e6 if letter == 'M' else 1e3):g}{letter}"
    return f"{step:g}"


def _runs(report: Report, keys: Mapping[str, int]) -> str:
    swatches = [_swatch(keys[run.folder]) for run in report.runs]
    best = None if report.best is None else report.runs.index(report.best)
    return _table(run_table(report), swatches, best=best)


def _table(
    table: Table,
    swatches: Sequence[str],
    best: int | None = None,
    extra: tuple[str, Sequence[str]] | None = None,
) -> str:
    """A table whose first column stays when the rest scrolls; `extra` is a last one, of HTML."""
    kinds = ["n" if right else "" for right in table.numeric]
    heads = "".join(
        f'<th scope="col" class="{kind}">{_safe(head)}</th>'
        for head, kind in zip(table.headers, kinds, strict=True)
    )
    heads += "" if extra is None else f"<th>{_safe(extra[0])}</th>"
    state = table.headers.index("state") if "state" in table.headers else None
    body = []
    for i, row in enumerate(table.rows):
        first = f'<th scope="row"><div>{swatches[i]}{_breakable(row[0])}</div></th>'
        cells = [f'<td class="{k}">{_safe(c)}</td>' for c, k in zip(row, kinds, strict=True)]
        if state is not None:
            symbol = _SYMBOLS.get(row[state], "")
            cells[state] = (
                f'<td class="s {_safe(row[state])}"><i>{symbol}</i>{_safe(row[state])}</td>'
            )
        cells[0] = first
        cells += [] if extra is None else [f"<td>{extra[1][i]}</td>"]
        body.append(f"<tr{' class=won' if i == best else ''}>{''.join(cells)}</tr>")
    rows = "\n".join(body)
    return f"""<div class="scroll" tabindex="0"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>"""


def _footer(report: Report) -> str:
    told = []
    if report.common:
        same = ", ".join(f"{key}={text(value)}" for key, value in report.common.items())
        told.append(f"The same in all runs: {_safe(same)}.")
    told.append(
        "Runs are compared by the last value of their metric, that of the weights they keep; those "
        "that are not finished count only where none is. std is of the sample (n - 1). Images/s is "
        "the median; device-hours are seconds times devices."
    )
    return f"<footer>{''.join(f'<p>{each}</p>' for each in told)}</footer>"


# Colours after Okabe and Ito, which stay apart for the colour-blind, a little darker on white.
_STYLE = """
:root { color-scheme: light dark; --paper: #f7f6f3; --card: #fff; --ink: #1b2330; --soft: #5d6675;
 --line: #e4e1da; --good: #00795a; --bad: #b3401a;
 --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b8609a; --c4: #c48a00; --c5: #3f9fd8;
 --c6: #6d7480; }
@media (prefers-color-scheme: dark) { :root { --paper: #12151a; --card: #1a1e25; --ink: #e9e7e2;
 --soft: #9aa3b0; --line: #2c323c; --good: #3ccf9f; --bad: #ff8f5c;
 --c0: #4ba6ea; --c1: #f5813a; --c2: #2cc79a; --c3: #e091c2; --c4: #e8b33b; --c5: #8fd0f7;
 --c6: #a3abb8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
 font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1280px; margin: 0 auto; padding: 28px 16px 40px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.02em; margin: 0; }
h2 { font-size: 17px; line-height: 1.3; letter-spacing: -0.01em; margin: 0 0 12px; }
h2 small { color: var(--soft); font-size: 13px; font-weight: 400; letter-spacing: 0; }
h1, h2, .chips li, .legend, .sub, footer { overflow-wrap: anywhere; }
section { margin-top: 32px; }
.sub { color: var(--soft); margin: 6px 0 0; }
.card, .scroll, figure { background: var(--card); border: 1px solid var(--line);
 border-radius: 12px; }
.card { padding: 20px; margin-top: 24px; }
.best { display: flex; flex-wrap: wrap; gap: 16px 48px; justify-content: space-between; }
.best .what { flex: 1 1 260px; min-width: 0; }
.best h2 { font-size: 20px; margin: 2px 0 10px; }
.label, .score span { color: var(--soft); font-size: 13px; margin: 0; }
.scores { display: flex; gap: 32px; align-items: center; }
.score b { display: block; font-size: 32px; line-height: 1.15; letter-spacing: -0.02em;
 font-weight: 650; font-variant-numeric: tabular-nums; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; list-style: none; margin: 0; padding: 0; }
.chips li { border: 1px solid var(--line); border-radius: 6px; padding: 1px 8px; font-size: 13px;
 color: var(--soft); }
.chips b { color: var(--ink); font-weight: 600; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: separate; border-spacing: 0; font-size: 14px; min-width: 100%;
 font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: left; white-space: nowrap; font-weight: 400; }
thead th { color: var(--soft); font-size: 12.5px; line-height: 1.3; vertical-align: bottom;
 white-space: normal; }
.js thead th.n, .js thead th[data-k] { cursor: pointer; }
tbody th, tbody td { border-top: 1px solid var(--line); }
thead th:first-child, tbody th { position: sticky; left: 0; background: var(--card); z-index: 1; }
tbody th div { position: relative; width: max-content; max-width: min(40vw, 340px);
 white-space: normal; overflow-wrap: anywhere; line-height: 1.35; padding-left: 26px; }
tbody th .swatch { position: absolute; left: 0; top: 6px; }
.n { text-align: right; }
tr.won th, tr.won td { font-weight: 650; }
td.s i { font-style: normal; display: inline-block; width: 1.4em; color: var(--soft); }
td.finished i { color: var(--good); } td.failed, td.failed i { color: var(--bad); }
th[aria-sort]::after { content: " ↓"; } th[aria-sort=ascending]::after { content: " ↑"; }
.legend { display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: 12px; }
button { font: inherit; font-size: 13px; line-height: 1.4; color: inherit; background: var(--card);
 border: 1px solid var(--line); border-radius: 8px; padding: 5px 10px; text-align: left;
 cursor: pointer; max-width: 100%; }
button[aria-pressed=false] { opacity: 0.45; text-decoration: line-through; }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
.grid { display: grid; gap: 16px;
 grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { margin: 0; padding: 14px 10px 8px 12px; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 10px; min-height: 24px; font-size: 14px;
 justify-content: space-between; padding: 0 4px 6px; overflow-wrap: anywhere; }
figcaption b { font-weight: 600; } output { color: var(--soft); font-size: 13px;
 font-variant-numeric: tabular-nums; }
.plot { display: block; width: 100%; height: auto; overflow: visible; touch-action: pan-y; }
.plot text { font-size: 11.5px; fill: var(--soft); text-anchor: end; }
.plot text.x { text-anchor: middle; }
.rule { stroke: var(--line); stroke-width: 1; fill: none; }
polyline { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round;
 stroke-linecap: round; opacity: 0.85; } polyline.top { stroke-width: 2.8; opacity: 1; }
.plot circle { fill: var(--c); } .plot circle.mark { display: none; fill: none;
 stroke: var(--ink); stroke-width: 1.5; }
.swatch { margin-right: 8px; vertical-align: middle; flex: none; }
.swatch path { stroke: var(--c); stroke-width: 3; fill: none; }
.strip circle { fill: var(--c); opacity: 0.55; }
.strip path:not(.rule) { stroke: var(--c); stroke-width: 3; stroke-linecap: round; }
.strip { display: block; }
.d1 { stroke-dasharray: 6 4; } .d2 { stroke-dasharray: 1.5 4; }
circle.d1, circle.d2 { stroke-dasharray: none; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); }
.off { display: none; } .dim [data-g]:not(.lit) { opacity: 0.12; }
footer { margin-top: 36px; color: var(--soft); font-size: 13px; max-width: 75ch; }
footer p { margin: 0 0 8px; }
@media (min-width: 700px) { main { padding: 48px 32px 64px; } h1 { font-size: 34px; }
 .score b { font-size: 40px; } .card { padding: 24px 28px; } }
"""

_SCRIPT = """
const all = (what, inside = document) => [...inside.querySelectorAll(what)];
document.body.classList.add("js");
for (const button of all("button[data-g]")) {
  const mine = all(`.plot [data-g="${button.dataset.g}"]`);
  button.onclick = () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", on);
    mine.forEach((each) => each.classList.toggle("off", !on));
  };
  button.onpointerenter = (event) => {
    if (event.pointerType !== "mouse") return;
    all(".plot").forEach((plot) => plot.classList.add("dim"));
    mine.forEach((each) => each.classList.add("lit"));
  };
  button.onpointerleave = () => {
    all(".plot").forEach((plot) => plot.classList.remove("dim"));
    mine.forEach((each) => each.classList.remove("lit"));
  };
}
for (const plot of all(".plot")) {
  const mark = plot.querySelector(".mark");
  const told = plot.parentElement.querySelector("output");
  plot.onpointermove = plot.onpointerdown = (event) => {
    const box = plot.getBoundingClientRect();
    const scale = plot.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = null;
    for (const line of all("polyline:not(.off)", plot)) {
      [...line.points].forEach((point, i) => {
        const far = Math.hypot(2 * (point.x - x), point.y - y);
        if (!best || far < best.far) best = { far, point, line, i };
      });
    }
    if (!best) return;
    const [step, value] = best.line.dataset.p.split(" ")[best.i].split(":");
    told.textContent = `${best.line.dataset.n}, step ${step}: ${value}`;
    mark.setAttribute("cx", best.point.x);
    mark.setAttribute("cy", best.point.y);
    mark.style.display = "inline";
  };
  plot.onpointerleave = () => { mark.style.display = "none"; told.textContent = ""; };
}
const value = (row, i) => {
  const told = row.cells[i].textContent.trim();
  return row.cells[i].className === "n" ? (parseFloat(told) || -Infinity) : told;
};
for (const table of all("table")) {
  const heads = all("thead th", table);
  heads.forEach((head, i) => {
    head.dataset.k = i;
    head.onclick = () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = all("tbody tr", table);
      rows.sort((a, b) => {
        const [p, q] = [value(a, i), value(b, i)];
        return (p < q ? 1 : p > q ? -1 : 0) * (down ? 1 : -1);
      });
      table.tBodies[0].append(...rows);
    };
  });
}
"""

"""Pieces of an HTML page: escaped text, swatches of colour, tables, ticks of an axis."""

import html
import math
import re
from collections.abc import Sequence

from vit_jax.launch.report import Table, printable

COLOURS = 7  # those of the style; then they come again, dashed
_SYMBOLS = {"finished": "✓", "running": "▸", "failed": "✕", "stopped": "■", "waiting": "…"}


def safe(words: str) -> str:
    """Escapes text, control characters included, for HTML."""
    return html.escape(printable(words))


def breakable(words: str) -> str:
    """Escapes a name, and allows line breaks after the characters that join its parts."""
    return re.sub(r"([,_/])", r"\1<wbr>", safe(words))


def swatch(i: int) -> str:
    """A short line in the style of run i, as SVG."""
    return (
        f'<svg class="swatch c{i % COLOURS} d{i // COLOURS % 3}" viewBox="0 0 18 8" width="18" '
        'height="8" aria-hidden="true"><path d="M1 4h16"/></svg>'
    )


def html_table(
    table: Table,
    swatches: Sequence[str],
    best: int | None = None,
    extra: tuple[str, Sequence[str]] | None = None,
) -> str:
    """An HTML table with a fixed first column; `extra` is one more column, already in HTML."""
    kinds = ["n" if right else "" for right in table.numeric]
    heads = "".join(
        f'<th scope="col" class="{kind}">{safe(head)}</th>'
        for head, kind in zip(table.headers, kinds, strict=True)
    )
    heads += "" if extra is None else f"<th>{safe(extra[0])}</th>"
    state = table.headers.index("state") if "state" in table.headers else None
    body = []
    for i, row in enumerate(table.rows):
        first = f'<th scope="row"><div>{swatches[i]}{breakable(row[0])}</div></th>'
        cells = [f'<td class="{k}">{safe(c)}</td>' for c, k in zip(row, kinds, strict=True)]
        if state is not None:
            symbol = _SYMBOLS.get(row[state], "")
            cells[state] = (
                f'<td class="s {safe(row[state])}"><i>{symbol}</i>{safe(row[state])}</td>'
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


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round tick values between two numbers."""
    if not high > low:
        return [low]
    size = 10.0 ** math.floor(math.log10((high - low) / count))
    size *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * size) <= count)
    return [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]

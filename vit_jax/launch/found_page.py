"""What the models of runs find, in a report: the pictures.png of their folders."""

import base64
import io
import logging
import os
from collections.abc import Mapping

import PIL.Image

from vit_jax import buckets
from vit_jax.data.images import damaged
from vit_jax.errors import UserError
from vit_jax.launch.comparison import Run
from vit_jax.launch.parts import safe, swatch
from vit_jax.launch.report import Report, escape
from vit_jax.training.evaluation.files import PICTURES

logger = logging.getLogger(__name__)

_RUNS = 6  # whose pictures are on the page, at most; the best one first
_WIDTH, _HEIGHT, _QUALITY = 1280, 2560, 85  # of a picture on the page, a JPEG: those at most


def with_pictures(report: Report) -> list[Run]:
    """The runs that have pictures, the best of all first."""
    runs = [run for run in report.runs if os.path.isfile(os.path.join(run.folder, PICTURES))]
    return sorted(runs, key=lambda run: run is not report.best)


def found_markdown(report: Report) -> str:
    """A list of where the pictures are; "" if there are none."""
    places = [
        f"- {escape(run.name)}: {escape(os.path.join(buckets.shown(run.folder), PICTURES))}"
        for run in with_pictures(report)
    ]
    return "\n" + "\n".join(["What the models find:", "", *places]) + "\n" if places else ""


def found_section(report: Report, keys: Mapping[str, int]) -> str:
    """The section of a page, as HTML; "" if there are no pictures.

    Args:
      keys: the number of each run folder's colour.
    """
    runs = with_pictures(report)
    figures = [figure for run in runs[:_RUNS] if (figure := _figure(run, keys[run.folder]))]
    if not figures:
        return ""
    some = f" <small>of {len(figures)} of {len(runs)} runs</small>" if len(runs) > _RUNS else ""
    return f"""<section>
<h2>What the models find{some}</h2>
{"".join(figures)}
</section>"""


def _figure(run: Run, colour: int) -> str:
    """A run's picture, at the size of a page; "" and a warning if it is damaged."""
    path = os.path.join(run.folder, PICTURES)
    try:
        with open(path, "rb") as file:
            data = file.read()
        with damaged(data), PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
            picture = opened.convert("RGB")
    except (OSError, UserError) as error:
        logger.warning("%s is not on the page: %s", path, error)
        return ""
    picture.thumbnail((_WIDTH, _HEIGHT))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=_QUALITY, subsampling=0)  # which keeps thin lines' colours
    content = base64.b64encode(out.getvalue()).decode()
    return f"""<figure class="found">
<figcaption><span>{swatch(colour)}<b>{safe(run.name)}</b></span></figcaption>
<img width="{picture.width}" height="{picture.height}" alt="what {safe(run.name)} finds beside \
what is true" src="data:image/jpeg;base64,{content}">
</figure>"""

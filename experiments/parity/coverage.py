"""How many of timm's published Vision Transformers load, and compute what timm computes.

    PYTHONPATH=.:tests .venv-parity/bin/python experiments/parity/coverage.py

Each architecture of `MODULES` with published weights is built narrow and shallow, with random
weights, saved as on the hub, loaded, and run on the same images; the config.json of each of its
checkpoints is read at the published sizes. A checkpoint counts as loaded if the numbers are those
of timm in float64, and all that timm's model says of itself is in our config. What is refused is
listed with the sentence. Writes the table of README.md in this folder.
"""

import collections
import dataclasses
import datetime
import os
import pathlib
import re
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from parity import conftest  # noqa: F401  makes timm importable
from parity.references import TOLERANCE, error, interpreted, ours, pixels, randomise, truth_of_timm

import jax  # isort: skip
import numpy as np  # isort: skip
import timm  # isort: skip
import torch  # isort: skip
from timm.models._hub import save_for_hf  # isort: skip

import vit_jax
from vit_jax.errors import UserError

README = pathlib.Path(__file__).with_name("README.md")
START, END = "<!-- coverage -->", "<!-- end of coverage -->"
MODULES = (
    *("vision_transformer", "eva", "deit", "vision_transformer_hybrid", "beit"),
    *("vision_transformer_relpos", "naflexvit"),
)
NARROW = dict(embed_dim=48, num_heads=3)
# Some architectures take no image size, have a number of key heads for each block, or fixed widths.
SMALL = (
    dict(depth=2, **NARROW),
    dict(depth=2, num_kv_heads=(3, 1), **NARROW),
    dict(depth=2),
)


@dataclasses.dataclass(frozen=True)
class Found:
    """What became of one checkpoint: `loaded`, `refused` or `wrong`, and why."""

    module: str
    architecture: str
    checkpoint: str
    status: str
    why: str = ""


def shallow(name: str) -> torch.nn.Module:
    """A model without numbers at its published sizes; two blocks tell as much as all."""
    try:
        return timm.create_model(name, device="meta", depth=2)
    except AssertionError:  # it has as many numbers of heads as blocks
        return timm.create_model(name, device="meta")


def small(name: str) -> torch.nn.Module:
    """The architecture with two narrow blocks on 2x3 patches, and random weights."""
    patches: Any = getattr(shallow(name), "patch_embed", None)
    side = getattr(patches, "feat_ratio", lambda: getattr(patches, "patch_size", 16))()
    h, w = (side, side) if isinstance(side, int) else side
    last: Exception | None = None
    for sizes in SMALL:
        # NaFlex models are not of one size, but of that of their table.
        given = (dict(img_size=(2 * h, 3 * w)),)
        if name.startswith("naflexvit"):
            given = (dict(pos_embed_grid_size=(4, 4)),)
        for size in (*given, {}):
            try:
                model = timm.create_model(name, **sizes, **size)
            except (TypeError, AssertionError, ValueError, RuntimeError) as refusal:
                last = refusal
                continue
            return randomise(model)
    raise RuntimeError(f"{name} cannot be built small") from last


def compared(name: str, folder: pathlib.Path) -> tuple[str, str]:
    """Status of an architecture by its numbers, and why."""
    model = small(name)
    save_for_hf(model, folder, model_config={}, safe_serialization=True)
    try:
        vit = vit_jax.load(folder)
    except UserError as refusal:
        return "refused", re.sub(rf"{folder}(/[^:]*)?:? ", "", str(refusal))
    images = pixels(vit.config)
    with torch.no_grad():
        expected = model.double()(torch.tensor(images.transpose(0, 3, 1, 2)).double()).numpy()
    if vit.config.resnet is None:
        with jax.disable_jit():  # faster than compiling each model
            found = np.asarray(vit.model(images))
    else:
        found = np.asarray(ours(vit)["output"])
    if found.shape != expected.shape:
        return "wrong", f"{found.shape} where timm has {expected.shape}"
    off = error(found, expected)
    return ("loaded", "") if off < TOLERANCE else ("wrong", f"relative error {off:.1e}")


def read(checkpoint: str, folder: pathlib.Path) -> tuple[str, str]:
    """Status of a checkpoint by its config.json, at the published sizes, and why."""
    model = shallow(checkpoint)
    try:
        config = interpreted(model, folder)
    except UserError as refusal:
        return "refused", str(refusal)
    expected = truth_of_timm(model)
    told = {field: getattr(config, field) for field in expected}
    other = {
        field: (told[field], expected[field]) for field in told if told[field] != expected[field]
    }
    return ("wrong", str(other)) if other else ("loaded", "")


def coverage() -> Iterator[Found]:
    """What becomes of each published checkpoint of `MODULES`."""
    for module in MODULES:
        names = set(timm.list_models(module=module))
        published = collections.defaultdict(list)
        for checkpoint in timm.list_pretrained():
            if checkpoint.split(".")[0] in names:
                published[checkpoint.split(".")[0]].append(checkpoint)
        for name, checkpoints in published.items():
            with tempfile.TemporaryDirectory() as made:
                whole = compared(name, pathlib.Path(made))
                for checkpoint in checkpoints:
                    status, why = whole
                    if status == "loaded":
                        status, why = read(checkpoint, pathlib.Path(made))
                    yield Found(module, name, checkpoint, status, why)


def table(found: list[Found]) -> list[str]:
    """The section of README.md."""
    lines = [
        f"{datetime.date.today():%B %Y}, timm {timm.__version__}.",
        "",
        "| module of timm | architectures | published checkpoints | loaded | refused | wrong |",
        "|---|---|---|---|---|---|",
    ]
    rows = [(f"`{m}.py`", [each for each in found if each.module == m]) for m in MODULES]
    for title, each in (*rows, ("all", found)):
        counts = collections.Counter(one.status for one in each)
        cells = [len({one.architecture for one in each}), len(each)]
        cells += [counts[status] for status in ("loaded", "refused", "wrong")]
        lines.append(f"| {title} | {' | '.join(map(str, cells))} |")
    share = sum(one.status == "loaded" for one in found) / len(found)
    lines += ["", f"{share:.1%} of the published checkpoints load. The others:", ""]
    others = collections.defaultdict(list)
    for one in found:
        if one.status != "loaded":
            why = one.why.replace(one.architecture, "NAME").partition("; the nearest")[0]
            others[one.status, why].append(one)
    for (status, why), each in others.items():
        counts = collections.Counter(one.architecture for one in each)
        names = ", ".join(f"`{name}` ({count})" for name, count in counts.items())
        lines.append(f"- {status}: {why}. These are {names}.")
    return lines


def main() -> None:
    warnings.filterwarnings("ignore")
    found = []
    for one in coverage():
        found.append(one)
        if one.status != "loaded":
            print(f"{one.status:8} {one.checkpoint}: {one.why}", flush=True)
    lines = table(found)
    print("\n".join(lines))
    before, rest = README.read_text().split(START)
    README.write_text("\n".join([before + START, *lines, END]) + rest.split(END)[1])


if __name__ == "__main__":
    main()

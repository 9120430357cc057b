"""Against other libraries: collected only where torch, timm and transformers are installed."""

import datetime
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import sys

import pytest

README = pathlib.Path(__file__).parents[2] / "experiments" / "parity" / "README.md"
START, END = "<!-- the table -->", "<!-- end of the table -->"
# (family, reference) -> {what was compared: the largest relative error}
TABLE = {}

if not all(importlib.util.find_spec(name) for name in ("torch", "timm", "transformers")):
    collect_ignore_glob = ["test_*.py"]
else:
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # Built for another torch, so without its own operators. Nothing here calls them, but they
        # must be declared to be imported, for as long as this object lives.
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
        NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        OPERATORS.define(f"nms{NMS}")
        OPERATORS.define(f"qnms{NMS}")
        OPERATORS.define(
            "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
            "int pooled_width, int sampling_ratio, bool aligned) -> Tensor"
        )


@pytest.fixture(scope="session")
def record():
    """Notes a comparison for the table: family, reference, what was compared, relative error."""

    def note(family, reference, compared, error):
        found = TABLE.setdefault((family, reference), {})
        found[compared] = max(error, found.get(compared, 0))

    return note


@pytest.fixture(scope="module")
def folders(request, tmp_path_factory):
    """A folder for each case of a module, as timm pushes it to the hub."""
    from timm.models._hub import save_for_hf

    made, module = {}, request.module

    def folder(name):
        if name not in made:
            model, made[name] = module.model_of(name), tmp_path_factory.mktemp(name)
            names = getattr(module, "LABELS", [])[: model.num_classes]
            labels = {"label_names": names} if names else {}
            save_for_hf(model, made[name], model_config=labels, safe_serialization=True)
        return made[name]

    return folder


def rows(table):
    """The table in Markdown, one row for each family and reference."""
    lines = ["| family | reference | compared | largest relative error |", "|---|---|---|---|"]
    for (family, reference), errors in table.items():
        cells = (family, reference, ", ".join(errors), f"{max(errors.values()):.1e}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def versions():
    """When and with what the table was made."""
    names = ("jax", "flax", "numpy", "torch", "timm", "transformers")
    packages = [f"{name} {importlib.metadata.version(name)}" for name in names]
    date = datetime.date.today().strftime("%B %Y")
    return f"{date}; Python {platform.python_version()}, {', '.join(packages)}."


def whole(session):
    """Whether all of this folder runs, rather than a selection of it."""
    here = {path.name for path in pathlib.Path(__file__).parent.glob("test_*.py")}
    option = session.config.option
    chosen = option.keyword or option.markexpr or any("::" in arg for arg in session.config.args)
    split = hasattr(session.config, "workerinput")
    found = {item.path.name for item in getattr(session, "items", ())}
    return not chosen and not split and here <= found


def pytest_collection_modifyitems(items):
    """What reads the table runs after what fills it."""
    items.sort(key=lambda item: item.path.name == "test_readme.py")


def pytest_sessionfinish(session, exitstatus):
    if os.environ.get("VIT_JAX_WRITE_PARITY") and not session.testsfailed and whole(session):
        before, rest = README.read_text().split(START)
        after = rest.split(END)[1]
        lines = [before + START, versions(), "", *rows(TABLE), END]
        README.write_text("\n".join(lines) + after)

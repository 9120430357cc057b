"""Writes a model as a program with its weights, which runs without this package.

FILE.stablehlo is read by `jax.export.deserialize`, FILE.onnx by ONNX Runtime and others. Beside it,
FILE.stablehlo.json or FILE.onnx.json says what goes in and comes out.
"""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax import export
from jax.sharding import Mesh
from jaxtyping import Array

from vit_jax.checkpoints.card import OBJECTIVES, Line, ModelCard, Report, family_of
from vit_jax.checkpoints.opened import facts
from vit_jax.compiler import traced_for
from vit_jax.errors import UserError
from vit_jax.extras import install
from vit_jax.models.create import structure
from vit_jax.models.native import check_one_grid
from vit_jax.writing import write_atomically

ENDINGS = (".stablehlo", ".onnx")
PLATFORMS = ("cpu", "cuda", "tpu")
OPSET = 21  # of ONNX: since 2024, and the first with all that is used here is 20
_MOST_BYTES = 2_000_000_000  # the offsets inside both kinds of files have 31 bits
# What changes how a model is computed: of no device in particular, and what ONNX Runtime has.
_PLAIN = {"attention": "xla", "remat": "none"}
_PLAIN_ONNX = {**_PLAIN, "scan": False, "dtype": "float32"}


def write(
    path: str, params: Mapping[str, np.ndarray], card: ModelCard, *, preprocess: bool = False
) -> Report:
    """Writes a program for any number of images, and its description.

    Args:
      path: FILE.stablehlo, one for CPUs, NVIDIA GPUs and TPUs, or FILE.onnx.
      params: arrays by our paths.
      preprocess: whether it takes uint8 pixels [b h w c] of the model's size and normalises them;
        otherwise it takes normalised float32. Resizing is never in it.

    Raises:
      UserError: the model is too large for such a file, or what writes it is not installed.
    """
    check_one_grid(card.config)
    config, ending = card.config, os.path.splitext(path)[1].lower()
    size = 4 * sum(value.size for value in params.values())
    if size > _MOST_BYTES:
        raise UserError(
            f"{path}: a file of {ending} holds at most {_MOST_BYTES:,} bytes, and the parameters "
            f"are {size:,}: save weights instead, such as FILE.safetensors"
        )
    writer, plain = {".stablehlo": (_stablehlo, _PLAIN), ".onnx": (_onnx, _PLAIN_ONNX)}[ending]
    fields = {field.name for field in dataclasses.fields(config)}
    program = _program(
        params,
        dataclasses.replace(config, **{k: v for k, v in plain.items() if k in fields}),
        card.preprocess.normalise if preprocess else lambda images: images,
    )
    images = jax.ShapeDtypeStruct(
        (*export.symbolic_shape("b"), *config.image_size, config.in_channels),
        "uint8" if preprocess else "float32",
    )
    write_atomically(path, writer(path, program, images))
    outputs = jax.eval_shape(program, images)
    description = _description(card, images, outputs)
    write_atomically(f"{path}.json", json.dumps(description, indent=1))
    notes, answer = {}, description["outputs"]["values"]
    if ending == ".onnx" and config.dtype != "float32":
        notes["dtype"] = f"float32, where the model computes in {config.dtype}"
    taken = f"{images.dtype} {_spelt(images)}, {description['images']['values']}"
    return Report(
        tuple(Line(name, value.shape, "inside") for name, value in params.items()),
        facts(f"{ending[1:]}, {path}", config)
        | {"input": taken, "output": f"{outputs.dtype} {_spelt(outputs)}, {answer}"},
        notes,
    )


def _program(
    params: Mapping[str, np.ndarray], config: Any, before: Callable[[Array], Array]
) -> Callable[[Array], Array]:
    """The model as a function of images, traced as for CPUs, which all devices can run."""
    graphdef, nested = structure(config)[0], unflatten_dict(dict(params), sep="/")
    try:
        cpu = jax.devices("cpu")
    except RuntimeError:
        raise UserError(
            "programs are traced for CPUs, which JAX may not use here: add cpu to JAX_PLATFORMS"
        ) from None

    def program(images: Array) -> Array:
        return nnx.merge(graphdef, jax.tree.map(jnp.asarray, nested))(before(images))

    return traced_for(Mesh(cpu[:1], "x"), program)


def _stablehlo(path: str, program: Callable[[Array], Array], images: jax.ShapeDtypeStruct) -> bytes:
    exported = export.export(jax.jit(program), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def _onnx(path: str, program: Callable[[Array], Array], images: jax.ShapeDtypeStruct) -> bytes:
    try:
        import jax2onnx
    except ImportError:
        raise UserError(f"{path} needs jax2onnx: {install('onnx')}") from None
    names = dict(input_names=["images"], output_names=["outputs"])
    with _quiet("onnx_ir"):
        return jax2onnx.to_onnx(program, [images], opset=OPSET, **names).SerializeToString()


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Context in which a library's logger reports errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)


def _shape(array: jax.ShapeDtypeStruct) -> list[str | int]:
    return [side if isinstance(side, int) else str(side) for side in array.shape]


def _spelt(array: jax.ShapeDtypeStruct) -> str:
    return f"[{' '.join(map(str, array.shape))}]"


def _description(
    card: ModelCard, images: jax.ShapeDtypeStruct, outputs: jax.ShapeDtypeStruct
) -> dict[str, Any]:
    """What a program takes and gives, for people and other programs."""
    pixels = images.dtype == np.uint8
    said = {
        "shape": _shape(images),
        "dtype": str(images.dtype),
        "values": "pixels of 0 to 255"
        if pixels
        else "(pixel / 255 - mean) / std, of pixels of 0 to 255",
    }
    answer = f"logits ({card.objective})" if card.config.num_classes else "features"
    colours = {}
    if OBJECTIVES[card.objective].masks:
        answer += (
            " of each cell of a grid: interpolate them bilinearly between the cells' centres (not "
            "their corners) to the image's height and width; the largest is a pixel's class"
        )
        colours = {"palette": card.palette}
    if OBJECTIVES[card.objective].boxes:
        answer = (
            "of each location of the maps of 4, 2, 1 and 1/2 times the patch grid, row by row: the "
            "logits of the classes, the distances from its centre to the left, top, right and "
            "bottom edge of a box, in strides of its map, and a logit of centerness; a score is "
            "the root of the product of both logits' sigmoids"
        )
        colours = {"category_ids": card.category_ids}
    return {
        "images": {**dataclasses.asdict(card.preprocess), **said},
        "outputs": {"shape": _shape(outputs), "dtype": str(outputs.dtype), "values": answer},
        "labels": card.labels,
        **colours,
        "model": {"family": family_of(card.config), **dataclasses.asdict(card.config)},
    }

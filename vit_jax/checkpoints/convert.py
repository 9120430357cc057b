"""Converts weights of other code bases to ours: detect the format, infer the model, check all keys.

The steps: names and shapes -> dialect (the code base's naming scheme) -> rows of its table ->
ViTConfig -> expected shapes, compared one by one -> arrays, one parameter at a time.
"""

import concurrent.futures
import dataclasses
import functools
import math
import mmap
import os
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float32

from vit_jax.checkpoints import architectures, families, tables_dinov2, tables_parallel
from vit_jax.checkpoints.card import family_of, typed_config
from vit_jax.checkpoints.files import Weights, open_weights
from vit_jax.checkpoints.infer import infer
from vit_jax.checkpoints.keys import Patterns, choose, recognise, several, wrappers
from vit_jax.checkpoints.rows import Dialect, Found
from vit_jax.checkpoints.tables import FLAX_DINOV2, TIMM_PARALLEL, native
from vit_jax.checkpoints.tables_eva import HF_DINOV3, TIMM_EVA
from vit_jax.checkpoints.tables_hf import HF_SAPIENS2
from vit_jax.checkpoints.tables_naflex import flattened, told_apart
from vit_jax.errors import UserError, nearest
from vit_jax.models.config import FAMILIES, ModelConfig, ViTConfig
from vit_jax.models.create import structure

_FIELDS = {field.name for kind in FAMILIES.values() for field in dataclasses.fields(kind)}
_KINDS = {"vit": "a ViT", "resnet": "a ResNet"}


@dataclasses.dataclass(frozen=True)
class Foreign:
    """The weights of another code base's file, under our names.

    Attributes:
      dialect: the naming scheme of the file.
      config: the model.
      found: where each of our parameters is in the file.
      leftover: keys that are not part of the model.
      assumed: config fields that the file does not say, and why their values were chosen.
    """

    weights: Weights
    dialect: str
    config: ModelConfig
    found: dict[str, Found]
    leftover: tuple[str, ...]
    assumed: dict[str, str]

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return shapes_of(self.config)

    def read(self, name: str) -> Float32[np.ndarray, "..."]:
        """Reads one parameter by our path, such as "blocks/mlp/fc1/kernel"."""
        found, out = self.found[name], _pages(self.shapes[name])
        row, read = found.row, functools.partial(self._read_block, found, threading.local())
        if row.per_block:
            # Reading, checksums and transposes all release the GIL.
            with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
                list(pool.map(read, range(len(out)), out))
        elif row.in_stack and not row.plain:  # stacked in the file too
            arrays = [self.weights.read(key) for key in row.keys(found.prefix)]
            for block, each in enumerate(out):
                pieces = [array[block] for array in arrays]
                row.read(np.stack(pieces) if row.stacked else np.concatenate(pieces), each)
        else:
            read(0, out)
        return out

    def _read_block(self, found: Found, scratch: Any, block: int, into: np.ndarray) -> None:
        """Reads the arrays of one block into `into`; `scratch` holds one buffer a thread."""
        row = found.row
        keys = row.keys(found.prefix, block)
        shapes = [self.weights.shapes[key] for key in keys]
        if row.shared:
            shapes = row.shapes(into.shape)
        if row.plain:
            self.weights.read(keys[0], into.reshape(shapes[0]))
            return
        joint = getattr(scratch, "joint", None)
        if joint is None:
            joint = scratch.joint = _pages(row.joined(shapes))
        for key, piece in zip(keys, row.pieces(joint), strict=True):
            if self.weights.shapes[key] == piece.shape or not row.shared:
                self.weights.read(key, piece)
            else:  # heads of keys and values that several queries share
                heads = self.weights.read(key).reshape(-1, into.shape[-1], *piece.shape[1:])
                times = len(piece) // (len(heads) * into.shape[-1])
                piece[...] = heads.repeat(times, axis=0).reshape(piece.shape)
        row.read(joint, into)


def _pages(shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """Allocates an uninitialised, page-aligned array.

    On a CPU, JAX uses it without a copy, which needs 64-byte alignment. First-time filling of
    1.2 GB took 0.5 to 0.9 s, but 0.4 to 5 s in NumPy's arrays, if it asks for huge pages.
    """
    size = 4 * math.prod(shape)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.float32).reshape(shape)


@functools.lru_cache(maxsize=128)
def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model, by its path."""
    return {k: v.shape for k, v in flatten_dict(structure(config)[1], sep="/").items()}


def read_foreign(
    path: str,
    file_size: tuple[int, int] | None = None,
    architecture: str | None = None,
    only: Patterns = (),
    ignore: Patterns = (),
    **known: Any,
) -> Foreign:
    """Opens a weight file and accounts for each of its keys; reads no array yet.

    Args:
      file_size: the image size (h, w) in pixels, needed if the file does not say it and its
        position grid is not square.
      architecture: the name of the model in timm or transformers, overriding the config.json
        next to the file.
      only, ignore: patterns of keys (see `keys.choose`).
      known: config fields given by the caller, which override the file.

    Raises:
      UserError: the file is damaged, in no known dialect, or does not match a model: a key is
        missing, superfluous or has another shape.
    """
    weights = open_weights(path)
    if "adapter" in weights.card:
        raise UserError(
            f"{path} is an adapter (LoRA), which goes with its base: "
            f"vit_jax.load(BASE, adapter={path!r})"
        )
    return interpret(choose(weights, only, ignore), file_size, architecture, **known)


def interpret(
    weights: Weights,
    file_size: tuple[int, int] | None = None,
    architecture: str | None = None,
    **known: Any,
) -> Foreign:
    """`read_foreign` for an open file."""
    if not weights.shapes:
        raise UserError(f"{weights.path} holds no arrays")
    for name in known:
        if name not in _FIELDS:
            raise UserError(f"unknown model field {name!r}; {nearest(name, _FIELDS)}")
    try:
        weights, dialect, prefix = recognise(weights)
    except UserError:
        if architecture is None and weights.config.get("architecture"):  # its name says more
            _named(weights, "timm", None)
        raise
    dialect = tables_dinov2.told_apart(weights, told_apart(weights, dialect, prefix))
    weights, grid = flattened(weights, dialect, prefix)
    if dialect is FLAX_DINOV2 and (scale := weights.config.get("layerscale_value", 1.0)) != 1:
        raise UserError(
            f"{weights.path}: config.json has layerscale_value {scale!r}, by whose square the Flax "
            "code multiplies each lambda1; only 1 is read here"
        )
    if dialect is TIMM_PARALLEL:
        weights = tables_parallel.split(weights)
    if dialect.aliases:
        weights = weights.renamed(dialect.spelt)
    card = weights.card.get("config") or {}
    if not isinstance(card, Mapping):
        raise UserError(f"{weights.path}: the card of its model is damaged")
    if dialect.name == "vit_jax" and not card:
        raise UserError(f"{weights.path} has our names, but no card of its model with them")
    assumed: dict[str, str] = {}
    name = None
    if dialect.name in ("timm", "hf") and not card:
        name = _named(weights, dialect.name, architecture)
        if name is None and dialect.family == "vit":
            dinov3 = dialect is HF_DINOV3
            assumed["architecture"] = (
                architectures.UNNAMED_DINOV3 if dinov3 else architectures.UNNAMED
            )
    elif architecture is not None:
        raise UserError(
            f"{weights.path} has no use for architecture={architecture!r}: "
            + ("its own card says" if card else f"{dialect.name}'s code alone decides")
            + " what it computes"
        )
    if weights.stale:
        assumed["card"] = "nothing: the .json beside the file is of other weights"
    if card:
        config = _config(weights, {**card, **known}, weights.card.get("family", "vit"))
    if dialect.name == "vit_jax":
        dialect = native(shapes_of(config))
    found = _find(weights, dialect, prefix)
    if not card:
        hints = families.hints(dialect, weights.config, name)
        rotary_keys = dialect in (TIMM_EVA, HF_DINOV3, HF_SAPIENS2) or "pre_norm/scale" in found
        if hints.get("rotary") is not None and not rotary_keys:
            raise UserError(
                f"{weights.path}: its architecture has rotary positions, and its keys are those of "
                "a model without: say what it is, architecture=NAME, or --set architecture=NAME"
            )
        given = {**hints, **known}
        fields = infer(weights, dialect, found, given, file_size, assumed, grid)
        config = _config(weights, fields, dialect.family)
    found = _checked(weights, dialect, found, config)
    if any(_repeated(weights, each) for each in found.values()):
        assumed["keys and values"] = "of fewer heads than the queries, repeated for each of them"
    taken = {key for each in found.values() for key in each.keys()}
    leftover = tuple(key for key in weights.shapes if key not in taken)
    for key in leftover:
        if not dialect.may_leave(key):
            if any(before and key.startswith(before) for before in wrappers(weights.shapes)):
                raise several(weights)
            missing = f"; {nearest(key, taken)}" if "?" in nearest(key, taken) else ""
            raise UserError(
                f"{weights.path}: {key} {list(weights.shapes[key])} belongs to no part of "
                f"{_KINDS[family_of(config)]} under {dialect.name}'s names{missing}. Leaving it "
                "out would make another model than the file's"
            )
    return Foreign(weights, dialect.name, config, found, leftover, assumed)


def _named(weights: Weights, dialect: str, architecture: str | None) -> str | None:
    try:
        return architectures.named(dialect, weights.config, architecture)
    except UserError as error:
        raise UserError(f"{weights.path}: {error}") from None


def _config(weights: Weights, fields: Mapping[str, Any], family: Any) -> ModelConfig:
    try:
        return typed_config(fields, family)
    except UserError as error:
        raise UserError(f"{weights.path}: {error}") from None


def _find(weights: Weights, dialect: Dialect, prefix: str) -> dict[str, Found]:
    """Finds the row, among alternative spellings, for each of our parameters in the file."""
    depths: dict[str, int] = {}
    for key in weights.shapes:  # how many blocks there are, whatever of them is there
        for match in re.finditer(r"\d+", key):
            if len(match[0]) <= 6:
                start = key[: match.start()]
                depths[start] = max(depths.get(start, 0), int(match[0]) + 1)
    found: dict[str, Found] = {}
    complete: set[str] = set()
    for row in dialect.rows:
        if row.ours in complete:
            continue
        depth = None
        if row.per_block:
            depth = depths.get(prefix + row.theirs[0].split("{}")[0], 0)
            depth = min(max(depth - row.first, 0) * row.branches, len(weights.shapes))
        one = row.keys(prefix)
        whole = all(key in weights.shapes for key in one)
        every = (row.keys(prefix, i) for i in range(depth or 0)) if row.per_block else (one,)
        if whole or (row.ours not in found and any(k in weights.shapes for b in every for k in b)):
            shapes = [weights.shapes[key] for key in one] if whole else []
            found[row.ours] = Found(row, prefix, depth, shapes)
            if whole:
                complete.add(row.ours)
    return found


def _repeated(weights: Weights, each: Found) -> bool:
    """Whether keys and values have fewer heads than queries in any block."""
    shapes = {weights.shapes[key] for key in each.keys()}
    return each.row.shared and len(shapes) > 1


def _checked(
    weights: Weights, dialect: Dialect, found: Mapping[str, Found], config: ModelConfig
) -> dict[str, Found]:
    """Checks that exactly the model's parameters are found, in their shapes; raises otherwise."""
    checked: dict[str, Found] = {}
    for ours, shape in shapes_of(config).items():
        each = found.get(ours)
        if each is None:
            rows = [row for row in dialect.rows if row.ours == ours]
            if not rows:
                raise UserError(
                    f"{weights.path}: {dialect.name}'s names have no place for {ours}, which the "
                    "model has"
                )
            prefix = next(iter(found.values())).prefix if found else ""
            one = shape[1:] if rows[0].per_block else shape
            raise weights.missing(rows[0].keys(prefix)[0], rows[0].shapes(one)[0])
        in_blocks = each.row.in_stack and bool(each.row.layout)
        one = shape[1:] if in_blocks else shape
        expected = each.row.shapes(one)
        if in_blocks and not each.row.per_block:
            expected = [(shape[0], *piece) for piece in expected]
        each = each._replace(depth=shape[0] if each.row.per_block else each.depth)
        for block in range(shape[0]) if each.row.per_block else (0,):
            for key, right in zip(each.row.keys(each.prefix, block), expected, strict=True):
                if key not in weights.shapes:
                    raise weights.missing(key, right)
                head_dim = shape[-1] if each.row.shared else None
                if not each.row.fits(weights.shapes[key], right, head_dim):
                    of = families.variant_name(config)
                    if config.resnet is not None:
                        of += f", a ResNet of {config.resnet} units,"
                    if isinstance(config, ViTConfig):
                        of += f" with {config.num_heads} heads and a grid of "
                        of += "{}x{}".format(*config.grid)
                    raise UserError(
                        f"{weights.path}: {key} has the shape {list(weights.shapes[key])}; "
                        f"{of} needs {list(right)}"
                    )
        checked[ours] = each
    return checked


def accounted(foreign: Foreign) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yields the path, the shape and the file's names of each of our parameters."""
    for name, shape in foreign.shapes.items():
        yield name, shape, foreign.found[name].label(foreign.weights.before)

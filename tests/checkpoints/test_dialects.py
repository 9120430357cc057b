"""Weights of other code bases: read, adapted, written back, against files written out by hand."""

import dataclasses
import functools
import itertools
import json
import os
import re

import dialects
import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import fails
from dialects import GOOGLE_POSITION
from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints import sidecars
from vit_jax.checkpoints.card import Report
from vit_jax.checkpoints.load import Loaded
from vit_jax.checkpoints.opened import inspect, open_model, read_model
from vit_jax.checkpoints.store import Store
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.create import structure
from vit_jax.models.variants import variant
from vit_jax.training.sharding import MeshConfig, make_mesh, placement
from vit_jax.writing import write_atomically

EXAMPLES = dialects.examples()
PAPER, TOKEN, TIMM, TIMM_FOLDER, VIT = (
    EXAMPLES[name]
    for name in ("google paper", "big_vision token", "timm plain", "timm folder", "hf vit")
)
FIELDS = dict(**dialects.SIZES, num_classes=dialects.CLASSES)


def flat(params):
    return flatten_dict(params, sep="/")


def parameters(model):
    return {
        name: np.asarray(value) for name, value in flat(nnx.to_pure_dict(nnx.state(model))).items()
    }


def read(opened):
    return {name: opened.read(name) for name in opened.shapes}


def assert_same(found, expected):
    """The same names, and the same bits under each."""
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def amounts_to(config):
    """The fields of a config, those that may be left open filled in."""
    fields = dataclasses.asdict(config)
    return fields | {
        "class_token": config.has_class_token,
        "position_prefix": config.num_position_prefix,
    }


def changed(example, arrays=None, **changes):
    """The example with arrays changed (None takes one out), or with other fields."""
    merged = {k: v for k, v in {**example.arrays, **(arrays or {})}.items() if v is not None}
    return dataclasses.replace(example, arrays=merged, **changes)


def replaced(example, **changes):
    return dataclasses.replace(example, **changes)


def told(example, file="config.json", inside=None, **change):
    """The example with fields of a JSON file changed, or of an object in it."""
    files = json.loads(json.dumps(example.files))
    (files[file][inside] if inside else files[file]).update(change)
    return dataclasses.replace(example, files=files)


@pytest.fixture
def put(tmp_path):
    """Writes an example into a folder of its own; returns what to load."""
    numbers = itertools.count()
    return lambda example: example.write(tmp_path / f"put{next(numbers)}")


def refused(message, path, **known):
    with pytest.raises(UserError, match=message):
        vit_jax.load(path, **known)


def of(config):
    """A model of a config, with random parameters; nothing is compiled."""
    graphdef, shapes = structure(config)
    rng = np.random.default_rng(5)
    params = {
        name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in flat(shapes).items()
    }
    model = nnx.merge(graphdef, unflatten_dict(params, sep="/"))
    pre = Preprocess(config.image_size, in_channels=config.in_channels)
    labels = tuple(f"class {i}" for i in range(config.num_classes))
    return Loaded(model, config, pre, labels, Report(()), None)


def run_folder(workdir, **changes):
    """A run folder as training leaves it: the card, and a checkpoint with a running average."""
    vit = of(ViTConfig(**FIELDS | changes))
    params = nnx.to_pure_dict(nnx.state(vit.model))
    dataclasses.replace(vit.card, objective="sigmoid").write(workdir)
    store = Store(workdir)
    store.save(24, {"params": jax.tree.map(lambda x: np.asarray(x) + 1, params), "ema": params})
    store.close()
    return workdir, parameters(vit.model)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    fields = dict(representation_size=6, gelu="erf", layernorm_eps=1e-12)
    return run_folder(tmp_path_factory.mktemp("run"), **fields)


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """Loads an example, once for all tests."""
    return functools.cache(lambda name: load(EXAMPLES[name], tmp_path_factory.mktemp("example")))


def load(example, folder):
    return vit_jax.load(example.write(folder), **example.known)


# -- Every dialect -------------------------------------------------------------------------------


def keys_of(source):
    """`a.{0..1}.b + a.{0..1}.c` -> a.0.b, a.1.b, a.0.c, a.1.c."""
    for part in source.split(" + "):
        span = re.search(r"\{(\d+)\.\.(\d+)\}", part)
        for i in range(int(span[1]), int(span[2]) + 1) if span else [0]:
            yield part.replace(span[0], str(i)) if span else part


@pytest.mark.parametrize("name", EXAMPLES)
def test_read_accounted_for_and_written_back(name, loaded, tmp_path):
    example, vit = EXAMPLES[name], loaded(name)
    assert_same(parameters(vit.model), example.params())
    assert amounts_to(vit.config) == amounts_to(ViTConfig(**example.config))
    assert dialects.count(vit.config) == sum(p.size for p in parameters(vit.model).values())
    assert vit.step is None and len(vit.labels) == vit.config.num_classes

    # Every key and every parameter is accounted for.
    statuses = {"kept": [], "left over": []}
    for line in vit.report.lines:
        statuses[line.status].append(line)
    assert sorted(line.name for line in statuses["kept"]) == sorted(example.params())
    assert sorted(line.name for line in statuses["left over"]) == sorted(example.leftover)
    sources = [key for line in statuses["kept"] for key in keys_of(line.source)]
    assert sorted([*sources, *example.leftover]) == sorted(example.arrays)  # and none twice
    for line in statuses["left over"]:
        assert line.shape == example.arrays[line.name].shape
    printed = str(vit.report).splitlines()
    for line in vit.report.lines:
        assert any(row.startswith(line.name) and row.endswith(line.source) for row in printed)
    if name in ("google paper", "big_vision map", "timm map", "hf dinov2"):
        seen = inspect(example.write(tmp_path / "seen"), **example.known).lines
        assert [x[:2] + x[3:] for x in seen] == [x[:2] + x[3:] for x in vit.report.lines]
        assert {line.status for line in seen} <= {"as it is", "left over"}

    path = tmp_path / f"out{example.ending}"
    report = vit_jax.save(vit, path, format=example.format)
    written = dialects.read(path)
    assert_same(written, example.written_back())
    assert {line.name: line.shape for line in report.lines} == {
        key: value.shape for key, value in written.items()
    }
    again = open_model(path)  # its card says what had to be told before
    assert_same(read(again), example.params())
    assert amounts_to(again.card.config) == amounts_to(vit.config)
    assert (again.card.preprocess, again.card.labels) == (vit.preprocess, vit.labels)


# Fields of a model | formats that do not hold it | what they name.
REFUSED = """
registers=2 | google big_vision hf | registers
pool="map" | google | model.pool='map'
pool="map" | hf | model.num_classes=5
pool="token_gap" | google big_vision timm | model.pool='token_gap'
distillation="head" | google | dist_token|distillation
distillation="token" | big_vision | dist_token|distillation
distillation="token" | timm | model.distillation='token'
layer_scale=1e-5 | google big_vision | scale1|layer_scale
layer_scale=1e-5 | hf | model.pool='token'
qkv_bias=False | google big_vision | model.qkv_bias=False
patch_bias=False | google timm | model.patch_bias=False
pre_norm=True | google | pre_norm
pre_norm=True | timm | model.patch_bias=True
pre_norm=True, patch_bias=False | hf | model.num_classes=5
pool="gap", norm_after_pool=True | google | norm_after_pool
norm_after_pool=True | hf | norm_after_pool
position="none" | google | position
position="none" | hf | model.position='none'
pool="gap", position="none" | big_vision | position
pool="gap" | hf | model.pool='gap'
pool="gap", class_token=True | google big_vision | pool|class_token
pool="map", class_token=True | big_vision | pool|class_token
pool="map", class_token=True, num_classes=0 | hf | pool|class_token|cls_token
pool="map", position="none", num_classes=0 | hf | model.position='none'
pool="map", mlp="swiglu", mlp_dim=6, num_classes=0 | hf | mlp
mlp="swiglu", mlp_dim=6 | google big_vision hf | mlp
layer_scale=1e-5, pool="token_gap", position="none" | hf | model.position='none'
representation_size=6 | timm | pre_logits|representation_size
representation_size=8 | hf | model.representation_size=8
"""
FORMATS = dict.fromkeys(("google", "big_vision"), "x.npz")
FORMATS |= dict.fromkeys(("timm", "hf", "vit_jax"), "x.safetensors")
FORMATS |= dict.fromkeys(("timm folder", "hf folder", "vit_jax folder"), "x")


def test_what_a_dialect_cannot_hold_is_refused(tmp_path, as_users_have_it):
    held = set()
    for line in REFUSED.strip().splitlines():
        told, formats, message = (part.strip() for part in line.split(" | "))
        vit = of(ViTConfig(**FIELDS | eval(f"dict({told})")))
        for format in formats.split():
            with pytest.raises(UserError, match=message.replace(".", r"\.")):
                vit_jax.save(vit, tmp_path / FORMATS[format], format=format)
            assert not list(tmp_path.iterdir()), line
        if told in held:
            continue
        held.add(told)
        ours = tmp_path / "ours.safetensors"  # which holds every model
        vit_jax.save(vit, ours)
        assert_same(read(open_model(ours)), parameters(vit.model))
        assert open_model(ours).card.config == vit.config
        ours.unlink()


# -- Tokens before the patches, and their rows ---------------------------------------------------


@functools.cache
def program(config):
    graphdef = structure(config)[0]
    return jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))


def same_logits(one, other, atol):
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    logits = []
    for vit in (one, other):
        config = ViTConfig(**amounts_to(vit.config))  # one program for each way to write it
        params = nnx.to_pure_dict(nnx.state(vit.model))
        logits.append(np.asarray(program(config)(params, images)))
    assert np.abs(logits[0]).max() > 0.1
    np.testing.assert_allclose(*logits, rtol=0, atol=atol)


def test_rows_of_googles_and_big_visions_token(loaded, tmp_path):
    token, path = loaded("big_vision token"), tmp_path / "google.npz"
    report = vit_jax.save(token, path, format="google")
    written = dialects.read(path)
    table = written[GOOGLE_POSITION]
    assert table.shape == (1, 5, 8) and not table[:, 0].any()
    np.testing.assert_array_equal(table[:, 1:], TOKEN.arrays["params/pos_embedding"])
    np.testing.assert_array_equal(written["cls"], TOKEN.arrays["params/cls"])
    assert "1 prefix tokens got a row of zeros" in report.assumed["pos_embed"]
    same_logits(token, vit_jax.load(path), atol=0)

    paper, path = loaded("google paper"), tmp_path / "big_vision.npz"
    report = vit_jax.save(paper, path, format="big_vision")
    written, table = dialects.read(path), PAPER.arrays[GOOGLE_POSITION]
    np.testing.assert_array_equal(written["params/cls"], PAPER.arrays["cls"] + table[:, :1])
    np.testing.assert_array_equal(written["params/pos_embedding"], table[:, 1:])
    assert "were added to them" in report.assumed["pos_embed"]
    same_logits(paper, vit_jax.load(path), atol=1e-5)


def test_rows_of_registers_and_a_distillation_token(tmp_path):
    # timm's table has rows for all prefix tokens or for none, Hugging Face's for all but registers.
    def saved(format, **fields):
        vit = of(ViTConfig(**FIELDS | fields))
        vit_jax.save(vit, tmp_path / "x.safetensors", format=format)
        return parameters(vit.model), dialects.read(tmp_path / "x.safetensors")

    none = np.zeros((2, 8))
    before, written = saved("timm", registers=2, position_prefix=1, layer_scale=1.0)
    table = before["pos_embed"]
    expected = np.concatenate([table[:1], none, table[1:]])
    np.testing.assert_array_equal(written["pos_embed"][0], expected)
    np.testing.assert_array_equal(written["cls_token"], before["cls_token"])
    np.testing.assert_array_equal(written["reg_token"], before["registers"])

    before, written = saved("hf", registers=2, num_classes=0, layer_scale=1.0)
    table = before["pos_embed"]
    written = {name.removeprefix("embeddings."): value for name, value in written.items()}
    expected = np.concatenate([table[:1], table[3:]])
    np.testing.assert_array_equal(written["position_embeddings"][0], expected)
    np.testing.assert_array_equal(written["cls_token"], before["cls_token"])
    np.testing.assert_array_equal(written["register_tokens"], before["registers"] + table[1:3])

    before, written = saved("hf", distillation="head", position_prefix=0)
    expected = np.concatenate([none, before["pos_embed"]])
    np.testing.assert_array_equal(written["deit.embeddings.position_embeddings"][0], expected)


def test_fixed_positions_are_written_out_where_they_have_to_be(loaded, tmp_path):
    vit = loaded("big_vision sincos2d")
    report = vit_jax.save(vit, tmp_path / "google.npz", format="google")
    table = dialects.read(tmp_path / "google.npz")[GOOGLE_POSITION][0]
    # Quarters of two channels: sin and cos of the column, then of the row; frequencies 1, 1e-4.
    column = np.array([0, 1, 0, 1])[:, None] * [1, 1e-4]
    row = np.array([0, 0, 1, 1])[:, None] * [1, 1e-4]
    expected = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)
    np.testing.assert_allclose(table, expected, atol=1e-7)
    assert "sincos2d" in report.assumed["pos_embed"]
    again = open_model(tmp_path / "google.npz").card.config
    assert (again.position, again.pool) == ("learned", "gap")


# -- Types and layouts of the numbers ------------------------------------------------------------


@pytest.mark.parametrize("name", ["google paper", "timm plain"])
def test_other_types_become_float32(name, put, tmp_path):
    example = EXAMPLES[name]  # whose values all of them hold exactly
    types = [{k: v.astype(kind) for k, v in example.arrays.items()} for kind in ("<f2", "<f8")]
    for arrays in (*types, dialects.bfloat16(example.arrays)):
        vit = vit_jax.load(put(changed(example, arrays)), **example.known)
        assert_same(parameters(vit.model), example.params())
    vit_jax.save(vit, tmp_path / f"out{example.ending}", format=example.format)
    assert_same(dialects.read(tmp_path / f"out{example.ending}"), example.written_back())

    # What float32 does not hold is rounded.
    values = np.array([1 / 3, 1e-50, 2**-149 * 1.5, 16777217.0, -0.0, 1e300, np.nan, np.inf])
    bias = "embedding/bias" if name == "google paper" else "patch_embed.proj.bias"
    opened = open_model(put(changed(example, {bias: values})), **example.known)
    with np.errstate(over="ignore"):
        found = opened.read("patch_embed/bias")
        np.testing.assert_array_equal(found, values.astype(np.float32))
    assert np.signbit(found[4])


def test_other_orders_of_bytes_axes_and_members(tmp_path):
    arrays = dict(reversed(PAPER.arrays.items()))
    arrays["head/kernel"] = np.asfortranarray(arrays["head/kernel"])
    arrays["cls"] = arrays["cls"].astype(">f4")
    arrays["embedding/kernel"] = arrays["embedding/kernel"].astype(">f8")
    path = tmp_path / "x.bin"  # whatever its name, a file is what it contains
    path.write_bytes(dialects.to_npz(arrays, compress=True))
    assert_same(flat(read_model(path)[1]), PAPER.params())

    path = tmp_path / "model"
    path.write_bytes(dialects.to_safetensors(dict(reversed(TIMM.arrays.items())), None))
    assert_same(parameters(vit_jax.load(path, num_heads=2).model), TIMM.params())


# -- Grids ---------------------------------------------------------------------------------------


def with_rows(rows):
    table = np.random.default_rng(1).normal(size=(1, rows, 8)).astype(np.float32)
    return changed(PAPER, {GOOGLE_POSITION: table}), table[0]


def test_a_grid_that_is_no_square_has_to_be_told(put):
    example, table = with_rows(1 + 2 * 3)
    path = put(example)
    refused(r"7 rows.* makes no square: give the image_size=\(h, w\)", path)
    refused("7 rows", path, image_size=(8, 8))
    with pytest.raises(UserError, match="7 rows"):
        inspect(path, image_size=(8, 16))
    for size, grid in {(8, 12): (2, 3), (12, 8): (3, 2), (4, 24): (1, 6)}.items():
        vit = vit_jax.load(path, image_size=size)
        assert (vit.config.image_size, vit.config.grid) == (size, grid)
        assert vit.preprocess.image_size == size
        np.testing.assert_array_equal(vit.model.pos_embed[...], table)
        assert {line.status for line in vit.report.lines} == {"kept"}


def test_patches_that_are_no_squares(put):
    arrays = dialects.spelt("flax", {"pool": "gap", "patch_size": (4, 2)})
    vit = vit_jax.load(put(replaced(PAPER, arrays=arrays)), image_size=8)
    assert (vit.config.patch_size, vit.config.grid) == ((4, 2), (2, 4))
    assert_same(parameters(vit.model), dialects.ours(arrays, 2)[0])


def test_a_table_that_could_be_two_grids(put):
    # 9 rows and 5 prefix tokens: 3x3 without rows for the tokens, or 2x2 and a row for each.
    example = replaced(TIMM, arrays=dialects.spelt("timm", {"registers": 4}))
    opened = open_model(put(example), num_heads=2)
    config = opened.card.config
    assert (config.grid, config.num_position_prefix) == ((2, 2), 5)
    assert "9 rows could also have 0" in opened.assumed["position_prefix"]
    config = dialects.timm_config("test_vit", img_size=12)
    opened = open_model(put(dataclasses.replace(example, files=config)))
    config = opened.card.config
    assert (config.grid, config.num_position_prefix) == ((3, 3), 0)
    assert "position_prefix" not in opened.assumed


def test_the_size_of_what_has_none_of_its_own(put):
    # A table has one, whatever the config says; fixed positions are of the size that is asked for.
    assert vit_jax.load(put(told(VIT, image_size=224))).config.image_size == (8, 8)
    path = put(EXAMPLES["big_vision sincos2d"])
    vit = vit_jax.load(path)
    assert vit.config.image_size == (224, 224) and "not in the file" in str(vit.report)
    vit = vit_jax.load(path, image_size=(8, 12))
    assert vit.config.grid == (2, 3) and "image_size" not in vit.report.assumed


# -- What the file does not say ------------------------------------------------------------------


def test_what_the_caller_knows_counts(put):
    vit = vit_jax.load(
        put(TIMM), num_heads=4, gelu="tanh", layernorm_eps=1e-3, pool="gap", dropout=0.1
    )
    assert (vit.config.num_heads, vit.config.gelu, vit.config.layernorm_eps) == (4, "tanh", 1e-3)
    assert (vit.config.pool, vit.config.has_class_token, vit.config.dropout) == ("gap", True, 0.1)
    assert_same(parameters(vit.model), dialects.ours(TIMM.arrays, 4)[0])
    assert not {"num_heads", "gelu", "layernorm_eps"} & set(vit.report.assumed)

    # Also beside a config.json, and beside a card of ours.
    config = open_model(put(VIT), num_heads=4, gelu="quick").card.config
    assert (config.num_heads, config.gelu) == (4, "quick")
    vit = vit_jax.load(put(EXAMPLES["ours as timm"]), num_heads=4, gelu="erf")
    assert (vit.config.num_heads, vit.config.gelu) == (4, "erf")
    assert_same(parameters(vit.model), dialects.ours(EXAMPLES["ours as timm"].arrays, 4)[0])


def test_heads_of_known_widths_are_assumed(put):
    for width, heads in {192: 3, 384: 6, 64: 1}.items():
        arrays = {
            key: np.zeros([n // 8 * width if n % 8 == 0 else n for n in value.shape], np.float32)
            for key, value in TIMM.arrays.items()
        }
        seen = inspect(put(replaced(TIMM, arrays=arrays)))
        assert f"{heads} heads" in seen.facts["sizes"]
        assert seen.assumed["num_heads"] == f"{heads} as in known models {width} wide"


# -- Adapting while loading ----------------------------------------------------------------------


def bilinear(image, size):
    """Resizes [h w] to `size`, samples in the middle of their pixels, without antialiasing."""
    out = np.zeros(size)
    for i, j in np.ndindex(*size):
        y, x = ((k + 0.5) * n / m - 0.5 for k, n, m in zip((i, j), image.shape, size, strict=True))
        for row in (int(np.floor(y)), int(np.floor(y)) + 1):
            for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                clipped = np.clip((row, column), 0, np.array(image.shape) - 1)
                out[i, j] += (1 - abs(y - row)) * (1 - abs(x - column)) * image[tuple(clipped)]
    return out


def resize_matrix(old, new):
    """[new pixels, old pixels]: what every pixel of a patch becomes."""
    basis = np.eye(old[0] * old[1]).reshape(-1, *old)
    return np.stack([bilinear(pixel, new).ravel() for pixel in basis], axis=1)


def resampled(kernel, new):
    """FlexiViT's pseudo-inverse of the resize: [p q c d] -> [(p' q') (c d)]."""
    old = kernel.shape[:2]
    matrix = np.linalg.pinv(resize_matrix(old, new).T)
    return matrix @ kernel.reshape(old[0] * old[1], -1).astype(np.float64)


def adapted(kernel, channels):
    """timm's rule: a sum for one channel, else copies in turn, scaled to the same sum."""
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    old = kernel.shape[2]
    planes = [kernel[:, :, j % old] * old / channels for j in range(channels)]
    return np.stack(planes, axis=2)


def test_another_image_size_resizes_the_positions(put):
    path = put(PAPER)
    vit = vit_jax.load(path, image_size=(12, 20))
    assert vit.config.grid == (3, 5) and vit.preprocess.image_size == (12, 20)
    table = PAPER.arrays[GOOGLE_POSITION][0].astype(np.float64)
    expected = [table[0]]  # the token's row stays; corners stay corners, linear between them
    for y, x in itertools.product(np.linspace(0, 1, 3), np.linspace(0, 1, 5)):
        top = (1 - x) * table[1] + x * table[2]
        bottom = (1 - x) * table[3] + x * table[4]
        expected.append((1 - y) * top + y * bottom)
    found = parameters(vit.model)
    np.testing.assert_allclose(found.pop("pos_embed"), expected, atol=1e-6)
    assert_same(found, {k: v for k, v in PAPER.params().items() if k != "pos_embed"})
    statuses = {line.name: line.status for line in vit.report.lines}
    assert statuses.pop("pos_embed") == "resized 2x2 -> 3x5 (zoom)" and set(statuses.values()) == {
        "kept"
    }

    vit = vit_jax.load(path, image_size=(12, 20), position_resize="bilinear")
    grid = table[1:].reshape(2, 2, 8)
    expected = np.stack([bilinear(grid[..., d], (3, 5)).ravel() for d in range(8)], axis=1)
    np.testing.assert_allclose(vit.model.pos_embed[...][1:], expected, atol=1e-6)
    np.testing.assert_array_equal(vit.model.pos_embed[...][0], table[0])
    refused("did you mean 'bilinear'", path, image_size=(12, 20), position_resize="bilinea")
    refused("does not divide into patches", path, image_size=(12, 21))
    refused("did you mean 'bilinear'", path, position_resize="bilinea")  # though nothing is resized


def test_each_family_resizes_in_its_own_way(put):
    for name, method in {
        "timm registers": "bicubic_antialias",
        "hf dinov2": "bicubic",
        "ours": "bilinear",
    }.items():
        example = EXAMPLES[name]
        vit = vit_jax.load(put(example), image_size=16, **example.known)
        (status,) = [line.status for line in vit.report.lines if line.name == "pos_embed"]
        assert status == f"resized 2x2 -> 4x4 ({method})"
        rows = vit.config.num_position_prefix
        table = np.asarray(vit.model.pos_embed)
        assert table.shape == (rows + 16, 8)
        np.testing.assert_array_equal(table[:rows], example.params()["pos_embed"][:rows])


def test_another_patch_size_is_the_pseudo_inverse_of_a_resize(put):
    path, old = put(PAPER), PAPER.arrays["embedding/kernel"].astype(np.float64)
    for patch in ((6, 6), (5, 8), (3, 2), (8, 2)):
        vit = vit_jax.load(path, patch_size=patch, image_size=(2 * patch[0], 2 * patch[1]))
        assert vit.config.patch_size == patch and vit.config.grid == (2, 2)
        new = np.asarray(vit.model.patch_embed.kernel[...])
        assert new.shape == (*patch, 3, 8)
        np.testing.assert_allclose(new.reshape(-1, 3 * 8), resampled(old, patch), atol=1e-5)
        statuses = {line.name: line.status for line in vit.report.lines}
        assert statuses["patch_embed/kernel"] == f"resampled 4x4 -> {patch[0]}x{patch[1]}"
        assert statuses["pos_embed"] == "kept"
        if min(patch) >= 4:  # an enlarged patch embeds as it did before
            image = np.random.default_rng(2).normal(size=(4, 4, 3))
            larger = np.stack([bilinear(image[..., c], patch) for c in range(3)], axis=-1)
            embedded = (np.einsum("pqc,pqcd->d", *each) for each in ((larger, new), (image, old)))
            np.testing.assert_allclose(*embedded, atol=2e-5)
    vit = vit_jax.load(path, patch_size=2)  # at the same image size
    assert (vit.config.image_size, vit.config.grid) == ((8, 8), (4, 4))
    statuses = {line.name: line.status for line in vit.report.lines}
    assert statuses["pos_embed"] == "resized 2x2 -> 4x4 (zoom)"


def test_another_number_of_channels(put):
    path, kernel = put(VIT), VIT.params()["patch_embed/kernel"]
    for channels in (1, 2, 4, 6):
        vit = vit_jax.load(path, in_channels=channels)
        found = np.asarray(vit.model.patch_embed.kernel)
        np.testing.assert_allclose(found, adapted(kernel, channels), rtol=1e-6)
        if channels in (1, 6):  # what its channels have in common is embedded on the same scale
            np.testing.assert_allclose(found.sum(axis=2), kernel.sum(axis=2), atol=1e-5)
        assert vit.config.in_channels == vit.preprocess.in_channels == channels
        assert vit.preprocess.mean == pytest.approx(0.5)  # of 0.25, 0.5 and 0.75
        assert vit.preprocess.std == pytest.approx(1.25 / 3)
        statuses = {line.name: line.status for line in vit.report.lines}
        assert statuses.pop("patch_embed/kernel") == f"3 -> {channels} channels"
        assert set(statuses.values()) == {"kept"}

    # Grey weights for coloured images.
    name = "vit.embeddings.patch_embeddings.projection.weight"
    path = put(changed(VIT, {name: VIT.arrays[name][:, :1]}))
    assert open_model(path).card.config.in_channels == 1
    found = np.asarray(vit_jax.load(path, in_channels=3).model.patch_embed.kernel)
    np.testing.assert_allclose(found, np.repeat(kernel[:, :, :1] / 3, 3, axis=2), rtol=1e-6)


def test_another_head_starts_at_zero(put):
    target = EXAMPLES["google opt/target"]
    vit = vit_jax.load(put(target), num_classes=7)
    assert vit.config.representation_size is None and vit.labels == tuple("0123456")
    found = parameters(vit.model)
    assert found["head/kernel"].shape == (8, 7) and not found.pop("head/kernel").any()
    assert not found.pop("head/bias").any()
    gone = ("head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias")
    assert_same(found, {k: v for k, v in target.params().items() if k not in gone})
    statuses = {line.name: line.status for line in vit.report.lines}
    assert [statuses[name] for name in gone] == ["fresh", "fresh", "dropped", "dropped"]

    vit = vit_jax.load(put(EXAMPLES["hf dinov2"]), num_classes=3)
    assert vit.model.head.kernel.shape == (16, 3)  # token and mean side by side
    vit = vit_jax.load(put(EXAMPLES["hf deit"]), num_classes=3)
    assert vit.config.distillation == "token" and "head_dist/kernel" not in parameters(vit.model)
    vit = vit_jax.load(put(PAPER), num_classes=0)
    assert not hasattr(vit.model, "head") and vit.labels == ()


def test_all_of_it_at_once(put):
    changes = dict(image_size=(18, 24), patch_size=6, in_channels=4, num_classes=3)
    changes |= dict(dtype="bfloat16", gelu="tanh")
    vit = vit_jax.load(put(VIT), **changes, position_resize="bilinear")
    config = dataclasses.replace(ViTConfig(**VIT.config), **changes)
    assert amounts_to(vit.config) == amounts_to(config)
    before, found = VIT.params(), parameters(vit.model)
    expected = resampled(adapted(before.pop("patch_embed/kernel").astype(np.float64), 4), (6, 6))
    np.testing.assert_allclose(found.pop("patch_embed/kernel").reshape(36, -1), expected, atol=1e-5)
    table, grid = found.pop("pos_embed"), before.pop("pos_embed")
    np.testing.assert_array_equal(table[0], grid[0])
    for d in range(8):
        expected = bilinear(grid[1:, d].reshape(2, 2), (3, 4)).ravel()
        np.testing.assert_allclose(table[1:, d], expected, atol=1e-6)
    assert found.pop("head/kernel").shape == (8, 3) and found.pop("head/bias").shape == (3,)
    del before["head/kernel"], before["head/bias"]
    assert_same(found, before)
    assert dialects.count(vit.config) == sum(p.size for p in parameters(vit.model).values())
    images = np.zeros((1, 18, 24, 4), np.float32)
    assert jax.eval_shape(vit.model, images).shape == (1, 3)


# -- Onto many devices ---------------------------------------------------------------------------


def assert_sharded(model, expected, specs, mesh):
    state = flat(nnx.to_pure_dict(nnx.state(model)))
    assert sorted(state) == sorted(expected)
    for path, array in state.items():
        wanted = NamedSharding(mesh, specs.get(path, P()))
        assert array.sharding.is_equivalent_to(wanted, array.ndim), path
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[path][shard.index], err_msg=path)


def test_parameters_go_to_their_devices(put, run):
    specs = {
        "patch_embed/kernel": P(None, None, None, "fsdp"),
        "pos_embed": P(None, "fsdp"),
        "blocks/attention/qkv/kernel": P(None, "fsdp", None, "tensor", None),
        "blocks/attention/qkv/bias": P(None, None, "tensor", None),
        "blocks/attention/out/kernel": P(None, "tensor", None, "fsdp"),
        "blocks/mlp/fc1/kernel": P(None, "fsdp", "tensor"),
        "blocks/mlp/fc1/bias": P(None, "tensor"),
        "blocks/mlp/fc2/kernel": P(None, "tensor", "fsdp"),
        "head/kernel": P("fsdp", None),
    }
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    place = functools.partial(placement, mesh=mesh)
    for example in (PAPER, VIT):
        vit = vit_jax.load(put(example), shardings=place, **example.known)
        assert_sharded(vit.model, example.params(), specs, mesh)

    # A run folder, and a mesh without `tensor`, of which nothing is split.
    specs = {
        name: P(*(axis if axis == "fsdp" else None for axis in spec))
        for name, spec in (specs | {"pre_logits/kernel": P("fsdp", None)}).items()
    }
    specs["head/kernel"] = P()  # whose 6 rows four devices do not divide
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    vit = vit_jax.load(run[0], shardings=functools.partial(placement, mesh=mesh))
    assert_sharded(vit.model, run[1], specs, mesh)


# -- Preprocessing and label names ---------------------------------------------------------------


OF_TIMM = dict(resize="bicubic_antialias", aspect="keep", crop=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)
OF_HF = dict(resize="bilinear_antialias", mean=(0.25, 0.5, 0.75), std=(0.5, 0.25, 0.5))
BICUBIC, BILINEAR = dict(resize="bicubic_antialias"), dict(resize="bilinear_antialias")
CLIP = {
    "do_center_crop": True,
    "crop_size": {"height": 8, "width": 8},
    "size": {"shortest_edge": 10},
    "resample": 3,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [1.0, 2.0, 3.0],
}
KEEP = dict(**BICUBIC, aspect="keep")


def test_preprocessing_of_hugging_face(put):
    def opened(processor):
        files = {**VIT.files, "preprocessor_config.json": processor}
        return open_model(put(replaced(VIT, files=files)))

    for processor, expected in [
        (dialects.PREPROCESSOR, OF_HF),
        (CLIP, dict(**KEEP, crop=0.8, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))),
        ({"size": 8, "do_normalize": False}, dict(**BILINEAR, mean=0.0, std=1.0)),
        (
            {**CLIP, "size": {"shortest_edge": 8}, "image_mean": 0.5, "image_std": 0.5},
            dict(**KEEP, mean=0.5, std=0.5),
        ),
    ]:
        found = opened(processor)
        assert found.card.preprocess == Preprocess((8, 8), **expected)
        assert "preprocess" not in found.assumed
    for resample, resize in {1: BICUBIC, 0: BILINEAR, 4: BILINEAR, 5: BILINEAR}.items():
        found = opened({**dialects.PREPROCESSOR, "resample": resample})  # the nearest is taken
        assert set(found.assumed) == {"resample"}
        assert found.card.preprocess == Preprocess((8, 8), **OF_HF | resize)
    for wrong, message in [
        ({"resample": 7}, "resample 7"),
        ({"rescale_factor": 1 / 127.5}, "scaled by 0.0078"),
        ({"do_rescale": False}, "scaled"),
        ({"image_mean": {"red": 1}}, "damaged"),
        ({"do_center_crop": True, "crop_size": 8, "size": 4}, "crop is 2"),
    ]:
        with pytest.raises(UserError, match=message):
            opened(wrong)


def test_preprocessing_of_timm(put):
    def opened(**change):
        return open_model(put(told(TIMM_FOLDER, inside="pretrained_cfg", **change)))

    constants = dict(mean=(0.0, 0.5, 1.0), std=(1.0, 2.0, 3.0))
    for change, expected, said in [
        ({}, {}, None),
        (dict(crop_mode="squash", crop_pct=1.0), dict(aspect="squash", crop=1.0), None),
        (
            dict(interpolation="bilinear", mean=[0, 0.5, 1], std=[1, 2, 3.0]),
            dict(**BILINEAR, **constants),
            None,
        ),
        # The nearest is taken.
        (dict(crop_mode="border"), dict(aspect="squash"), "crop_mode"),
        (dict(interpolation="random"), BICUBIC, "interpolation"),
        (dict(interpolation="box"), BILINEAR, "interpolation"),
    ]:
        found = opened(**change)
        assert found.card.preprocess == Preprocess((8, 8), **OF_TIMM | expected)
        assert set(found.assumed) - {"num_heads", "labels"} == {said} - {None}
    for change in (dict(crop_mode="centre"), dict(interpolation="cubic")):  # damaged
        with pytest.raises(UserError, match=next(iter(change.values()))):
            opened(**change)


def test_label_names(loaded, put):
    names = ("ant", "bee", "cat", "dog", "eel")
    numbers = tuple("01234")
    assert loaded("hf vit").labels == names
    placeholders = {str(i): f"LABEL_{i}" for i in range(5)}
    twice = ("ant", "bee", "ant", "dog", "eel")
    for id2label, expected, said in [
        (dict(reversed(dialects.NAMES.items())), names, None),
        (placeholders, numbers, "numbers: nothing says what they are"),
        (None, numbers, "numbers: nothing says what they are"),
        ({"0": "ant"}, numbers, "numbers: id2label has 1 other than 0 to 4"),
        ({**dialects.NAMES, "5": "fly"}, numbers, "numbers: id2label has 6 other than 0 to 4"),
        ({**dialects.NAMES, "3": "LABEL_3"}, numbers, "numbers: id2label has no name for class 3"),
        ({**dialects.NAMES, "3": None}, numbers, "numbers: id2label is no list of texts"),
        (["ant"], numbers, "numbers: id2label has 1, the head 5"),
        (dict(zip("01234", twice, strict=True)), twice, "classes [0, 2] are all called 'ant'"),
    ]:
        opened = open_model(put(told(VIT, id2label=id2label)))
        assert opened.card.labels == expected
        assert (said is None) == ("labels" not in opened.assumed)
        assert said is None or said in opened.assumed["labels"]
    assert open_model(put(told(TIMM_FOLDER, label_names=list(names)))).card.labels == names

    thousand = dialects.spelt("flax", {"num_classes": 1000})
    opened = open_model(put(replaced(PAPER, arrays=thousand)))
    labels = opened.card.labels
    assert (labels[0], labels[281]) == ("tench, Tinca tinca", "tabby, tabby cat")
    assert len(set(labels)) == 1000 and "ImageNet-1k's" in opened.assumed["labels"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_trained_run_in_other_formats(format, run, tmp_path):
    """What it means travels with it."""
    path, dialect = tmp_path / FORMATS[format], format.split()[0]
    vit = vit_jax.load(run[0])
    assert_same(parameters(vit.model), run[1])
    if dialect in ("timm", "hf"):  # neither has a hidden layer before the head
        with pytest.raises(UserError, match=r"pre_logits|representation_size"):
            vit_jax.save(vit, path, format=dialect)
        assert not path.exists()
        vit = vit_jax.load(run[0], num_classes=5)
    assert vit.objective == "sigmoid"
    sizes = dict(resize="area", aspect="keep", crop=0.625, resize_dtype="truncated")
    preprocess = Preprocess((8, 8), **sizes, mean=(0.1, 0.2, 0.3), std=0.7)
    labels = ("ä", "b, c", "", '"', "汉")
    vit = dataclasses.replace(vit, preprocess=preprocess, labels=labels, position_resize="bicubic")
    vit_jax.save(vit, path, format=dialect)
    again = vit_jax.load(path)
    before, after, fields = parameters(vit.model), parameters(again.model), amounts_to(vit.config)
    if dialect == "big_vision":
        table = before.pop("pos_embed")
        before["cls_token"] = before["cls_token"] + table[:1]
        np.testing.assert_array_equal(after.pop("pos_embed"), table[1:])
        fields["position_prefix"] = 0
    assert_same(after, before)
    assert amounts_to(again.config) == fields
    assert (again.preprocess, again.labels, again.step) == (preprocess, labels, None)
    assert (again.objective, again.position_resize) == ("sigmoid", "bicubic")
    card = dialects.read_record(path)
    assert card["labels"] == list(labels) and card["objective"] == "sigmoid"
    assert card["grid"] == [2, 2] and card["num_prefix_tokens"] == 1


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_what_a_model_means_is_in_the_files_of_others_too(format, loaded, tmp_path):
    """A folder without our card in it: as their own libraries would write it."""
    vit, path = loaded("hf vit"), tmp_path / "x"
    if format == "timm":  # whose LayerNorm's epsilon is nowhere
        config = dataclasses.replace(vit.config, layernorm_eps=1e-6)
        vit = dataclasses.replace(vit, config=config)
    notes = vit_jax.save(vit, path, format=format).assumed
    assert format == "hf" or notes.pop("architecture").startswith(
        "timm has no name for these sizes"
    )
    assert not notes
    weights = path / "model.safetensors"
    weights.write_bytes(dialects.to_safetensors(dialects.read(weights), {"format": "pt"}))
    again = vit_jax.load(path)
    assert (again.labels, again.preprocess) == (vit.labels, vit.preprocess)
    assert amounts_to(again.config) == amounts_to(vit.config)
    if format == "hf":
        # Everything that was in the config.json that it came with, and a type for the numbers.
        config = json.loads((path / "config.json").read_text())
        assert config.pop("label2id") == {name: int(i) for i, name in dialects.NAMES.items()}
        assert config.pop("dtype") == "float32"
        expected = {**VIT.files["config.json"], "architectures": ["ViTForImageClassification"]}
        assert config == expected
        processor = json.loads((path / "preprocessor_config.json").read_text())
        assert processor.pop("do_center_crop") is False
        assert processor == dialects.PREPROCESSOR


# -- Run folders, and files that are written -----------------------------------------------------


def test_a_run_says_itself_what_it_is(run):
    refused("is a run folder, which says itself what gelu is", run[0], gelu="erf")


def test_where_a_model_may_be_written(loaded, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.jpg").write_text("mine")
    for name in ("folder.npz", "folder.safetensors"):
        (tmp_path / name).mkdir()
    before = {path: path.is_dir() or path.read_text() for path in tmp_path.rglob("*")}
    named = r"the name of a {} file ends in \.{}"
    timm, ours = (named.format(format, "safetensors") for format in ("timm", "vit_jax"))
    google, big_vision = (named.format(format, "npz") for format in ("google", "big_vision"))
    for name, format, message in [
        ("x.pt", "timm", timm + ", and that of a folder does not end in .pt"),
        ("x.PT", "timm", timm + ", and that of a folder"),
        ("x.SAFETENSORS", "timm", timm),
        ("x.pt", "google", google),
        ("x.safetensors", "google", google),
        ("x", "big_vision", big_vision),
        ("x.npz", "timm", timm),
        ("x.npz", "vit_jax", ours),
        ("x.npz", "gogle", "format 'gogle': did you mean 'google'"),
        ("x.msgpack", "vit_jax", ours + ", and that of a folder"),
        ("file/x.npz", "google", "file is a file; expected a folder"),
        ("file", "timm", "file"),
        ("folder.npz", "google", "folder"),
        ("folder.safetensors", "timm", "folder"),
        *(
            ("pictures", format, r"pictures holds 1\.jpg, which is not part of a model in")
            for format in ("timm", "hf", "vit_jax")
        ),
    ]:
        with pytest.raises(UserError, match=message):
            vit_jax.save(loaded("hf vit"), tmp_path / name, format=format)
    assert {path: path.is_dir() or path.read_text() for path in tmp_path.rglob("*")} == before
    for _ in range(2):  # a folder of its own may say more
        vit_jax.save(loaded("hf vit"), tmp_path / "new" / "x.tag_in21k", format="hf")
        (tmp_path / "new" / "x.tag_in21k" / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds preprocessor_config\.json, which is not part of a"):
        vit_jax.save(loaded("hf vit"), tmp_path / "new" / "x.tag_in21k", format="timm")


def test_an_export_names_its_architecture_and_the_classes_that_are_known(tmp_path, tiny_run):
    """timm's names are compared with timm itself in tests/parity."""
    names = {
        "Ti/16": "vit_tiny_patch16_224",
        "S/16": "vit_small_patch16_224",
        "S/8": "vit_small_patch8_224",
        "B/32 384": "vit_base_patch32_384",
        "L/16 512": "vit_large_patch16_384",
        "H/14": "vit_huge_patch14_224",
        "g/14": "vit_giant_patch14_224",
        "R50+L/32": "vit_large_r50_s32_224",
        "B/28": None,
        "mu/16": None,
        "22B/14": None,
    }
    for name, expected in names.items():
        name, _, size = name.partition(" ")
        config = variant(name, image_size=(int(size or 224),) * 2, num_classes=3)
        assert sidecars.timm_name(config) == expected, name
    model = vit_jax.create("mu/16", image_size=32, num_classes=3)
    notes = vit_jax.save(model, tmp_path / "timm", format="timm").assumed
    assert "vit_base_patch16_224 and, in model_args, what makes" in notes["architecture"]
    vit_jax.save(model, tmp_path / "hf", format="hf")
    hf, timm = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "timm")
    )
    # As transformers writes them where nobody named them.
    assert hf["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert "label_names" not in timm and timm["model_args"]["embed_dim"] == 32
    assert vit_jax.load(tmp_path / "hf").labels == ("0", "1", "2")
    run = vit_jax.load(tiny_run[0], num_classes=10)  # digits: these are their names
    vit_jax.save(run, tmp_path / "digits", format="hf")
    digits = json.loads((tmp_path / "digits" / "config.json").read_text())
    assert digits["id2label"]["7"] == "7"


def test_files_have_the_mode_of_the_umask(loaded, tmp_path):
    for mask, mode in {0o022: 0o644, 0o077: 0o600, 0o002: 0o664}.items():
        folder, before = tmp_path / oct(mask), os.umask(mask)
        try:
            folder.mkdir(mode=0o700)
            vit_jax.save(loaded("hf vit"), folder / "hf", format="hf")
            vit_jax.save(loaded("hf vit"), folder / "x.npz", format="google")
            write_atomically(epath.Path(folder) / "x.txt", "?")
        finally:
            os.umask(before)
        modes = {file.name: file.stat().st_mode & 0o777 for file in folder.rglob("*.*")}
        assert len(modes) == 6 and set(modes.values()) == {mode}


CALLS = ["1 os.replace", "2 os.replace", "3 os.replace", "1 np.savez", "1 json.dumps"]
CALLS += ["1 safetensors.numpy.save_file"]


@pytest.mark.parametrize("format", ["google", "vit_jax", "hf folder"])
@pytest.mark.parametrize("call", CALLS)
def test_what_is_interrupted_is_the_old_model_or_the_new(
    call, format, loaded, tmp_path, monkeypatch
):
    """Whichever call does not come back: no half a file, no weights under another's card."""
    path = tmp_path / FORMATS[format]
    old, new = loaded("google paper"), loaded("hf vit")
    vit_jax.save(old, path, format="google" if format == "google" else "vit_jax")

    def there():
        return {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    before, nth, name = there(), *call.split()
    owner = {"os": os, "np": np, "json": json}.get(name.split(".")[0], safetensors.numpy)
    name = name.split(".")[-1]
    original, left = getattr(owner, name), [int(nth)]

    def stopped(*args, **kwargs):
        left[0] -= 1
        if left[0]:
            return original(*args, **kwargs)
        if name == "savez":
            args[0].write(b"PK\x03\x04half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        whole = True
        try:
            vit_jax.save(new, path, format=format.split()[0])
        except KeyboardInterrupt:
            whole = False
    if not whole and nth == "1":
        assert {k: v for k, v in there().items() if not k.name.startswith(".")} == before
    again = vit_jax.load(path)
    assert again.labels in ((new.labels,) if whole else (old.labels, new.labels))
    expected = PAPER if again.labels == old.labels else VIT
    assert_same(parameters(again.model), expected.params())


def test_a_new_file_takes_the_place_of_the_old_one(loaded, tmp_path):
    path = tmp_path / "x.npz"
    vit_jax.save(loaded("google no head"), path, format="google")
    vit_jax.save(loaded("hf vit"), path, format="big_vision")
    assert open_model(path).card.labels == loaded("hf vit").labels
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.json", "x.npz"]

    folder = EXAMPLES["hf sharded"].write(tmp_path / "shards")
    with pytest.raises(UserError, match=r"holds model-00001-of-.* and \d more, which is not part"):
        vit_jax.save(loaded("hf vit pooler"), folder, format="hf")


def test_a_record_is_of_its_own_weights_alone(loaded, tmp_path):
    """FILE.json says what FILE.npz means: not FILE.safetensors, nor another FILE.npz later on."""
    vit = dataclasses.replace(loaded("google paper"), labels=tuple("abcde"))
    vit_jax.save(vit, tmp_path / "x.npz", format="google")
    assert open_model(tmp_path / "x.npz").card.labels == tuple("abcde")
    (tmp_path / "x.safetensors").write_bytes(TIMM.to_bytes())
    other = open_model(tmp_path / "x.safetensors", num_heads=2).card
    assert (other.labels, other.config.gelu) == (tuple("01234"), "erf")
    arrays = {name: value + 1 for name, value in PAPER.arrays.items()}
    (tmp_path / "x.npz").write_bytes(dialects.to_npz(arrays))
    try:
        assert open_model(tmp_path / "x.npz").card.labels == tuple("01234")
    except UserError as error:
        assert "x.json" in str(error)


# -- What is wrong is said -----------------------------------------------------------------------


def zeros(*shape):
    return np.zeros(shape, np.float32)


FC1 = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"
GONE = {
    "blocks.1.attn.proj.weight": None,
    "blocks.1.attn.proj.wieght": TIMM.arrays["blocks.1.attn.proj.weight"],
}
# What is wrong with a file, in a sentence; the last ones are about what the caller says beside it.
WRONG = [
    # Keys that are missing, too many, or of another shape.
    (
        changed(TIMM, GONE),
        r"the key blocks\.1\.attn\.proj\.weight of shape \[8, 8\] is missing; did you mean "
        r"'blocks\.1\.attn\.proj\.wieght'\?",
    ),
    (
        changed(TIMM, {"blocks.1.mlp.fc1.weigth": zeros(3, 2)}),
        r"blocks\.1\.mlp\.fc1\.weigth \[3, 2\] belongs to no part of a ViT under timm's "
        r"names; did you mean 'blocks\.1\.mlp\.fc1\.weight'\?",
    ),
    (
        changed(PAPER, {"head/kernel": zeros(8, 6)}),
        r"head/bias has the shape \[5\]; .* needs \[6\]",
    ),
    (changed(PAPER, {FC1: zeros(8, 13)}), FC1 + r" has .* \[8, 13\]; .* needs \[8, 12\]"),
    (
        changed(PAPER, {"embedding/kernel": zeros(8, 8)}),
        r"embedding/kernel has the shape \[8, 8\]; expected 4 axes",
    ),
    # No model at all, and no real numbers.
    (
        replaced(TIMM, arrays={"a.weight": zeros(3)}),
        r"names of no known code base \(a.weight, ...\)",
    ),
    (replaced(TIMM, arrays={}), "holds no arrays"),
    (replaced(EXAMPLES["ours"], card=None), "our names, but no card"),
    *(
        (
            changed(PAPER, {"cls": PAPER.arrays["cls"].astype(kind)}),
            r"cls is .*expected one of float32, float16, bfloat16",
        )
        for kind in ("int32", "bool", "complex64", "uint16", "U1")
    ),
    # A config.json that contradicts the weights.
    (told(VIT, num_attention_heads=3), "does not divide into 3 heads"),
    (told(VIT, num_attention_heads=0), "num_heads is 0"),
    (told(VIT, num_attention_heads="two"), "num_heads"),
    (told(VIT, hidden_act="gelu_pytorch_tan"), "mean 'gelu_pytorch_tanh'"),
    (told(VIT, layer_norm_eps=-1.0), r"layernorm_eps is -1"),
    (told(VIT, num_hidden_layers=3), "num_hidden_layers|layer.2"),
    (told(EXAMPLES["hf clip"], vision_config={"num_attention_heads": 3}), "into 3 heads"),
    (told(TIMM_FOLDER, model_args={"global_pool": "max"}), "global_pool 'max'"),
    (told(TIMM_FOLDER, model_args={"act_layer": "rel"}), "act_layer 'rel'"),
    (told(TIMM_FOLDER, architecture="vit_relpos_base_rpn_224"), "is not known"),
    (told(TIMM_FOLDER, model_args={"global_pool": "map", "num_heads": 2}), "pool"),
    # What the caller says; Google's arrays have an axis for the heads.
    (TIMM, r"number of heads is not in the file.*give num_heads=", dict(num_heads=None)),
    (TIMM, "width 8 does not divide into 3 heads", dict(num_heads=3)),
    (TIMM, r"unknown model field 'num_head'; did you mean 'num_heads'", dict(num_head=2)),
    (TIMM, r"model\.gelu is 'relu'", dict(gelu="relu")),
    (TIMM, r"\S+ has the shape \[8.*\]; .* needs \[.*16.*\]", dict(width=16)),
    (TIMM, r"blocks\.2\.\S+ .*is missing", dict(depth=3)),
    (TIMM, r"blocks.1.\S+ .*belongs to no part", dict(depth=1)),
    (PAPER, r"heads|query/kernel", dict(num_heads=4)),
]


@pytest.mark.parametrize("example, message, told", [(*each, {})[:3] for each in WRONG])
def test_what_is_wrong_is_said(example, message, told, put, as_users_have_it):
    known = {name: value for name, value in {**example.known, **told}.items() if value is not None}
    refused(message, put(example), **known)


@pytest.mark.parametrize("name", ["google paper", "timm distilled", "hf clip"])
def test_whatever_key_is_missing_is_said(name, tmp_path, as_users_have_it):
    example, accepted = EXAMPLES[name], set()
    for key in example.arrays:
        block = re.search(r"(?:encoderblock_|encoder\.layers\.|blocks\.)(\d)", key)
        # Of what each block has, the kernels of the first and the rest of the last.
        first = key.endswith(("weight", "kernel"))
        if block and key not in example.leftover and int(block[1]) == first:
            continue
        path = changed(example, {key: None}).write(tmp_path)
        try:
            open_model(path, **example.known)
            accepted.add(key)
        except UserError as error:
            # By its name, or by that of its other half, which now belongs to nothing; without the
            # patch embedding it may be anybody's file, without a token its row is one too many, and
            # without positions Google's file looks like a later one, whose layers have other names.
            stem = re.sub(r"(weight|bias|kernel|scale)$", "", key)
            others = ("names of no known code base", "rows, up to", "MlpBlock_3")
            assert any(part in str(error) for part in (stem, *others)), key
    # timm has models without positions; without any other key of these nothing is left of a model.
    expected = {"pos_embed"} if example.format == "timm" else set(example.leftover)
    assert accepted == expected


# -- From the shell ------------------------------------------------------------------------------


def test_inspect_prints_what_a_file_is(put, capsys):
    registers = EXAMPLES["timm registers"]
    total = sum(value.size for value in registers.arrays.values())
    of_timm = [
        r"file: +timm, (\S+)/weights\.safetensors\n",
        rf"variant: +custom, {total:,} parameters\n",
        r"grid: +2x2 patches of 4x4\n",
        r"prefix tokens: +4 \(class token, 3 registers, 0 with positions\)\n",
        r"pooling: +token\n",
        r"GELU: +erf, LayerNorm eps 1e-06\n",
        r"head: +5 classes\n",
        r"preprocessing: +bicubic_antialias",
        r"labels: +'0', '1', '2', \.\.\.\n",
        r"assumed: +gelu erf as in timm's code\n",
        r"blocks/mlp/fc1/kernel +2x8x12 +as it is +blocks\.\{0\.\.1\}\.mlp\.fc1\.weight\n",
        r"registers +1x3x8 +as it is +reg_token\n",
    ]
    of_clip = [r"file: +hf, ", r"GELU: +quick, LayerNorm eps 1e-05", r"\A((?!'0')[\s\S])*\Z"]
    of_clip += ["assumed:", r"logit_scale +\(\) +left over +logit_scale\n"]
    pooled = r"attention_pool/attention/qkv/kernel +8x3x2x4 .*query/kernel \+ .*key/kernel \+ "
    of_map = [r"pooling: +map\n", r"prefix tokens: +0\n", r"in the file\n", pooled]
    for example, patterns in [
        (registers, of_timm),
        (EXAMPLES["hf clip"], of_clip),
        (EXAMPLES["big_vision map"], of_map),
    ]:
        flags = ["--set", "num_heads=2"] if example.known else []
        assert main(["inspect", str(put(example)), *flags]) == 0
        out = capsys.readouterr().out
        for pattern in patterns:
            assert re.search(pattern, out), f"{pattern} is not in\n{out}"


def test_convert_writes_what_load_reads(put, tmp_path, capsys, loaded):
    src, dst = put(VIT), tmp_path / "out.npz"
    argv = ["convert", str(src), str(dst), "--format", "google", "--set", "num_heads=4"]
    assert main([*argv, "--set", "gelu=tanh"]) == 0
    out = capsys.readouterr().out
    assert re.match(rf"{re.escape(str(dst))}: \d+ arrays in google's names\n", out)
    assert "note: layernorm_eps: 1e-12, where google has 1e-06" in out and "gelu" not in out
    vit = vit_jax.load(dst)
    assert (vit.config.num_heads, vit.config.gelu) == (4, "tanh")
    assert vit.labels == loaded("hf vit").labels
    assert_same(parameters(vit.model), dialects.ours(VIT.arrays, 4)[0])

    # A size in words that only its grid needs.
    example, table = with_rows(1 + 2 * 3)
    argv = ["convert", str(put(example)), str(tmp_path / "folder"), "--format=timm"]
    assert main([*argv, "--set", "image_size=(8, 12)"]) == 0
    vit = vit_jax.load(tmp_path / "folder")
    assert vit.config.image_size == (8, 12)
    np.testing.assert_array_equal(vit.model.pos_embed[...], table)


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_mistake_is_one_sentence(command, tmp_path, capsys):
    path, out = VIT.write(tmp_path / "in"), tmp_path / "out.npz"
    rest = [out, "--format=google"] if command == "convert" else []
    for flags, message in [
        (["--set", "nonsense"], "unknown model field in 'nonsense'"),
        (["--set", "num_head=2"], "did you mean 'num_heads'"),
        (["--set", "num_heads"], "'num_heads'"),
        (["--set", "num_heads=two"], "'num_heads=two'"),
        (["--set", "gelu=relu"], "gelu is 'relu'"),
        (["--set", "num_heads=3"], "does not divide into 3 heads"),
        (["--set", "layernorm_eps=nan"], "layernorm_eps"),
        (["--num_heads=2"], "unknown argument '--num_heads=2'"),
    ]:
        assert message in fails(capsys, command, path, *rest, *flags)
    assert "there is no '/nowhere'" in fails(capsys, command, "/nowhere", *rest)
    assert "holds no weights" in fails(capsys, command, tmp_path, *rest)
    pickled = tmp_path / "model.pt"
    pickled.write_bytes(b"\x80\x02}q\x00.")
    assert "safetensors.torch.save_file" in fails(capsys, command, pickled, *rest)
    pickled.unlink()
    if command == "convert":
        assert "the name of a timm file ends in" in fails(
            capsys, command, path, out, "--format=timm"
        )
        assert "did you mean 'google'" in fails(capsys, command, path, out, "--format=gogle")
        below = fails(capsys, command, path, path / "config.json" / "x.npz", "--format=google")
        assert "config.json is a file; expected a folder" in below
        assert "are required: --format" in fails(capsys, command, path, out)
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_preprocessing_of_a_bare_file_of_timm(loaded):
    """AugReg's, as nearly all of timm's plain ViTs have it."""
    expected = dict(resize="bicubic_antialias", aspect="keep", crop=0.9)
    assert loaded("timm plain").preprocess == Preprocess((8, 8), **expected)

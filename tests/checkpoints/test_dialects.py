"""Weights of other code bases: read, adapted, written back, against files written out by hand."""

import dataclasses
import functools
import json
import os
import re
import shutil

import dialects
import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints.card import Report
from vit_jax.checkpoints.load import Loaded
from vit_jax.checkpoints.opened import inspect, open_model, read_model
from vit_jax.checkpoints.store import write_atomically
from vit_jax.data.transforms import Preprocess
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.vit import structure
from vit_jax.training.sharding import MeshConfig, make_mesh, placement

EXAMPLES = dialects.examples()
PAPER, TOKEN, TIMM, VIT = (
    EXAMPLES[name] for name in ("google paper", "big_vision token", "timm plain", "hf vit")
)


def parameters(model):
    state = flatten_dict(nnx.to_pure_dict(nnx.state(model)), sep="/")
    return {name: np.asarray(value) for name, value in state.items()}


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


def of(config):
    """A model of a config, with random parameters; nothing is compiled."""
    graphdef, shapes = structure(config)
    rng = np.random.default_rng(5)
    params = {
        name: rng.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in flatten_dict(shapes, sep="/").items()
    }
    model = nnx.merge(graphdef, unflatten_dict(params, sep="/"))
    pre = Preprocess(config.image_size, in_channels=config.in_channels)
    labels = tuple(f"class {i}" for i in range(config.num_classes))
    return Loaded(model, config, pre, labels, Report(()), None)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Loads an example, once for all tests."""

    @functools.cache
    def load(name):
        path = EXAMPLES[name].write(tmp_path_factory.mktemp("example"))
        return vit_jax.load(path, **EXAMPLES[name].known)

    return load


# -- Every dialect -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_parameters_and_config(name, loaded):
    example, vit = EXAMPLES[name], loaded(name)
    assert_same(parameters(vit.model), example.params())
    assert amounts_to(vit.config) == amounts_to(ViTConfig(**example.config))
    assert dialects.count(vit.config) == sum(p.size for p in parameters(vit.model).values())
    assert vit.step is None and len(vit.labels) == vit.config.num_classes


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_key_and_every_parameter_is_accounted_for(name, loaded):
    example, report = EXAMPLES[name], loaded(name).report
    kept = [line for line in report.lines if line.fate == "kept"]
    left = [line for line in report.lines if line.fate == "left over"]
    assert len(kept) + len(left) == len(report.lines)
    assert sorted(line.name for line in kept) == sorted(example.params())
    assert sorted(line.name for line in left) == sorted(example.leftover)
    sources = [key for line in kept for key in keys_of(line.source)]
    assert sorted([*sources, *example.leftover]) == sorted(example.arrays)  # and none twice
    for line in left:
        assert line.shape == example.arrays[line.name].shape
    printed = str(report).splitlines()
    for line in report.lines:
        assert any(row.startswith(line.name) and row.endswith(line.source) for row in printed)


def keys_of(source):
    """`a.{0..1}.b + a.{0..1}.c` -> a.0.b, a.1.b, a.0.c, a.1.c."""
    for part in source.split(" + "):
        span = re.search(r"\{(\d+)\.\.(\d+)\}", part)
        if span:
            for i in range(int(span[1]), int(span[2]) + 1):
                yield part.replace(span[0], str(i))
        else:
            yield part


@pytest.mark.parametrize("name", EXAMPLES)
def test_round_trip(name, loaded, tmp_path):
    example, vit = EXAMPLES[name], loaded(name)
    path = tmp_path / f"out{example.ending}"
    report = vit_jax.save(vit, path, format=example.format)
    written = dialects.read(path)
    assert_same(written, example.written_back())
    assert {line.name: line.shape for line in report.lines} == {
        key: value.shape for key, value in written.items()
    }
    again = vit_jax.load(path)  # its card says what had to be told before
    assert_same(parameters(again.model), example.params())
    assert amounts_to(again.config) == amounts_to(vit.config)
    assert (again.preprocess, again.labels) == (vit.preprocess, vit.labels)


@pytest.mark.parametrize("name", ["google paper", "big_vision map", "timm map", "hf dinov2"])
def test_inspect_says_the_same_without_loading(name, loaded, tmp_path):
    example, report = EXAMPLES[name], loaded(name).report
    seen = inspect(example.write(tmp_path), **example.known)
    assert [line[:2] + line[3:] for line in seen.lines] == [
        line[:2] + line[3:] for line in report.lines
    ]
    assert {line.fate for line in seen.lines} <= {"as it is", "left over"}


FIELDS = dict(**dialects.SIZES, num_classes=dialects.CLASSES)
REFUSED = {
    "google, registers": ("google", dict(registers=2), "registers"),
    "google, map": ("google", dict(pool="map"), r"model\.pool='map'"),
    "google, token_gap": ("google", dict(pool="token_gap"), r"model\.pool='token_gap'"),
    "google, distillation": ("google", dict(distillation="head"), "dist_token|distillation"),
    "google, layer scale": ("google", dict(layer_scale=1e-5), "scale1|layer_scale"),
    "google, no qkv bias": ("google", dict(qkv_bias=False), r"model\.qkv_bias=False"),
    "google, no patch bias": ("google", dict(patch_bias=False), r"model\.patch_bias=False"),
    "google, pre_norm": ("google", dict(pre_norm=True), "pre_norm"),
    "google, norm after pool": (
        "google",
        dict(pool="gap", norm_after_pool=True),
        "norm_after_pool",
    ),
    "google, no positions": ("google", dict(position="none"), "position"),
    "google, gap beside a token": (
        "google",
        dict(pool="gap", class_token=True),
        r"pool|class_token",
    ),
    "google, swiglu": ("google", dict(mlp="swiglu", mlp_dim=6), "mlp"),
    "big_vision, registers": ("big_vision", dict(registers=2), "registers"),
    "big_vision, layer scale": ("big_vision", dict(layer_scale=1e-5), "scale1|layer_scale"),
    "big_vision, no qkv bias": ("big_vision", dict(qkv_bias=False), r"model\.qkv_bias=False"),
    "big_vision, token_gap": ("big_vision", dict(pool="token_gap"), r"model\.pool='token_gap'"),
    "big_vision, distilled": ("big_vision", dict(distillation="token"), "dist_token|distillation"),
    "big_vision, gap beside a token": (
        "big_vision",
        dict(pool="gap", class_token=True),
        r"pool|class_token",
    ),
    "big_vision, map beside a token": (
        "big_vision",
        dict(pool="map", class_token=True),
        r"pool|class_token",
    ),
    "big_vision, no positions": ("big_vision", dict(pool="gap", position="none"), "position"),
    "big_vision, swiglu": ("big_vision", dict(mlp="swiglu", mlp_dim=6), "mlp"),
    "timm, hidden layer": ("timm", dict(representation_size=6), "pre_logits|representation_size"),
    "timm, token_gap": ("timm", dict(pool="token_gap"), r"model\.pool='token_gap'"),
    "timm, pre_norm and patch bias": ("timm", dict(pre_norm=True), r"model\.patch_bias=True"),
    "timm, no patch bias": ("timm", dict(patch_bias=False), r"model\.patch_bias=False"),
    "timm, a token without its head": (
        "timm",
        dict(distillation="token"),
        r"model\.distillation='token'",
    ),
    "hf, gap": ("hf", dict(pool="gap"), r"model\.pool='gap'"),
    "hf, registers alone": ("hf", dict(registers=2), "registers"),
    "hf, swiglu alone": ("hf", dict(mlp="swiglu", mlp_dim=6), "mlp"),
    "hf, dinov2's head on a token": ("hf", dict(layer_scale=1e-5), r"model\.pool='token'"),
    "hf, siglip with a head": ("hf", dict(pool="map"), r"model\.num_classes=5"),
    "hf, clip with a head": (
        "hf",
        dict(pre_norm=True, patch_bias=False),
        r"model\.num_classes=5",
    ),
    "hf, siglip beside a token": (
        "hf",
        dict(pool="map", class_token=True, num_classes=0),
        r"pool|class_token|cls_token",
    ),
    "hf, siglip without positions": (
        "hf",
        dict(pool="map", position="none", num_classes=0),
        r"model\.position='none'",
    ),
    "hf, siglip and swiglu": (
        "hf",
        dict(pool="map", mlp="swiglu", mlp_dim=6, num_classes=0),
        "mlp",
    ),
    "hf, dinov2 without positions": (
        "hf",
        dict(layer_scale=1e-5, pool="token_gap", position="none"),
        r"model\.position='none'",
    ),
    "hf, hidden layer and head": (
        "hf",
        dict(representation_size=8),
        r"model\.representation_size=8",
    ),
    "hf, no positions": ("hf", dict(position="none"), r"model\.position='none'"),
    "hf, norm after pool": ("hf", dict(norm_after_pool=True), "norm_after_pool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_dialect_cannot_hold_is_refused(name, tmp_path):
    format, fields, message = REFUSED[name]
    vit = of(ViTConfig(**{**FIELDS, **fields}))
    ending = ".npz" if format in ("google", "big_vision") else ".safetensors"
    with pytest.raises(UserError, match=message):
        vit_jax.save(vit, tmp_path / f"x{ending}", format=format)
    assert not list(tmp_path.iterdir())
    ours = tmp_path / "ours.safetensors"  # which holds every model
    vit_jax.save(vit, ours)
    again = vit_jax.load(ours)
    assert_same(parameters(again.model), parameters(vit.model))
    assert again.config == vit.config


# -- Tokens before the patches, and their rows ---------------------------------------------------


def test_a_row_of_zeros_for_big_visions_token(loaded, tmp_path):
    vit = loaded("big_vision token")
    path = tmp_path / "google.npz"
    report = vit_jax.save(vit, path, format="google")
    written = dialects.read(path)
    table = written["Transformer/posembed_input/pos_embedding"]
    assert table.shape == (1, 5, 8) and not table[:, 0].any()
    np.testing.assert_array_equal(table[:, 1:], TOKEN.arrays["params/pos_embedding"])
    np.testing.assert_array_equal(written["cls"], TOKEN.arrays["params/cls"])
    assert "1 prefix tokens got a row of zeros" in report.assumed["pos_embed"]
    same_logits(vit, vit_jax.load(path), atol=0)


def test_a_row_of_googles_goes_into_the_token(loaded, tmp_path):
    vit = loaded("google paper")
    path = tmp_path / "big_vision.npz"
    report = vit_jax.save(vit, path, format="big_vision")
    written, table = dialects.read(path), PAPER.arrays[dialects.GOOGLE_POSITION]
    np.testing.assert_array_equal(written["params/cls"], PAPER.arrays["cls"] + table[:, :1])
    np.testing.assert_array_equal(written["params/pos_embedding"], table[:, 1:])
    assert "were added to them" in report.assumed["pos_embed"]
    same_logits(vit, vit_jax.load(path), atol=1e-5)


def same_logits(one, other, atol):
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    logits = [np.asarray(jax.jit(vit.model)(images)) for vit in (one, other)]
    assert np.abs(logits[0]).max() > 0.1
    np.testing.assert_allclose(*logits, rtol=0, atol=atol)


def test_rows_of_registers_and_a_distillation_token(tmp_path):
    # timm's table has rows for all prefix tokens or for none, Hugging Face's for all but registers.
    vit = of(ViTConfig(**{**FIELDS, "registers": 2, "position_prefix": 1, "layer_scale": 1.0}))
    before = parameters(vit.model)
    vit_jax.save(vit, tmp_path / "timm.safetensors", format="timm")
    written = dialects.read(tmp_path / "timm.safetensors")
    table = before["pos_embed"]
    np.testing.assert_array_equal(
        written["pos_embed"][0], np.concatenate([table[:1], np.zeros((2, 8)), table[1:]])
    )
    np.testing.assert_array_equal(written["cls_token"], before["cls_token"])
    np.testing.assert_array_equal(written["reg_token"], before["registers"])

    vit = of(ViTConfig(**{**FIELDS, "registers": 2, "num_classes": 0, "layer_scale": 1.0}))
    before = parameters(vit.model)
    vit_jax.save(vit, tmp_path / "hf.safetensors", format="hf")
    written = dialects.read(tmp_path / "hf.safetensors")
    table = before["pos_embed"]
    np.testing.assert_array_equal(
        written["embeddings.position_embeddings"][0], np.concatenate([table[:1], table[3:]])
    )
    np.testing.assert_array_equal(written["embeddings.cls_token"], before["cls_token"])
    np.testing.assert_array_equal(
        written["embeddings.register_tokens"], before["registers"] + table[1:3]
    )

    vit = of(ViTConfig(**{**FIELDS, "distillation": "head", "position_prefix": 0}))
    before = parameters(vit.model)
    vit_jax.save(vit, tmp_path / "deit.safetensors", format="hf")
    written = dialects.read(tmp_path / "deit.safetensors")
    np.testing.assert_array_equal(
        written["deit.embeddings.position_embeddings"][0],
        np.concatenate([np.zeros((2, 8)), before["pos_embed"]]),
    )


def test_fixed_positions_are_written_out_where_they_have_to_be(loaded, tmp_path):
    vit = loaded("big_vision sincos2d")
    report = vit_jax.save(vit, tmp_path / "google.npz", format="google")
    table = dialects.read(tmp_path / "google.npz")[dialects.GOOGLE_POSITION][0]
    # Quarters of two channels: sin and cos of the column, then of the row; frequencies 1, 1e-4.
    column = np.array([0, 1, 0, 1])[:, None] * [1, 1e-4]
    row = np.array([0, 0, 1, 1])[:, None] * [1, 1e-4]
    expected = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)
    np.testing.assert_allclose(table, expected, atol=1e-7)
    assert "sincos2d" in report.assumed["pos_embed"]
    again = vit_jax.load(tmp_path / "google.npz")
    assert (again.config.position, again.config.pool) == ("learned", "gap")


# -- Types and layouts of the numbers ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["google paper", "timm plain"])
def test_other_types_become_float32(name, kind, loaded, tmp_path):
    example = EXAMPLES[name]  # whose values all of them hold exactly
    if kind == "bfloat16":
        arrays = dialects.bfloat16(example.arrays)
    else:
        arrays = {key: value.astype(kind) for key, value in example.arrays.items()}
    path = changed(example, arrays).write(tmp_path)
    vit = vit_jax.load(path, **example.known)
    assert_same(parameters(vit.model), example.params())
    vit_jax.save(vit, tmp_path / f"out{example.ending}", format=example.format)
    assert_same(dialects.read(tmp_path / f"out{example.ending}"), example.written_back())


def test_numbers_that_float32_does_not_hold_are_rounded(tmp_path):
    values = np.array([1 / 3, 1e-50, 2**-149 * 1.5, 16777217.0, -0.0, 1e300, np.nan, np.inf])
    path = changed(PAPER, {"embedding/bias": values}).write(tmp_path)
    found = read_model(path)[1]["patch_embed"]["bias"]
    with np.errstate(over="ignore"):
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

    arrays = dict(reversed(TIMM.arrays.items()))
    path = tmp_path / "model"
    path.write_bytes(dialects.to_safetensors(arrays, None))
    assert_same(parameters(vit_jax.load(path, num_heads=2).model), TIMM.params())


def flat(params):
    return flatten_dict(params, sep="/")


@pytest.mark.parametrize("kind", ["int32", "bool", "complex64", "uint16", "U1"])
def test_what_is_no_real_number_is_refused(kind, tmp_path):
    cls = PAPER.arrays["cls"].astype(kind)
    path = changed(PAPER, {"cls": cls}).write(tmp_path)
    with pytest.raises(UserError, match=r"cls is .*expected one of float32, float16, bfloat16"):
        vit_jax.load(path)


def test_integers_that_are_no_part_of_the_model_do_no_harm(loaded):
    lines = {line.name: line for line in loaded("hf clip").report.lines}
    assert lines["vision_model.embeddings.position_ids"].fate == "left over"
    assert lines["logit_scale"].shape == ()


@pytest.mark.parametrize("prefix", ["model.", "module."])
def test_what_training_code_puts_before_timms_names(prefix, tmp_path):
    arrays = {prefix + key: value for key, value in TIMM.arrays.items()}
    path = dataclasses.replace(TIMM, arrays=arrays).write(tmp_path)
    assert_same(parameters(vit_jax.load(path, num_heads=2).model), TIMM.params())


# -- Grids ---------------------------------------------------------------------------------------


def with_rows(rows, **extra):
    table = np.random.default_rng(1).normal(size=(1, rows, 8)).astype(np.float32)
    return changed(PAPER, {dialects.GOOGLE_POSITION: table, **extra}), table[0]


def test_a_grid_that_is_no_square_has_to_be_told(tmp_path):
    example, table = with_rows(1 + 2 * 3)
    path = example.write(tmp_path)
    with pytest.raises(UserError, match=r"7 rows.* makes no square: give the image_size=\(h, w\)"):
        vit_jax.load(path)
    with pytest.raises(UserError, match="7 rows"):
        vit_jax.load(path, image_size=(8, 8))
    with pytest.raises(UserError, match="7 rows"):
        inspect(path, image_size=(8, 16))
    for size, grid in {(8, 12): (2, 3), (12, 8): (3, 2), (4, 24): (1, 6)}.items():
        vit = vit_jax.load(path, image_size=size)
        assert (vit.config.image_size, vit.config.grid) == (size, grid)
        assert vit.preprocess.image_size == size
        np.testing.assert_array_equal(vit.model.pos_embed[...], table)
        assert {line.fate for line in vit.report.lines} == {"kept"}


def test_patches_that_are_no_squares(tmp_path):
    arrays = dialects._flax("", position=dialects.GOOGLE_POSITION, rows=8, patch=(4, 2), seed=7)
    path = dataclasses.replace(PAPER, arrays=arrays).write(tmp_path)
    vit = vit_jax.load(path, image_size=8)
    assert (vit.config.patch_size, vit.config.grid) == ((4, 2), (2, 4))
    assert_same(parameters(vit.model), dialects.ours(arrays, 2)[0])


def test_a_table_that_could_be_two_grids(tmp_path):
    # 9 rows and 5 prefix tokens: 3x3 without rows for the tokens, or 2x2 and a row for each.
    arrays = dialects._timm(tokens={"cls_token": 1, "reg_token": 4}, rows=9)
    path = changed(TIMM, arrays).write(tmp_path / "alone")
    vit = vit_jax.load(path, num_heads=2)
    assert (vit.config.grid, vit.config.num_position_prefix) == ((2, 2), 5)
    assert "9 rows could also have 0" in vit.report.assumed["position_prefix"]
    config = dialects.timm_config("test_vit")
    config["config.json"]["model_args"]["img_size"] = 12
    path = changed(TIMM, arrays, files=config).write(tmp_path / "folder")
    vit = vit_jax.load(path)
    assert (vit.config.grid, vit.config.num_position_prefix) == ((3, 3), 0)
    assert "position_prefix" not in vit.report.assumed


def test_a_config_of_another_resolution_does_not_matter(tmp_path):
    config = {**VIT.files["config.json"], "image_size": 224}
    path = changed(VIT, files={"config.json": config}).write(tmp_path)
    assert vit_jax.load(path).config.image_size == (8, 8)


def test_fixed_positions_are_of_the_size_that_is_asked_for(tmp_path):
    path = EXAMPLES["big_vision sincos2d"].write(tmp_path)
    vit = vit_jax.load(path)
    assert vit.config.image_size == (224, 224) and "not in the file" in str(vit.report)
    vit = vit_jax.load(path, image_size=(8, 12))
    assert vit.config.grid == (2, 3) and "image_size" not in vit.report.assumed


# -- What the file does not say ------------------------------------------------------------------


def test_what_the_caller_knows_counts(tmp_path):
    path = TIMM.write(tmp_path)
    vit = vit_jax.load(path, num_heads=4, gelu="tanh", layernorm_eps=1e-3, pool="gap", dropout=0.1)
    assert (vit.config.num_heads, vit.config.gelu, vit.config.layernorm_eps) == (4, "tanh", 1e-3)
    assert (vit.config.pool, vit.config.has_class_token, vit.config.dropout) == ("gap", True, 0.1)
    assert_same(parameters(vit.model), dialects.ours(TIMM.arrays, 4)[0])
    assert not {"num_heads", "gelu", "layernorm_eps"} & set(vit.report.assumed)

    # Also beside a config.json, and beside a card of ours.
    vit = vit_jax.load(VIT.write(tmp_path / "hf"), num_heads=4, gelu="quick")
    assert (vit.config.num_heads, vit.config.gelu) == (4, "quick")
    vit = vit_jax.load(EXAMPLES["ours as timm"].write(tmp_path / "ours"), num_heads=4, gelu="erf")
    assert (vit.config.num_heads, vit.config.gelu) == (4, "erf")
    assert_same(parameters(vit.model), dialects.ours(EXAMPLES["ours as timm"].arrays, 4)[0])


def test_what_the_caller_knows_wrongly_is_said(tmp_path):
    path = TIMM.write(tmp_path)
    with pytest.raises(UserError, match=r"number of heads is not in the file.*give num_heads="):
        vit_jax.load(path)
    with pytest.raises(UserError, match="width 8 does not divide into 3 heads"):
        vit_jax.load(path, num_heads=3)
    with pytest.raises(
        UserError, match=r"unknown model field 'num_head'; did you mean 'num_heads'"
    ):
        vit_jax.load(path, num_head=2)
    with pytest.raises(UserError, match=r"model\.gelu is 'relu'"):
        vit_jax.load(path, num_heads=2, gelu="relu")
    with pytest.raises(UserError, match=r"\S+ has the shape \[8.*\]; .* needs \[.*16.*\]"):
        vit_jax.load(path, num_heads=2, width=16)
    with pytest.raises(UserError, match=r"blocks\.2\.\S+ .*is missing"):
        vit_jax.load(path, num_heads=2, depth=3)
    with pytest.raises(UserError, match=r"blocks.1.\S+ .*belongs to no part"):
        vit_jax.load(path, num_heads=2, depth=1)
    # Google's arrays have an axis for the heads.
    path = PAPER.write(tmp_path / "google")
    with pytest.raises(UserError, match=r"heads|query/kernel"):
        vit_jax.load(path, num_heads=4)


def test_heads_of_known_widths_are_assumed(tmp_path):
    for width, heads in {192: 3, 384: 6, 64: 1}.items():
        shapes = {key: np.asarray(value.shape) for key, value in TIMM.arrays.items()}
        arrays = {
            key: np.zeros(np.where(shape % 8 == 0, shape // 8 * width, shape), np.float32)
            for key, shape in shapes.items()
        }
        path = dataclasses.replace(TIMM, arrays=arrays).write(tmp_path / str(width))
        seen = inspect(path)
        assert f"{heads} heads" in seen.facts["sizes"]
        assert seen.assumed["num_heads"] == f"{heads} as in known models {width} wide"


CONTRADICTIONS = {
    "heads": ("hf vit", {"num_attention_heads": 3}, "does not divide into 3 heads"),
    "no heads": ("hf vit", {"num_attention_heads": 0}, "num_heads is 0"),
    "heads in words": ("hf vit", {"num_attention_heads": "two"}, "num_heads"),
    "activation": ("hf vit", {"hidden_act": "gelu_pytorch_tan"}, "mean 'gelu_pytorch_tanh'"),
    "epsilon": ("hf vit", {"layer_norm_eps": -1.0}, r"layernorm_eps is -1"),
    "nested": ("hf clip", {"vision_config": {"num_attention_heads": 3}}, "into 3 heads"),
    "timm's pooling": ("timm folder", {"model_args": {"global_pool": "max"}}, "global_pool 'max'"),
    "timm's activation": ("timm folder", {"model_args": {"act_layer": "rel"}}, "act_layer 'rel'"),
    "other blocks": ("timm folder", {"architecture": "vit_relpos_base_rpn_224"}, "is not known"),
    "map without its head": (
        "timm folder",
        {"model_args": {"global_pool": "map", "num_heads": 2}},
        "pool",
    ),
    "depth": ("hf vit", {"num_hidden_layers": 3}, "num_hidden_layers|layer.2"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_config_that_contradicts_the_weights(name, tmp_path):
    example, change, message = CONTRADICTIONS[name]
    files = EXAMPLES[example].files
    path = changed(
        EXAMPLES[example], files={**files, "config.json": {**files["config.json"], **change}}
    ).write(tmp_path)
    with pytest.raises(UserError, match=message):
        vit_jax.load(path)


# -- Adapting while loading ----------------------------------------------------------------------


def bilinear(image, size):
    """Resizes [h w] to `size`, samples in the middle of their pixels, without antialiasing."""
    out = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            total = 0.0
            y = (i + 0.5) * image.shape[0] / size[0] - 0.5
            x = (j + 0.5) * image.shape[1] / size[1] - 0.5
            for row in (int(np.floor(y)), int(np.floor(y)) + 1):
                for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                    weight = (1 - abs(y - row)) * (1 - abs(x - column))
                    inside = image[
                        np.clip(row, 0, image.shape[0] - 1), np.clip(column, 0, image.shape[1] - 1)
                    ]
                    total += weight * inside
            out[i, j] = total
    return out


def resize_matrix(old, new):
    """[new pixels, old pixels]: what every pixel of a patch becomes."""
    columns = []
    for pixel in range(old[0] * old[1]):
        basis = np.zeros(old[0] * old[1])
        basis[pixel] = 1
        columns.append(bilinear(basis.reshape(old), new).ravel())
    return np.stack(columns, axis=1)


def test_another_image_size_resizes_the_positions(tmp_path):
    path = PAPER.write(tmp_path)
    vit = vit_jax.load(path, image_size=(12, 20))
    assert vit.config.grid == (3, 5) and vit.preprocess.image_size == (12, 20)
    table = PAPER.arrays[dialects.GOOGLE_POSITION][0].astype(np.float64)
    expected = [table[0]]  # the token's row stays; corners stay corners, linear between them
    for y in np.linspace(0, 1, 3):
        for x in np.linspace(0, 1, 5):
            top = (1 - x) * table[1] + x * table[2]
            bottom = (1 - x) * table[3] + x * table[4]
            expected.append((1 - y) * top + y * bottom)
    found = parameters(vit.model)
    np.testing.assert_allclose(found.pop("pos_embed"), expected, atol=1e-6)
    assert_same(found, {k: v for k, v in PAPER.params().items() if k != "pos_embed"})
    fates = {line.name: line.fate for line in vit.report.lines}
    assert fates.pop("pos_embed") == "resized 2x2 -> 3x5 (zoom)" and set(fates.values()) == {"kept"}

    vit = vit_jax.load(path, image_size=(12, 20), position_resize="bilinear")
    grid = table[1:].reshape(2, 2, 8)
    expected = np.stack([bilinear(grid[..., d], (3, 5)).ravel() for d in range(8)], axis=1)
    np.testing.assert_allclose(vit.model.pos_embed[...][1:], expected, atol=1e-6)
    np.testing.assert_array_equal(vit.model.pos_embed[...][0], table[0])
    with pytest.raises(UserError, match="did you mean 'bilinear'"):
        vit_jax.load(path, image_size=(12, 20), position_resize="bilinea")
    with pytest.raises(UserError, match="does not divide into patches"):
        vit_jax.load(path, image_size=(12, 21))
    with pytest.raises(UserError, match="did you mean 'bilinear'"):
        vit_jax.load(path, position_resize="bilinea")  # although nothing is resized


@pytest.mark.parametrize(
    ("name", "method"),
    [("timm registers", "bicubic_antialias"), ("hf dinov2", "bicubic"), ("ours", "bilinear")],
)
def test_each_family_resizes_in_its_own_way(name, method, tmp_path):
    example = EXAMPLES[name]
    vit = vit_jax.load(example.write(tmp_path), image_size=16, **example.known)
    (fate,) = [line.fate for line in vit.report.lines if line.name == "pos_embed"]
    assert fate == f"resized 2x2 -> 4x4 ({method})"
    rows = vit.config.num_position_prefix
    assert vit.model.pos_embed.shape == (rows + 16, 8)
    np.testing.assert_array_equal(
        vit.model.pos_embed[...][:rows], example.params()["pos_embed"][:rows]
    )


@pytest.mark.parametrize("patch", [(6, 6), (5, 8), (3, 2), (8, 2)])
def test_another_patch_size_is_the_pseudo_inverse_of_a_resize(patch, tmp_path):
    vit = vit_jax.load(
        PAPER.write(tmp_path), patch_size=patch, image_size=(2 * patch[0], 2 * patch[1])
    )
    assert vit.config.patch_size == patch and vit.config.grid == (2, 2)
    old = PAPER.arrays["embedding/kernel"].astype(np.float64)
    new = np.asarray(vit.model.patch_embed.kernel[...])
    assert new.shape == (*patch, 3, 8)
    matrix = resize_matrix((4, 4), patch)
    expected = np.linalg.pinv(matrix.T) @ old.reshape(16, -1)
    np.testing.assert_allclose(new.reshape(-1, 3 * 8), expected, atol=1e-5)
    fates = {line.name: line.fate for line in vit.report.lines}
    assert fates["patch_embed/kernel"] == f"resampled 4x4 -> {patch[0]}x{patch[1]}"
    assert fates["pos_embed"] == "kept"
    if min(patch) >= 4:  # an enlarged patch embeds as it did before
        image = np.random.default_rng(2).normal(size=(4, 4, 3))
        larger = np.stack([bilinear(image[..., c], patch) for c in range(3)], axis=-1)
        np.testing.assert_allclose(
            np.einsum("pqc,pqcd->d", larger, new), np.einsum("pqc,pqcd->d", image, old), atol=2e-5
        )


def test_another_patch_size_at_the_same_image_size(tmp_path):
    vit = vit_jax.load(PAPER.write(tmp_path), patch_size=2)
    assert (vit.config.image_size, vit.config.grid) == ((8, 8), (4, 4))
    fates = {line.name: line.fate for line in vit.report.lines}
    assert fates["pos_embed"] == "resized 2x2 -> 4x4 (zoom)"


def adapted(kernel, channels):
    """timm's rule: a sum for one channel, else copies in turn, scaled to the same sum."""
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    old = kernel.shape[2]
    planes = [kernel[:, :, j % old] * old / channels for j in range(channels)]
    return np.stack(planes, axis=2)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_another_number_of_channels(channels, tmp_path):
    vit = vit_jax.load(VIT.write(tmp_path), in_channels=channels)
    kernel = VIT.params()["patch_embed/kernel"]
    found = vit.model.patch_embed.kernel[...]
    np.testing.assert_allclose(found, adapted(kernel, channels), rtol=1e-6)
    # What its channels have in common, an image without colour, is embedded on the same scale.
    np.testing.assert_allclose(found.sum(axis=2), kernel.sum(axis=2), atol=1e-5) if channels in (
        1,
        6,
    ) else None
    assert vit.config.in_channels == vit.preprocess.in_channels == channels
    assert vit.preprocess.mean == pytest.approx(0.5)  # of 0.25, 0.5 and 0.75
    assert vit.preprocess.std == pytest.approx(1.25 / 3)
    fates = {line.name: line.fate for line in vit.report.lines}
    assert fates.pop("patch_embed/kernel") == f"3 -> {channels} channels"
    assert set(fates.values()) == {"kept"}


def test_grey_weights_for_coloured_images(tmp_path):
    kernel = VIT.arrays["vit.embeddings.patch_embeddings.projection.weight"][:, :1]
    name = "vit.embeddings.patch_embeddings.projection.weight"
    path = changed(VIT, {name: kernel}).write(tmp_path)
    assert vit_jax.load(path).config.in_channels == 1
    vit = vit_jax.load(path, in_channels=3)
    found = np.asarray(vit.model.patch_embed.kernel[...])
    for channel in range(3):
        np.testing.assert_allclose(
            found[:, :, channel], kernel[:, 0].transpose(1, 2, 0) / 3, rtol=1e-6
        )


def test_another_head_starts_at_zero(tmp_path):
    target = EXAMPLES["google opt/target"]
    vit = vit_jax.load(target.write(tmp_path), num_classes=7)
    assert vit.config.representation_size is None and vit.labels == tuple("0123456")
    found = parameters(vit.model)
    assert found["head/kernel"].shape == (8, 7) and not found.pop("head/kernel").any()
    assert not found.pop("head/bias").any()
    gone = ("head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias")
    assert_same(found, {k: v for k, v in target.params().items() if k not in gone})
    fates = {line.name: line.fate for line in vit.report.lines}
    assert [fates[name] for name in gone] == ["fresh", "fresh", "dropped", "dropped"]

    vit = vit_jax.load(EXAMPLES["hf dinov2"].write(tmp_path / "dinov2"), num_classes=3)
    assert vit.model.head.kernel.shape == (16, 3)  # token and mean side by side
    vit = vit_jax.load(EXAMPLES["hf deit"].write(tmp_path / "deit"), num_classes=3)
    assert vit.config.distillation == "token" and "head_dist/kernel" not in parameters(vit.model)
    vit = vit_jax.load(PAPER.write(tmp_path / "none"), num_classes=0)
    assert not hasattr(vit.model, "head") and vit.labels == ()


def test_all_of_it_at_once(tmp_path):
    vit = vit_jax.load(
        VIT.write(tmp_path),
        image_size=(18, 24),
        patch_size=6,
        in_channels=4,
        num_classes=3,
        dtype="bfloat16",
        position_resize="bilinear",
        gelu="tanh",
    )
    config = dataclasses.replace(ViTConfig(**VIT.config), gelu="tanh", dtype="bfloat16")
    changes = dict(image_size=(18, 24), patch_size=6, in_channels=4, num_classes=3)
    assert amounts_to(vit.config) == amounts_to(dataclasses.replace(config, **changes))
    before, found = VIT.params(), parameters(vit.model)
    kernel = adapted(before.pop("patch_embed/kernel").astype(np.float64), 4)
    expected = np.linalg.pinv(resize_matrix((4, 4), (6, 6)).T) @ kernel.reshape(16, -1)
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
    assert np.asarray(jax.eval_shape(vit.model, images).shape).tolist() == [1, 3]


# -- Onto many devices ---------------------------------------------------------------------------

SPECS = {
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


@pytest.mark.parametrize("name", ["google paper", "hf vit"])
def test_parameters_go_to_their_devices(name, tmp_path):
    example = EXAMPLES[name]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    place = functools.partial(placement, mesh=mesh)
    vit = vit_jax.load(example.write(tmp_path), shardings=place, **example.known)
    assert_sharded(vit.model, example.params(), SPECS, mesh)


def assert_sharded(model, expected, specs, mesh):
    state = flatten_dict(nnx.to_pure_dict(nnx.state(model)), sep="/")
    assert sorted(state) == sorted(expected)
    for path, array in state.items():
        wanted = NamedSharding(mesh, specs.get(path, P()))
        assert array.sharding.is_equivalent_to(wanted, array.ndim), path
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[path][shard.index], err_msg=path)


def test_a_run_folder_goes_to_its_devices(tiny_run):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    expected = flat(read_model(tiny_run[0])[1])
    split = {
        "patch_embed/kernel": P(None, None, None, "fsdp"),
        "pos_embed": P(None, "fsdp"),
        "pre_logits/kernel": P("fsdp", None),
        "head/kernel": P("fsdp", None),
        "blocks/attention/qkv/kernel": P(None, "fsdp", None, None, None),
        "blocks/attention/out/kernel": P(None, None, None, "fsdp"),
        "blocks/mlp/fc1/kernel": P(None, "fsdp", None),
        "blocks/mlp/fc2/kernel": P(None, None, "fsdp"),
    }
    vit = vit_jax.load(tiny_run[0], shardings=functools.partial(placement, mesh=mesh))
    assert_sharded(vit.model, expected, split, mesh)


# -- Preprocessing and label names ---------------------------------------------------------------


def test_preprocessing_of_hugging_face(loaded, tmp_path):
    assert loaded("hf vit").preprocess == Preprocess(
        (8, 8), resize="bilinear_antialias", mean=(0.25, 0.5, 0.75), std=(0.5, 0.25, 0.5)
    )
    assert "preprocess" not in loaded("hf vit").report.assumed
    clip = {
        "do_center_crop": True,
        "crop_size": {"height": 8, "width": 8},
        "size": {"shortest_edge": 10},
        "resample": 3,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1.0, 2.0, 3.0],
    }
    for preprocessor, expected in [
        (
            clip,
            dict(resize="bicubic_antialias", aspect="keep", crop=0.8)
            | dict(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)),
        ),
        ({"size": 8, "do_normalize": False}, dict(resize="bilinear_antialias", mean=0.0, std=1.0)),
        ({**clip, "size": {"shortest_edge": 8}, "image_mean": 0.5, "image_std": 0.5}, None),
    ]:
        expected = expected or dict(resize="bicubic_antialias", aspect="keep", mean=0.5, std=0.5)
        files = {**VIT.files, "preprocessor_config.json": preprocessor}
        path = changed(VIT, files=files).write(tmp_path)
        assert vit_jax.load(path).preprocess == Preprocess((8, 8), **expected)
    for wrong, message in {
        "resample": ({"resample": 7}, "resample 7"),
        "scale": ({"rescale_factor": 1 / 127.5}, "scaled by 0.0078"),
        "no scale": ({"do_rescale": False}, "scaled"),
        "type": ({"image_mean": {"red": 1}}, "damaged"),
        "crop": ({"do_center_crop": True, "crop_size": 8, "size": 4}, "crop is 2"),
    }.values():
        path = changed(VIT, files={**VIT.files, "preprocessor_config.json": wrong}).write(tmp_path)
        with pytest.raises(UserError, match=message):
            vit_jax.load(path)


def test_preprocessing_of_timm(loaded, tmp_path):
    assert loaded("timm folder").preprocess == Preprocess(
        (8, 8),
        resize="bicubic_antialias",
        aspect="keep",
        crop=0.9,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    folder = EXAMPLES["timm folder"]
    for change, expected in [
        ({"crop_mode": "squash", "crop_pct": 1.0}, dict(aspect="squash", crop=1.0)),
        (
            {"interpolation": "bilinear", "mean": [0, 0.5, 1], "std": [1, 2, 3.0]},
            dict(resize="bilinear_antialias", mean=(0.0, 0.5, 1.0), std=(1.0, 2.0, 3.0)),
        ),
    ]:
        config = json.loads(json.dumps(folder.files["config.json"]))
        config["pretrained_cfg"] |= change
        path = changed(folder, files={"config.json": config}).write(tmp_path)
        usual = dict(resize="bicubic_antialias", aspect="keep", crop=0.9, mean=(0.5,) * 3)
        assert vit_jax.load(path).preprocess == Preprocess(
            (8, 8), **{**usual, "std": (0.5,) * 3, **expected}
        )


NEAREST = [
    ("timm folder", {"crop_mode": "border"}, "crop_mode", dict(aspect="squash")),
    ("timm folder", {"interpolation": "random"}, "interpolation", dict(resize="bicubic_antialias")),
    ("timm folder", {"interpolation": "box"}, "interpolation", dict(resize="bilinear_antialias")),
    ("hf vit", {"resample": 1}, "resample", dict(resize="bicubic_antialias")),
    *(
        ("hf vit", {"resample": number}, "resample", dict(resize="bilinear_antialias"))
        for number in (0, 4, 5)
    ),
]


@pytest.mark.parametrize("name, change, said, expected", NEAREST, ids=str)
def test_the_nearest_preprocessing_is_taken_and_said(name, change, said, expected, tmp_path):
    example = EXAMPLES[name]
    files = json.loads(json.dumps(example.files))
    if name == "hf vit":
        files["preprocessor_config.json"] = {**dialects.PREPROCESSOR, **change}
    else:
        files["config.json"]["pretrained_cfg"] |= change
    opened = open_model(changed(example, files=files).write(tmp_path))
    assert set(opened.assumed) - {"num_heads", "labels"} == {said}
    told = opened.card.preprocess
    assert {field: getattr(told, field) for field in expected} == expected


@pytest.mark.parametrize("change", [{"crop_mode": "centre"}, {"interpolation": "cubic"}])
def test_damaged_preprocessing_is_refused(change, tmp_path):
    files = json.loads(json.dumps(EXAMPLES["timm folder"].files))
    files["config.json"]["pretrained_cfg"] |= change
    with pytest.raises(UserError, match=next(iter(change.values()))):
        open_model(changed(EXAMPLES["timm folder"], files=files).write(tmp_path))


def test_label_names(loaded, tmp_path):
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
        files = {"config.json": {**VIT.files["config.json"], "id2label": id2label}}
        vit = vit_jax.load(changed(VIT, files=files).write(tmp_path))
        assert vit.labels == expected
        assert (said is None) == ("labels" not in vit.report.assumed)
        assert said is None or said in vit.report.assumed["labels"]
    folder = EXAMPLES["timm folder"]
    files = {"config.json": {**folder.files["config.json"], "label_names": list(names)}}
    assert vit_jax.load(changed(folder, files=files).write(tmp_path / "timm")).labels == names

    thousand = dialects._flax(
        "", old=True, position=dialects.GOOGLE_POSITION, rows=5, cls=True, classes=1000
    )
    vit = vit_jax.load(dataclasses.replace(PAPER, arrays=thousand).write(tmp_path / "imagenet"))
    assert (vit.labels[0], vit.labels[281]) == ("tench, Tinca tinca", "tabby, tabby cat")
    assert len(set(vit.labels)) == 1000 and "ImageNet-1k's" in vit.report.assumed["labels"]


FORMATS = {
    "google": "x.npz",
    "big_vision": "x.npz",
    "timm": "x.safetensors",
    "hf": "x.safetensors",
    "vit_jax": "x.safetensors",
    "timm folder": "x",
    "hf folder": "x",
    "vit_jax folder": "x",
}


@pytest.mark.parametrize("format", FORMATS)
def test_what_a_model_means_travels_with_it(format, loaded, tmp_path):
    preprocess = Preprocess(
        (8, 8),
        resize="area",
        aspect="keep",
        crop=0.625,
        resize_dtype="truncated",
        mean=(0.1, 0.2, 0.3),
        std=0.7,
    )
    vit = dataclasses.replace(
        loaded("hf vit"),
        preprocess=preprocess,
        labels=("ä", "b, c", "", '"', "汉"),
        objective="sigmoid",
    )
    path = tmp_path / FORMATS[format]
    vit_jax.save(vit, path, format=format.split()[0])
    again = vit_jax.load(path)
    assert (again.preprocess, again.labels) == (vit.preprocess, vit.labels)
    assert (again.objective, again.position_resize) == ("sigmoid", "bicubic")
    rows = {"position_prefix": 0} if format == "big_vision" else {}
    assert amounts_to(again.config) == amounts_to(vit.config) | rows
    assert (again.config.gelu, again.config.layernorm_eps) == ("erf", 1e-12)
    if "folder" in format:
        assert_same(parameters(again.model), VIT.params())
    card = dialects.read_record(path)
    assert card["labels"] == list(vit.labels) and card["objective"] == "sigmoid"
    assert card["grid"] == [2, 2] and card["num_prefix_tokens"] == 1


@pytest.mark.parametrize("format", ["timm", "hf"])
def test_what_a_model_means_is_in_the_files_of_others_too(format, loaded, tmp_path):
    """A folder without our card in it: as their own libraries would write it."""
    vit = loaded("hf vit")
    if format == "timm":  # whose LayerNorm's epsilon is nowhere
        config = dataclasses.replace(vit.config, layernorm_eps=1e-6)
        vit = dataclasses.replace(vit, config=config)
    report = vit_jax.save(vit, tmp_path / "x", format=format)
    assert not report.assumed
    weights = tmp_path / "x" / "model.safetensors"
    weights.write_bytes(dialects.to_safetensors(dialects.read(weights), {"format": "pt"}))
    again = vit_jax.load(tmp_path / "x")
    assert again.labels == (vit.labels)
    assert again.preprocess == vit.preprocess
    assert amounts_to(again.config) == amounts_to(vit.config)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    if format == "hf":
        # Everything that was in the config.json that it came with, and a type for the numbers.
        assert config.pop("label2id") == {name: int(i) for i, name in dialects.NAMES.items()}
        assert config.pop("dtype") == "float32"
        expected = {**VIT.files["config.json"], "architectures": ["ViTForImageClassification"]}
        assert config == expected
        processor = json.loads((tmp_path / "x" / "preprocessor_config.json").read_text())
        assert processor.pop("do_center_crop") is False
        assert processor == dialects.PREPROCESSOR


# -- Run folders, and files that are written -----------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_trained_run_in_other_formats(format, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run[0], run)
    card = json.loads((run / "model" / "model.json").read_text())
    card["objective"] = "sigmoid"
    (run / "model" / "model.json").write_text(json.dumps(card))
    path = tmp_path / FORMATS[format]
    dialect = format.split()[0]
    vit = vit_jax.load(run)
    if dialect in ("timm", "hf"):  # neither has a hidden layer before the head
        with pytest.raises(UserError, match=r"pre_logits|representation_size"):
            vit_jax.save(vit, path, format=dialect)
        assert not path.exists()
        vit = vit_jax.load(run, num_classes=10)
    vit_jax.save(vit, path, format=dialect)
    again = vit_jax.load(path)
    before, after = parameters(vit.model), parameters(again.model)
    if dialect == "big_vision":
        table = before.pop("pos_embed")
        before["cls_token"] = before["cls_token"] + table[:1]
        np.testing.assert_array_equal(after.pop("pos_embed"), table[1:])
    assert_same(after, before)
    assert (again.labels, again.preprocess) == (vit.labels, vit.preprocess)
    assert (again.objective, vit.objective) == ("sigmoid", "sigmoid")
    assert again.step is None


def test_a_run_says_itself_what_it_is(tiny_run):
    with pytest.raises(UserError, match="is a run folder, which says itself what gelu is"):
        vit_jax.load(tiny_run[0], gelu="erf")


def test_where_a_model_may_be_written(loaded, tmp_path):
    vit = loaded("google paper")
    for name, format, message in [
        ("x.pt", "timm", r"a timm file is named \.\.\.\.safetensors, and a folder is not"),
        ("x.PT", "timm", r"a timm file is named \.\.\.\.safetensors, and a folder is not"),
        ("x.SAFETENSORS", "timm", r"a timm file is named \.\.\.\.safetensors"),
        ("x.onnx", "vit_jax", r"a vit_jax file is named \.\.\.\.safetensors, and a folder is"),
        ("x.pt", "google", r"a google file is named \.\.\.\.npz"),
        ("x.safetensors", "google", r"a google file is named \.\.\.\.npz"),
        ("x", "big_vision", r"a big_vision file is named \.\.\.\.npz"),
        ("x.npz", "timm", r"a timm file is named \.\.\.\.safetensors"),
        ("x.npz", "vit_jax", r"a vit_jax file is named \.\.\.\.safetensors"),
        ("x.npz", "gogle", "format 'gogle': did you mean 'google'"),
        ("nowhere/x.npz", "google", "there is no folder .*nowhere"),
        ("nowhere/x.safetensors", "timm", "there is no folder .*nowhere"),
    ]:
        with pytest.raises(UserError, match=message):
            vit_jax.save(vit, tmp_path / name, format=format)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file"):
        vit_jax.save(vit, tmp_path / "file", format="timm")
    assert (tmp_path / "file").read_text() == "mine"
    for name, format in {"folder.npz": "google", "folder.safetensors": "timm"}.items():
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match="folder"):
            vit_jax.save(vit, tmp_path / name, format=format)


def test_a_folder_of_other_things_stays_as_it_is(loaded, tmp_path):
    vit = loaded("hf vit")
    (tmp_path / "1.jpg").write_text("mine")
    for format in ("timm", "hf", "vit_jax"):
        with pytest.raises(
            UserError, match=r"holds other things \(1\.jpg\): name a new or an empty"
        ):
            vit_jax.save(vit, tmp_path, format=format)
    assert [file.name for file in tmp_path.iterdir()] == ["1.jpg"]
    vit_jax.save(vit, tmp_path / "new.tag_in21k", format="hf")
    (tmp_path / "new.tag_in21k" / "README.md").write_text("mine")
    vit_jax.save(vit, tmp_path / "new.tag_in21k", format="hf")


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_of_the_umask(mask, mode, loaded, tmp_path):
    before = os.umask(mask)
    try:
        vit_jax.save(loaded("hf vit"), tmp_path / "hf", format="hf")
        vit_jax.save(loaded("hf vit"), tmp_path / "x.npz", format="google")
        write_atomically(epath.Path(tmp_path) / "x.txt", "?")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.rglob("*.*")}
    assert len(modes) == 6 and set(modes.values()) == {mode}


CALLS = {
    "first replace": (os, "replace", 1),
    "second replace": (os, "replace", 2),
    "third replace": (os, "replace", 3),
    "np.savez": (np, "savez", 1),
    "save_file": (safetensors.numpy, "save_file", 1),
    "json.dumps": (json, "dumps", 1),
}


@pytest.mark.parametrize("format", ["google", "vit_jax", "hf folder"])
@pytest.mark.parametrize("call", CALLS)
def test_what_is_interrupted_is_the_old_model_or_the_new(
    call, format, loaded, tmp_path, monkeypatch
):
    """Whichever call does not come back: no half a file, no weights under another's card."""
    path = tmp_path / FORMATS[format]
    old, new = loaded("google paper"), loaded("hf vit")
    vit_jax.save(old, path, format="google" if format == "google" else "vit_jax")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    owner, name, nth = CALLS[call]
    original, left = getattr(owner, name), [nth]

    def stopped(*args, **kwargs):
        left[0] -= 1
        if left[0]:
            return original(*args, **kwargs)
        if name == "savez":
            args[0].write(b"PK\x03\x04half")
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, stopped)
    try:
        vit_jax.save(new, path, format=format.split()[0])
        whole = True
    except KeyboardInterrupt:
        whole = False
    monkeypatch.undo()
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    if not whole and nth == 1:
        assert {k: v for k, v in after.items() if not k.name.startswith(".")} == before
    again = vit_jax.load(path)
    assert again.labels in ((new.labels,) if whole else (old.labels, new.labels))
    expected = PAPER if again.labels == old.labels else VIT
    assert_same(parameters(again.model), expected.params())


def test_a_new_file_takes_the_place_of_the_old_one(loaded, tmp_path):
    path = tmp_path / "x.npz"
    vit_jax.save(loaded("google no head"), path, format="google")
    vit_jax.save(loaded("hf vit"), path, format="big_vision")
    again = vit_jax.load(path)
    assert again.labels == loaded("hf vit").labels
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.json", "x.npz"]

    folder = EXAMPLES["hf sharded"].write(tmp_path / "shards")
    vit_jax.save(loaded("hf vit pooler"), folder, format="hf")
    assert_same(parameters(vit_jax.load(folder).model), EXAMPLES["hf vit pooler"].params())


def test_a_record_is_of_its_own_weights_alone(loaded, tmp_path):
    """FILE.json says what FILE.npz means: not FILE.safetensors, nor another FILE.npz later on."""
    vit = dataclasses.replace(loaded("google paper"), labels=tuple("abcde"))
    vit_jax.save(vit, tmp_path / "x.npz", format="google")
    assert vit_jax.load(tmp_path / "x.npz").labels == tuple("abcde")
    (tmp_path / "x.safetensors").write_bytes(TIMM.to_bytes())
    other = vit_jax.load(tmp_path / "x.safetensors", num_heads=2)
    assert (other.labels, other.config.gelu) == (tuple("01234"), "erf")
    arrays = {name: value + 1 for name, value in PAPER.arrays.items()}
    (tmp_path / "x.npz").write_bytes(dialects.to_npz(arrays))
    try:
        assert vit_jax.load(tmp_path / "x.npz").labels == tuple("01234")
    except UserError as error:
        assert "x.json" in str(error)


# -- What is wrong is said -----------------------------------------------------------------------


def test_a_key_that_is_missing(tmp_path):
    gone = "blocks.1.attn.proj.weight"
    arrays = {gone: None, "blocks.1.attn.proj.wieght": TIMM.arrays[gone]}
    path = changed(TIMM, arrays).write(tmp_path)
    message = (
        r"the key blocks\.1\.attn\.proj\.weight of shape \[8, 8\] is missing; did you mean "
        r"'blocks\.1\.attn\.proj\.wieght'\?"
    )
    with pytest.raises(UserError, match=message):
        vit_jax.load(path, num_heads=2)


def test_a_key_of_another_shape(tmp_path):
    path = changed(PAPER, {"head/kernel": np.zeros((8, 6), np.float32)}).write(tmp_path)
    with pytest.raises(UserError, match=r"head/bias has the shape \[5\]; .* needs \[6\]"):
        vit_jax.load(path)
    key = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"
    path = changed(PAPER, {key: np.zeros((8, 13), np.float32)}).write(tmp_path)
    with pytest.raises(UserError, match=key + r" has the shape \[8, 13\]; .* needs \[8, 12\]"):
        vit_jax.load(path)
    path = changed(PAPER, {"embedding/kernel": np.zeros((8, 8), np.float32)}).write(tmp_path)
    with pytest.raises(
        UserError, match=r"embedding/kernel has the shape \[8, 8\]; expected 4 axes"
    ):
        vit_jax.load(path)


def test_a_key_too_many(tmp_path):
    extra = {"blocks.1.mlp.fc1.weigth": np.zeros((3, 2), np.float32)}
    path = changed(TIMM, extra).write(tmp_path)
    message = (
        r"blocks\.1\.mlp\.fc1\.weigth \[3, 2\] belongs to no part of a ViT under timm's "
        r"names; did you mean 'blocks\.1\.mlp\.fc1\.weight'\?"
    )
    with pytest.raises(UserError, match=message):
        vit_jax.load(path, num_heads=2)


@pytest.mark.parametrize("name", ["google paper", "timm distilled", "hf clip"])
def test_whatever_key_is_missing_is_said(name, tmp_path):
    example, accepted = EXAMPLES[name], set()
    for key in example.arrays:
        path = changed(example, {key: None}).write(tmp_path)
        try:
            inspect(path, **example.known)
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


def test_what_is_no_model_at_all(tmp_path):
    arrays = {"encoder.weight": np.zeros((3, 3), np.float32)}
    path = dataclasses.replace(TIMM, arrays=arrays).write(tmp_path)
    with pytest.raises(UserError, match=r"names of no known code base \(encoder.weight, ...\)"):
        vit_jax.load(path)
    path = dataclasses.replace(TIMM, arrays={}).write(tmp_path)
    with pytest.raises(UserError, match="holds no arrays"):
        vit_jax.load(path)
    path = dataclasses.replace(EXAMPLES["ours"], card=None).write(tmp_path)
    with pytest.raises(UserError, match="our names, but no card"):
        vit_jax.load(path)


# -- From the shell ------------------------------------------------------------------------------


def test_inspect_prints_what_a_file_is(tmp_path, capsys):
    path = EXAMPLES["timm registers"].write(tmp_path)
    assert main(["inspect", str(path), "--set", "num_heads=2"]) == 0
    out = capsys.readouterr().out
    for pattern in [
        rf"file: +timm, {re.escape(str(path))}\n",
        r"variant: +custom, [\d,]+ parameters\n",
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
    ]:
        assert re.search(pattern, out), f"{pattern} is not in\n{out}"
    total = sum(value.size for value in EXAMPLES["timm registers"].arrays.values())
    assert f"{total:,} parameters" in out

    path = EXAMPLES["hf clip"].write(tmp_path / "clip")
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"file: +hf, ", out) and re.search(r"GELU: +quick, LayerNorm eps 1e-05", out)
    assert re.search(r"logit_scale +\(\) +left over +logit_scale\n", out)
    assert "assumed:" in out and "'0'" not in out

    path = EXAMPLES["big_vision map"].write(tmp_path / "map")
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"pooling: +map\n", out) and re.search(r"prefix tokens: +0\n", out)
    assert re.search(r"in the file\n", out)
    assert re.search(
        r"attention_pool/attention/qkv/kernel +8x3x2x4 .*query/kernel \+ .*key/kernel \+ ", out
    )


def test_convert_writes_what_load_reads(tmp_path, capsys, loaded):
    src, dst = VIT.write(tmp_path), tmp_path / "out.npz"
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
    src = example.write(tmp_path / "wide")
    argv = ["convert", str(src), str(tmp_path / "folder"), "--format=timm"]
    assert main([*argv, "--set", "image_size=(8, 12)"]) == 0
    vit = vit_jax.load(tmp_path / "folder")
    assert vit.config.image_size == (8, 12)
    np.testing.assert_array_equal(vit.model.pos_embed[...], table)


MISTAKES = {
    "field": (["--set", "nonsense"], "unknown model field in 'nonsense'"),
    "misspelt field": (["--set", "num_head=2"], "did you mean 'num_heads'"),
    "no value": (["--set", "num_heads"], "'num_heads'"),
    "wrong type": (["--set", "num_heads=two"], "'num_heads=two'"),
    "wrong choice": (["--set", "gelu=relu"], "gelu is 'relu'"),
    "heads": (["--set", "num_heads=3"], "does not divide into 3 heads"),
    "not a number": (["--set", "layernorm_eps=nan"], "layernorm_eps"),
    "unknown flag": (["--num_heads=2"], "unknown argument '--num_heads=2'"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_mistake_is_one_sentence(command, name, tmp_path, capsys):
    flags, message = MISTAKES[name]
    path = VIT.write(tmp_path / "in")
    argv = [command, str(path)]
    if command == "convert":
        argv += [str(tmp_path / "out.npz"), "--format=google"]
    assert message in fails(capsys, *argv, *flags)
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def fails(capsys, *argv):
    assert main([str(arg) for arg in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert "Traceback" not in captured.err and captured.err.count("\n") == 1
    return captured.err


def test_mistakes_about_files(tmp_path, capsys):
    path, out = VIT.write(tmp_path / "in"), tmp_path / "out.npz"
    for format, message in {
        "gogle": "format 'gogle': did you mean 'google'",
        "timm": "a timm file is named",
    }.items():
        assert message in fails(capsys, "convert", path, out, f"--format={format}")
    assert "no folder" in fails(capsys, "convert", path, "/nowhere/x.npz", "--format=google")
    for command in (["inspect"], ["convert"]):
        rest = [out, "--format=google"] if command == ["convert"] else []
        assert "there is no '/nowhere'" in fails(capsys, *command, "/nowhere", *rest)
        assert "holds no weights" in fails(capsys, *command, tmp_path, *rest)
        pickled = tmp_path / "model.pt"
        pickled.write_bytes(b"\x80\x02}q\x00.")
        assert "safetensors.torch.save_file" in fails(capsys, *command, pickled, *rest)
        pickled.unlink()
    assert not out.exists()
    assert "are required: --format" in fails(capsys, "convert", path, out)


def test_preprocessing_of_a_bare_file_of_timm(loaded):
    """AugReg's, as nearly all of timm's plain ViTs have it."""
    expected = dict(resize="bicubic_antialias", aspect="keep", crop=0.9)
    assert loaded("timm plain").preprocess == Preprocess((8, 8), **expected)

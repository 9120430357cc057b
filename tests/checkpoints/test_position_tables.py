"""Position embeddings of other kinds, through files: ours hold all, others what they can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vit_jax
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig
from vit_jax.models.vit import structure

TINY = dict(
    image_size=(12, 20), patch_size=4, width=8, depth=2, mlp_dim=8, num_heads=2, num_classes=5
)
KINDS = {
    "layers": dict(position_at="layers"),
    "2d": dict(position="learned2d"),
    "2d added, layers": dict(position="learned2d_added", position_at="layers"),
    "2d, shared": dict(position="learned2d", position_at="layers_shared"),
    "relative": dict(position="relative"),
}
FORMATS = {"google": "npz", "big_vision": "npz", "timm": "safetensors", "hf": "safetensors"}


def model_of(**fields):
    graphdef, shapes = structure(ViTConfig(**TINY | fields))
    random = np.random.default_rng(0)
    return nnx.merge(
        graphdef, jax.tree.map(lambda x: jnp.float32(random.normal(size=x.shape)), shapes)
    )


def values(model):
    return nnx.to_pure_dict(nnx.state(model))


@pytest.mark.parametrize("kind", KINDS)
def test_our_format_holds_them_all(kind, tmp_path):
    model = model_of(**KINDS[kind])
    path = tmp_path / "model.safetensors"
    vit_jax.save(model, path)
    again = vit_jax.load(path)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, values(again.model), values(model))
    if kind == "relative":
        with pytest.raises(UserError, match="relative positions of a grid of 3x5 do not fit"):
            vit_jax.load(path, image_size=(24, 20))
        return
    resized = vit_jax.load(path, image_size=(24, 20))
    fates = {line.name: line.fate for line in resized.report.lines}
    tables = [name for name in fates if "pos_embed" in name and "prefix" not in name]
    assert tables and {fates[name] for name in tables} == {"resized 3x5 -> 6x5 (zoom)"}
    assert resized.model.positions().shape[-2:] == (31, 8)
    assert resized.report.facts["positions"].startswith(model.config.position)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["layers", "2d, shared", "relative"])
def test_other_formats_refuse_what_their_models_do_not_have(kind, format, tmp_path):
    model, path = model_of(**KINDS[kind]), tmp_path / f"model.{FORMATS[format]}"
    field = "position" if kind == "relative" else "position_at"
    named = f"{format} has no models with model.{field}={getattr(model.config, field)!r}"
    with pytest.raises(UserError, match=named):
        vit_jax.save(model, path, format=format)


@pytest.mark.parametrize("format", FORMATS)
def test_two_tables_are_written_out_as_one(format, tmp_path):
    model = model_of(position="learned2d", image_size=12)
    path = tmp_path / f"model.{FORMATS[format]}"
    report = vit_jax.save(model, path, format=format)
    assert "written out as one table" in report.assumed["pos_embed"]
    again = vit_jax.load(path).model
    assert again.config.position == "learned"
    sums = []
    for each in (model, again):  # the class token's row may have become a part of it
        table = np.array(each.positions())
        table[0] += np.asarray(each.cls_token[...])[0, 0]
        sums.append(table)
    np.testing.assert_allclose(*sums, atol=1e-6)


def test_a_file_of_theirs_is_not_of_another_kind(tmp_path):
    path = tmp_path / "model.safetensors"
    vit_jax.save(model_of(image_size=12), path, format="timm")
    for kind in ("relative", "2d", "layers"):
        with pytest.raises(UserError, match="timm's names have no place for"):
            vit_jax.load(path, **KINDS[kind])

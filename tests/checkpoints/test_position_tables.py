"""Position embeddings of other kinds, through files: ours hold all, others what they can."""

import jax
import numpy as np
import pytest
from test_dialects import assert_same, of, parameters, refused

import vit_jax
from vit_jax.errors import UserError
from vit_jax.models.config import ViTConfig

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
    return of(ViTConfig(**TINY | fields)).model


@pytest.mark.parametrize("kind", KINDS)
def test_our_format_holds_them_all_and_others_do_not(kind, tmp_path):
    model, path = model_of(**KINDS[kind]), tmp_path / "model.safetensors"
    vit_jax.save(model, path)
    again = vit_jax.load(path)
    assert again.config == model.config
    assert_same(parameters(again.model), parameters(model))
    if kind == "relative":
        message = "relative positions of a grid of 3x5 do not fit"
        refused(message, path, image_size=(24, 20))
    else:
        resized = vit_jax.load(path, image_size=(24, 20))
        statuses = {line.name: line.status for line in resized.report.lines}
        tables = [name for name in statuses if "pos_embed" in name and "prefix" not in name]
        assert tables and {statuses[name] for name in tables} == {"resized 3x5 -> 6x5 (zoom)"}
        assert jax.eval_shape(resized.model.positions).shape[-2:] == (31, 8)
        assert resized.report.facts["positions"].startswith(model.config.position)
    for format, ending in FORMATS.items() if kind in ("layers", "2d, shared", "relative") else ():
        field = "position" if kind == "relative" else "position_at"
        named = f"{format} has no models with model.{field}={getattr(model.config, field)!r}"
        with pytest.raises(UserError, match=named):
            vit_jax.save(model, tmp_path / f"x.{ending}", format=format)


def test_two_tables_are_written_out_as_one(tmp_path):
    model = model_of(position="learned2d", image_size=12)
    tables = []
    for format, ending in FORMATS.items():
        path = tmp_path / f"{format}.{ending}"
        report = vit_jax.save(model, path, format=format)
        assert "written out as one table" in report.assumed["pos_embed"]
        again = vit_jax.load(path).model
        assert again.config.position == "learned"
        tables.append(again)
    sums = []
    for each in (model, *tables):  # the class token's row may have become a part of it
        table = np.array(each.positions())
        table[0] += np.asarray(each.cls_token[...])[0, 0]
        sums.append(table)
    for table in sums[1:]:
        np.testing.assert_allclose(table, sums[0], atol=1e-6)
    for kind in ("relative", "2d", "layers"):  # a file of theirs is not of another kind
        message = "timm's names have no place for"
        refused(message, tmp_path / "timm.safetensors", **KINDS[kind])

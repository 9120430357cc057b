"""Architectures that config files name: known, refused, or said by the user."""

import json

import dialects
import pytest
from conftest import fails
from test_dialects import refused, run_folder

import vit_jax
from vit_jax.__main__ import main
from vit_jax.checkpoints.opened import open_model
from vit_jax.errors import UserError

EXAMPLES = dialects.examples()
TIMM, VIT = EXAMPLES["timm folder"], EXAMPLES["hf vit"]


def named(example, path, **changes):
    """The folder of an example whose config.json is changed; None takes a field out."""
    path = example.write(path)
    config = {**example.files["config.json"], **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_name_that_is_not_known_is_refused(tmp_path):
    tiny, parallel = "vit_my_tiny_patch16_384", "vit_base_patch16_24x2_224"
    for example, changes, said in [
        (TIMM, {"architecture": tiny}, "known name is 'vit_tiny_patch16_384'. If its"),
        (TIMM, {"architecture": parallel}, "known name is 'vit_base_patch16_"),
        (TIMM, {"architecture": "my_net"}, "no keys). If its code computes"),
        (TIMM, {"architecture": None, "model_type": "evil"}, "names the architecture 'evil'"),
        (VIT, {"architectures": ["ViTModell"]}, "known name is 'ViTModel'"),
        (VIT, {"architectures": None, "model_type": "yolos"}, "names the architecture 'yolos'"),
        (VIT, {"model_type": "dpt"}, "names the architecture 'dpt'"),
        (VIT, {"architectures": None, "model_type": None, "architecture": "x"}, "'x'"),
    ]:
        path = named(example, tmp_path / example.name, **changes)
        with pytest.raises(UserError, match="which is not known to compute") as error:
            open_model(path)
        assert said in str(error.value) and str(path) in str(error.value)
        # Said by the user, it is read as that one.
        known = "vit_base_patch16_224" if example is TIMM else "ViTModel"
        opened = open_model(path, architecture=known)
        assert opened.card.config == open_model(named(example, path)).card.config
        assert "architecture" not in opened.assumed


def test_a_name_of_other_keys_is_refused(tmp_path):
    """Rotary positions are not given to a plain ViT because of what its config.json says."""
    message = "has rotary positions, and its keys are those of a model without"
    for number, (example, changes) in enumerate(
        [
            (TIMM, {"architecture": "vit_pe_core_tiny_patch16_384"}),
            (TIMM, {"architecture": "vit_small_patch16_dinov3"}),
            (VIT, {"architectures": None, "model_type": "dinov3_vit"}),
        ]
    ):
        refused(message, named(example, tmp_path / str(number), **changes))


def test_the_user_must_name_one_that_is_known(tmp_path):
    path, base = TIMM.write(tmp_path / "timm"), "vit_base_patch16_224"
    for name in ("ViTModel", "vit_base_mci_224"):
        refused(f"architecture {name!r} is none of timm that is known", path, architecture=name)
    message = r"none of transformers that is known; such as 'ViTModel'"
    refused(message, VIT.write(tmp_path / "hf"), architecture=base)
    paper = EXAMPLES["google paper"].write(tmp_path / "google")
    message = r"no use for architecture=.*google's code alone decides"
    refused(message, paper, architecture=base)
    vit_jax.save(vit_jax.load(path), tmp_path / "ours.safetensors", format="timm")
    message = r"no use for architecture=.*its own card says"
    refused(message, tmp_path / "ours.safetensors", architecture=base)
    run, _ = run_folder(tmp_path / "run")
    refused("says itself what architecture is", run, architecture="ViTModel")


def test_what_no_key_shows_is_said_of_a_bare_file(tmp_path):
    bare = {"timm plain": True, "timm folder": False, "hf vit": False, "google paper": False}
    for name, said in bare.items():
        example = EXAMPLES[name]
        opened = open_model(example.write(tmp_path / name), **example.known)
        assert ("architecture" in opened.assumed) == said
    example = EXAMPLES["timm plain"]
    path = example.write(tmp_path / "named")
    opened = open_model(path, **example.known, architecture="vit_base_patch16_clip_quickgelu_224")
    config = opened.card.config
    assert (config.gelu, config.layernorm_eps) == ("quick", 1e-5)
    assert not {"architecture", "gelu", "layernorm_eps"} & set(opened.assumed)


def test_names_with_the_tag_of_weights_and_of_before(tmp_path):
    for name in ("vit_base_patch16_224.augreg_in21k_ft_in1k", "vit_base_patch16_224_in21k"):
        assert open_model(named(TIMM, tmp_path, architecture=name)).card.config


def test_arguments_that_no_key_shows(tmp_path):
    args = TIMM.files["config.json"].get("model_args", {})
    for name in ("norm_layer", "block_fn", "attn_layer", "rope_type"):
        path = named(TIMM, tmp_path, model_args={**args, name: "other"})
        refused(f"model_args {name}='other' may change", path)
    open_model(named(TIMM, tmp_path, model_args={**args, "norm_layer": None}))
    path = named(VIT, tmp_path / "hf", pooler_act="gelu")
    refused("pooler_act 'gelu'; expected 'tanh'", path)


def test_the_command_line_says_it_too(tmp_path, capsys):
    path = named(VIT, tmp_path, model_type="my_vit")
    assert "names the architecture 'my_vit'" in fails(capsys, "inspect", path)
    assert main(["inspect", str(path), "--set", "architecture=ViTModel"]) == 0

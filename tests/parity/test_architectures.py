"""Every architecture of timm by its name: computed as timm computes it, or refused.

Names whose models have the same modules, flags and names of weights are a group; one of each is
compared in numbers, at small sizes. The sizes of all are compared as numbers of the config.
"""

import collections
import dataclasses
import re

import pytest
import timm
from timm.models._hub import save_config_for_hf
from timm.models._registry import _deprecated_models, _model_to_module

from parity import (
    test_naflex,
    test_resnet,
    test_timm_eva,
    test_timm_other,
    test_timm_relative,
    test_transformers,
    timm_cases,
)
from parity.references import agree, interpreted, load, randomise, save, theirs, truth_of_timm
from vit_jax.checkpoints import architectures, sidecars
from vit_jax.errors import UserError

# What computes the same either way.
NEUTRAL = {"training", "fused_attn", "weight_init_mode", "fix_init", "strict_img_size", "flatten"}
NEUTRAL |= {"inplace", "grad_checkpointing", "dynamic_img_pad", "_is_full_backward_hook"}

# Modules of Vision Transformers, plain or not.
ALIKE = {"vision_transformer", "deit", "vision_transformer_hybrid", "resnetv2", "eva", "beit"}
ALIKE |= {"vision_transformer_relpos", "vision_transformer_sam", "naflexvit", "hiera", "cait"}
ALIKE |= {"xcit", "volo", "deepseek_vit", "qwen3_vit", "gemma4_vit", "convit", "pit"}


def created(name, **changes):
    """A model without numbers; two blocks tell as much as all."""
    whole = name.startswith("resnet") or "sapiens2" in name  # with other heads in each block
    changes = changes if whole else {"depth": 2, **changes}
    return timm.create_model(name, device="meta", **changes)


def signature(model):
    """All of a model but its sizes: modules, their flags, the scale of attention, what is named."""
    found = {(re.sub(r"\d+", "#", key), value.ndim) for key, value in model.named_parameters()}
    for path, module in model.named_modules():
        kept = {k: v for k, v in vars(module).items() if type(v) in (bool, str) or k == "eps"}
        flags = tuple(sorted((k, v) for k, v in kept.items() if k not in NEUTRAL))
        found.add((re.sub(r"\d+", "#", path), type(module).__qualname__, flags))
        if hasattr(module, "head_dim"):
            found.add(("scale", round(module.scale * module.head_dim**0.5, 6)))
    return frozenset(found)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """The known names by their `signature`; read right by config.json, and by the name alone."""
    folder, found, wrong = (
        tmp_path_factory.mktemp("architectures"),
        collections.defaultdict(list),
        {},
    )
    for name in sorted(architectures.TIMM):
        model = created(name)
        found[signature(model)].append(name)
        for config in (interpreted(model, folder), interpreted(model, architecture=name)):
            if name.startswith("resnet"):
                continue
            expected = truth_of_timm(model)
            told = {key: getattr(config, key) for key in expected}
            if told != expected:
                wrong[name] = [told, expected]
    assert not wrong, "\n".join(f"{name}: {why}" for name, why in wrong.items())
    return sorted(found.values())


def test_every_name_is_known_or_refused():
    refused = set(timm.list_models()) - architectures.TIMM
    for name in refused:
        assert architectures.current(name) not in architectures.TIMM
        if _model_to_module[name] not in ALIKE:
            continue
        with pytest.raises(UserError, match=f"architecture {name!r}, which is not known"):
            architectures.named("timm", {"architecture": name})
    for name in architectures.TIMM:
        assert architectures.named("timm", {"architecture": f"{name}.some_tag"}) == name
    known = collections.Counter(_model_to_module[name] for name in architectures.TIMM)
    assert known == {
        "vision_transformer": 163,
        "eva": 65,
        "vision_transformer_relpos": 14,
        "beit": 7,
        "deit": 16,
        "vision_transformer_hybrid": 9,
        "resnetv2": 6,
        "naflexvit": 13,
    }
    beside = collections.Counter(_model_to_module[name] for name in refused)
    assert {name: beside[name] for name in known} == {
        "vision_transformer": 0,
        "eva": 0,
        "vision_transformer_relpos": 0,
        "beit": 0,
        "deit": 0,
        "vision_transformer_hybrid": 5,
        "resnetv2": 14,
        "naflexvit": 1,
    }


def test_names_of_before():
    for old, new in _deprecated_models.items():
        expected = (new or "").split(".")[0]
        assert (architectures.current(old) in architectures.TIMM) == (
            expected in architectures.TIMM
        ), old
        if expected in architectures.TIMM:
            assert architectures.current(old) == expected


def test_one_of_each_group_computes_the_same(groups, tmp_path, record):
    """Those that no case of the other files is of: what a case changes there are sizes alone."""
    sizes = {"depth", "img_size", "embed_dim", "num_heads", "num_classes", "patch_size", "in_chans"}
    sizes |= {"num_kv_heads"}
    cases = (*timm_cases.CASES.values(), *test_resnet.CASES.values())
    modules = (test_timm_eva, test_timm_relative, test_timm_other)
    cases = (*cases, *(case for each in modules for case in each.CASES.values()))
    compared = {case.name for case in cases if set(case.changes) <= sizes}
    compared |= {architecture for _, architecture, _ in test_naflex.CASES.values()}
    for names in groups:
        if compared & set(names):
            continue
        name = names[0]
        patch = created(name).patch_embed.patch_size[0]
        sizes = dict(depth=2, embed_dim=128, num_heads=2, img_size=2 * patch)
        model = randomise(timm.create_model(name, **sizes))
        save_config_for_hf(model, tmp_path / "config.json")
        vit = load(save(model, tmp_path / "model.safetensors"))
        assert "architecture" not in vit.report.assumed
        worst = agree(vit, theirs(vit.config, model.blocks, model))
        alike = f", {len(names) - 1} more alike" if names[1:] else ""
        record(name + alike, f"timm {timm.__version__}", "folder", worst)


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("vit_base_resnet50d_224", {}, "'vit_base_resnet50d_224', which is not known"),
        ("vit_base_patch16_224", dict(global_pool="avgmax"), "global_pool 'avgmax'"),
        ("vit_base_patch16_224", dict(norm_layer="simplenorm"), "norm_layer='simplenorm' may"),
        (
            "vit_base_patch16_224",
            dict(global_pool="avg", pool_include_prefix=True),
            "pool_include_prefix=True may change",
        ),
    ],
)
def test_what_is_no_plain_vit_is_refused(name, changes, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        interpreted(created(name, **changes), tmp_path)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("vit_base_patch16_rope_224", "names of timm's eva.py"),
    ],
)
def test_keys_are_accounted_for_whatever_the_user_says(name, reason):
    with pytest.raises(UserError, match=reason):
        interpreted(created(name), architecture="vit_base_patch16_224")


def test_arguments_that_weights_show_are_arguments_of_timms():
    import inspect

    from timm.models.beit import Beit
    from timm.models.eva import Eva
    from timm.models.naflexvit import NaFlexVitCfg
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_relpos import VisionTransformerRelPos

    theirs = set(inspect.signature(VisionTransformer).parameters)
    assert theirs > architectures.TIMM_ARGS
    assert set(inspect.signature(Eva).parameters) > architectures.EVA_ARGS
    assert set(inspect.signature(Beit).parameters) > architectures.BEIT_ARGS
    assert set(inspect.signature(VisionTransformerRelPos).parameters) > architectures.RELPOS_ARGS
    beside = {"in_chans", "num_classes"}
    naflex = {field.name for field in dataclasses.fields(NaFlexVitCfg)} | beside
    assert naflex > architectures.NAFLEX_ARGS
    assert theirs - architectures.TIMM_ARGS == {
        *("pool_include_prefix", "dynamic_img_pad", "embed_layer", "embed_norm_layer"),
        *("norm_layer", "block_fn", "mlp_layer", "attn_layer", "device", "dtype"),
    }


def test_every_class_of_transformers_is_known_or_refused():
    """Known are the classes that are compared, no more and no less."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    compared = {case.kind.__name__ for case in test_transformers.CASES.values()}
    compared |= {"Siglip2Model", "Siglip2VisionModel"}  # test_naflex.py
    assert compared == {name for names in architectures.HF.values() for name in names}
    for kind, names in architectures.HF.items():
        for name in names:
            assert architectures.named("hf", {"architectures": [name], "model_type": kind}) == name
    refused = set(CONFIG_MAPPING_NAMES) - set(architectures.HF)
    for kind in refused:
        with pytest.raises(UserError, match=f"architecture {kind!r}, which is not known"):
            architectures.named("hf", {"model_type": kind})
    assert {"yolos", "dpt"} <= refused
    assert {"vit_hybrid", "vitpose_backbone", "pe_audio"} & set(CONFIG_MAPPING_NAMES) <= refused
    for name in (
        "BeitForMaskedImageModeling",
        "Dinov2Backbone",
        "SiglipForImageClassification",
        "ViTMSNForImageClassification",
    ):
        with pytest.raises(UserError, match=f"architecture {name!r}, which is not known"):
            architectures.named("hf", {"architectures": [name], "model_type": "vit"})


def test_a_bare_file_says_what_no_key_shows(tmp_path):
    """Where a norm stands has no key: what is assumed is said, and the numbers are others."""
    model = timm.create_model("vit_base_patch16_rpn_224", depth=1, img_size=32)
    vit = load(save(randomise(model), tmp_path / "weights.safetensors"))
    assert vit.report.assumed["architecture"].startswith("is not named")
    with pytest.raises(AssertionError, match=r"e-0[1-4]|e\+00"):
        agree(vit, theirs(vit.config, model.blocks, model))


def test_a_bare_file_of_the_perception_encoder_is_recognised(tmp_path):
    model = timm.create_model("vit_pe_core_small_patch16_384", depth=1, img_size=32)
    with pytest.raises(UserError, match=r"rotary positions no key shows: say which"):
        load(save(model, tmp_path / "weights.safetensors"))


def test_an_export_names_what_timm_calls_it(tmp_path):
    """Of the sizes that timm has, all but these are named; the same architectures once."""
    others = architectures.TIMM_EVA | architectures.TIMM_BEIT | architectures.TIMM_RELPOS
    plain = architectures.TIMM - others - architectures.TIMM_OTHER - architectures.TIMM_NAFLEX
    names = [name for name in plain if not name.startswith("resnet")]
    found = {}
    for name in names:
        config = interpreted(timm.create_model(name, device="meta", num_classes=5), tmp_path)
        found[name] = sidecars.timm_name(config)
    twins = {
        re.sub("deit_(.*_patch)", r"vit_\1", n): n for n in names if re.match("deit_[a-z]*_p", n)
    }
    twins = {old: new for new, old in twins.items()}
    twins |= {"vit_base_patch16_224_miil": "vit_base_patch16_224"}
    twins |= {f"eva_large_patch14_{n}": "vit_large_patch14_224" for n in (196, 336)}
    for end in ("", "_gap"):  # 384 pixels, of which 378 are 27 patches
        twins[f"vit_so400m_patch14_siglip{end}_384"] = f"vit_so400m_patch14_siglip{end}_378"
    none = {"test_vit", "test_vit2", "vit_base_patch16_gap_224", "vit_small_patch16_36x1_224"}
    none |= {n for n in names if "_plus_" in n}
    assert found == {n: None if n in none else twins.get(n, n) for n in names}

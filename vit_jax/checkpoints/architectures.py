"""Names of the timm and transformers architectures that our models are known to reproduce.

The keys of a file show every layer with weights. They may not show rotary positions, the scale of
attention, activations, where a norm is or what is pooled, so the architecture's name decides. Those
listed here are compared with the original code (tests/parity); any other is refused.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vit_jax.errors import UserError, nearest

# timm 1.0.31, without the tags of pretrained weights; first those of eva.py.
TIMM_EVA = frozenset(
    """
    eva02_base_patch14_224 eva02_base_patch14_448 eva02_base_patch16_clip_224
    eva02_large_patch14_224 eva02_large_patch14_448 eva02_large_patch14_clip_224
    eva02_large_patch14_clip_336 eva02_small_patch14_224 eva02_small_patch14_336
    eva02_tiny_patch14_224 eva02_tiny_patch14_336 eva_giant_patch14_224 eva_giant_patch14_336
    eva02_enormous_patch14_clip_224 vit_5b_patch16_sapiens2 vit_base_patch16_sapiens2
    vit_giant_patch16_sapiens2 vit_huge_patch16_sapiens2 vit_large_patch16_sapiens2
    eva_giant_patch14_560 eva_giant_patch14_clip_224 vit_7b_patch16_dinov3 vit_base_patch16_dinov3
    vit_base_patch16_dinov3_qkvb vit_base_patch16_lingbot vit_base_patch16_rope_224
    vit_base_patch16_rope_ape_224 vit_base_patch16_rope_mixed_224
    vit_base_patch16_rope_mixed_ape_224 vit_base_patch16_rope_reg1_gap_256
    vit_betwixt_patch16_rope_reg4_gap_256 vit_giant_patch16_lingbot vit_huge_plus_patch16_dinov3
    vit_huge_plus_patch16_dinov3_qkvb vit_large_patch16_dinov3 vit_large_patch16_dinov3_qkvb
    vit_large_patch16_lingbot vit_large_patch16_rope_224 vit_large_patch16_rope_ape_224
    vit_large_patch16_rope_mixed_224 vit_large_patch16_rope_mixed_ape_224
    vit_medium_patch16_rope_reg1_gap_256 vit_mediumd_patch16_rope_reg1_gap_256
    vit_pe_core_base_patch16_224 vit_pe_core_gigantic_patch14_448 vit_pe_core_large_patch14_336
    vit_pe_core_small_patch16_384 vit_pe_core_tiny_patch16_384 vit_pe_lang_gigantic_patch14_448
    vit_pe_lang_large_patch14_448 vit_pe_spatial_base_patch16_512
    vit_pe_spatial_gigantic_patch14_448 vit_pe_spatial_large_patch14_448
    vit_pe_spatial_small_patch16_512 vit_pe_spatial_tiny_patch16_512 vit_small_patch16_dinov3
    vit_small_patch16_dinov3_qkvb vit_small_patch16_lingbot vit_small_patch16_rope_224
    vit_small_patch16_rope_ape_224 vit_small_patch16_rope_mixed_224
    vit_small_patch16_rope_mixed_ape_224 vit_small_plus_patch16_dinov3
    vit_small_plus_patch16_dinov3_qkvb vit_tiny_patch16_dinov3_qkvb
    """.split()
)
TIMM_NAFLEX = frozenset(
    """
    naflexvit_base_patch16_gap naflexvit_base_patch16_map naflexvit_base_patch16_par_gap
    naflexvit_base_patch16_parfac_gap naflexvit_base_patch16_radio_v3
    naflexvit_base_patch16_siglip naflexvit_giant_patch16_radio_v3
    naflexvit_huge_patch16_radio_v3 naflexvit_huge_patch16_radio_v4
    naflexvit_large_patch16_radio_v3 naflexvit_so150m2_patch16_reg1_gap
    naflexvit_so400m_patch16_radio_v4 naflexvit_so400m_patch16_siglip
    """.split()
)
TIMM = (
    TIMM_EVA
    | TIMM_NAFLEX
    | frozenset(
        """
    deit3_base_patch16_224 deit3_base_patch16_384 deit3_huge_patch14_224 deit3_large_patch16_224
    deit3_large_patch16_384 deit3_medium_patch16_224 deit3_small_patch16_224
    deit3_small_patch16_384 deit_base_distilled_patch16_224 deit_base_distilled_patch16_384
    deit_base_patch16_224 deit_base_patch16_384 deit_small_distilled_patch16_224
    deit_small_patch16_224 deit_tiny_distilled_patch16_224 deit_tiny_patch16_224
    eva_large_patch14_196 eva_large_patch14_336 flexivit_base flexivit_large flexivit_small
    resnetv2_101x1_bit resnetv2_101x3_bit resnetv2_152x2_bit resnetv2_152x4_bit
    resnetv2_50x1_bit resnetv2_50x3_bit test_vit test_vit2 vit_base_patch14_dinov2
    vit_base_patch14_reg1_tipsv2 vit_base_patch14_reg4_dinov2 vit_base_patch16_224
    vit_base_patch16_224_miil vit_base_patch16_384 vit_base_patch16_clip_224
    vit_base_patch16_clip_384 vit_base_patch16_clip_quickgelu_224 vit_base_patch16_gap_224
    vit_base_patch16_plus_240 vit_base_patch16_plus_clip_240 vit_base_patch16_reg4_gap_256
    vit_base_patch16_siglip_224 vit_base_patch16_siglip_256 vit_base_patch16_siglip_384
    vit_base_patch16_siglip_512 vit_base_patch16_siglip_gap_224 vit_base_patch16_siglip_gap_256
    vit_base_patch16_siglip_gap_384 vit_base_patch16_siglip_gap_512 vit_base_patch32_224
    vit_base_patch32_384 vit_base_patch32_clip_224 vit_base_patch32_clip_256
    vit_base_patch32_clip_384 vit_base_patch32_clip_448 vit_base_patch32_clip_quickgelu_224
    vit_base_patch32_plus_256 vit_base_patch32_siglip_256 vit_base_patch32_siglip_gap_256
    vit_base_patch8_224 vit_base_r26_s32_224 vit_base_r50_s16_224 vit_base_r50_s16_384
    vit_betwixt_patch16_gap_256 vit_betwixt_patch16_reg1_gap_256
    vit_betwixt_patch16_reg4_gap_256 vit_betwixt_patch16_reg4_gap_384
    vit_betwixt_patch32_clip_224 vit_giant_patch14_224 vit_giant_patch14_clip_224
    vit_giant_patch14_dinov2 vit_giant_patch14_reg1_tipsv2 vit_giant_patch14_reg4_dinov2
    vit_giant_patch16_gap_224 vit_giantopt_patch16_siglip_256 vit_giantopt_patch16_siglip_384
    vit_giantopt_patch16_siglip_gap_256 vit_giantopt_patch16_siglip_gap_384
    vit_gigantic_patch14_224 vit_gigantic_patch14_clip_224 vit_gigantic_patch14_clip_378
    vit_gigantic_patch14_clip_quickgelu_224 vit_huge_patch14_224 vit_huge_patch14_clip_224
    vit_huge_patch14_clip_336 vit_huge_patch14_clip_378 vit_huge_patch14_clip_quickgelu_224
    vit_huge_patch14_clip_quickgelu_378 vit_huge_patch14_gap_224 vit_huge_patch16_gap_448
    vit_large_patch14_224 vit_large_patch14_clip_224 vit_large_patch14_clip_336
    vit_large_patch14_clip_quickgelu_224 vit_large_patch14_clip_quickgelu_336
    vit_large_patch14_dinov2 vit_large_patch14_reg1_tipsv2 vit_large_patch14_reg4_dinov2
    vit_large_patch16_224 vit_large_patch16_384 vit_large_patch16_siglip_256
    vit_large_patch16_siglip_384 vit_large_patch16_siglip_512 vit_large_patch16_siglip_gap_256
    vit_large_patch16_siglip_gap_384 vit_large_patch16_siglip_gap_512 vit_large_patch32_224
    vit_large_patch32_384 vit_large_r50_s32_224 vit_large_r50_s32_384
    vit_little_patch16_reg1_gap_256 vit_little_patch16_reg4_gap_256 vit_medium_patch16_clip_224
    vit_medium_patch16_gap_240 vit_medium_patch16_gap_256 vit_medium_patch16_gap_384
    vit_medium_patch16_reg1_gap_256 vit_medium_patch16_reg4_gap_256 vit_medium_patch32_clip_224
    vit_mediumd_patch16_reg4_gap_256 vit_mediumd_patch16_reg4_gap_384 vit_small_patch14_dinov2
    vit_small_patch14_reg4_dinov2 vit_small_patch16_224 vit_small_patch16_36x1_224
    vit_small_patch16_384 vit_small_patch32_224 vit_small_patch32_384 vit_small_patch8_224
    vit_small_r26_s32_224 vit_small_r26_s32_384 vit_so150m2_patch16_reg1_gap_256
    vit_so150m2_patch16_reg1_gap_384 vit_so150m2_patch16_reg1_gap_448
    vit_so150m_patch16_reg4_gap_256 vit_so150m_patch16_reg4_gap_384
    vit_so150m_patch16_reg4_map_256 vit_so400m_patch14_reg1_tipsv2 vit_so400m_patch14_siglip_224
    vit_so400m_patch14_siglip_378 vit_so400m_patch14_siglip_384
    vit_so400m_patch14_siglip_gap_224 vit_so400m_patch14_siglip_gap_378
    vit_so400m_patch14_siglip_gap_384 vit_so400m_patch14_siglip_gap_448
    vit_so400m_patch14_siglip_gap_896 vit_so400m_patch16_siglip_256
    vit_so400m_patch16_siglip_384 vit_so400m_patch16_siglip_512
    vit_so400m_patch16_siglip_gap_256 vit_so400m_patch16_siglip_gap_384
    vit_so400m_patch16_siglip_gap_512 vit_tiny_patch16_224 vit_tiny_patch16_384
    vit_tiny_r_s16_p8_224 vit_tiny_r_s16_p8_384 vit_wee_patch16_reg1_gap_256
    vit_xsmall_patch16_clip_224
    """.split()
    )
)
# Of beit.py and vision_transformer_relpos.py, and others with norms of their own.
TIMM_BEIT = frozenset(
    """
    beit_base_patch16_224 beit_base_patch16_384 beit_large_patch16_224 beit_large_patch16_384
    beit_large_patch16_512 beitv2_base_patch16_224 beitv2_large_patch16_224
    """.split()
)
TIMM_RELPOS = frozenset(
    """
    test_vit_relpos vit_relpos_base_patch16_224 vit_relpos_base_patch16_cls_224
    vit_relpos_base_patch16_clsgap_224 vit_relpos_base_patch16_plus_240
    vit_relpos_base_patch16_rpn_224 vit_relpos_base_patch32_plus_rpn_256
    vit_relpos_medium_patch16_224 vit_relpos_medium_patch16_cls_224
    vit_relpos_medium_patch16_rpn_224 vit_relpos_small_patch16_224 vit_relpos_small_patch16_rpn_224
    vit_srelpos_medium_patch16_224 vit_srelpos_small_patch16_224
    """.split()
)
TIMM |= TIMM_BEIT | TIMM_RELPOS
TIMM |= {
    *("beit3_base_patch16_224", "beit3_giant_patch14_224", "beit3_giant_patch14_336"),
    *("beit3_large_patch16_224", "vit_base_patch16_rpn_224"),
}
# Those of vision_transformer.py that are no plain ViTs: other norms, none at the end, no biases.
TIMM_OTHER = frozenset(
    """
    aimv2_1b_patch14_224 aimv2_1b_patch14_336 aimv2_1b_patch14_448 aimv2_3b_patch14_224
    aimv2_3b_patch14_336 aimv2_3b_patch14_448 aimv2_huge_patch14_224 aimv2_huge_patch14_336
    aimv2_huge_patch14_448 aimv2_large_patch14_224 aimv2_large_patch14_336 aimv2_large_patch14_448
    test_vit3 test_vit4 vit_base_patch16_18x2_224 vit_small_patch16_18x2_224
    vit_dlittle_patch16_reg1_gap_256 vit_dwee_patch16_reg1_gap_256
    vit_dpwee_patch16_reg1_gap_256 vit_pwee_patch16_reg1_gap_256 vit_base_patch16_xp_224
    vit_large_patch14_xp_224 vit_huge_patch14_xp_224
    vit_base_patch16_radio_v3 vit_base_patch16_rpn_224
    vit_giant_patch16_radio_v3 vit_huge_patch16_radio_v3 vit_huge_patch16_radio_v4
    vit_intern300m_patch14_448 vit_large_patch16_radio_v3 vit_so400m_patch16_radio_v4
    """.split()
)
TIMM |= TIMM_OTHER
# transformers 5.23: model_type -> classes.
HF = {
    "vit": ("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"),
    "deit": (
        *("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
        "DeiTForMaskedImageModeling",
    ),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    ),
    "vit_mae": ("ViTMAEModel", "ViTMAEForPreTraining"),
    "vit_msn": ("ViTMSNModel",),
    "ijepa": ("IJepaModel", "IJepaForImageClassification"),
    "dinov3_vit": ("DINOv3ViTModel",),
    "beit": ("BeitModel", "BeitForImageClassification"),
    "data2vec-vision": ("Data2VecVisionModel", "Data2VecVisionForImageClassification"),
    "sapiens2": ("Sapiens2Model",),
    "siglip": ("SiglipModel", "SiglipVisionModel"),
    "siglip_vision_model": ("SiglipVisionModel",),
    "aimv2_vision_model": ("Aimv2VisionModel",),
    "internvl_vision": ("InternVLVisionModel",),
    "siglip2": ("Siglip2Model", "Siglip2VisionModel"),
    "siglip2_vision_model": ("Siglip2VisionModel",),
    "clip": ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
}
# Arguments of timm's models that show in the weights, or do not change the function.
TIMM_ARGS = frozenset(
    """
    img_size patch_size in_chans num_classes embed_dim depth num_heads mlp_ratio qkv_bias qk_norm
    scale_attn_norm scale_mlp_norm proj_bias init_values class_token pos_embed no_embed_class
    reg_tokens pre_norm final_norm fc_norm global_pool act_layer dynamic_img_size drop_rate
    pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate weight_init fix_init
    """.split()
)
# The same of those of eva.py.
EVA_ARGS = frozenset(
    """
    img_size patch_size in_chans num_classes embed_dim depth num_heads mlp_ratio qkv_bias qkv_fused
    swiglu_mlp swiglu_align_to scale_mlp scale_attn_inner init_values class_token num_reg_tokens
    no_embed_class use_abs_pos_emb use_fc_norm global_pool dynamic_img_size drop_rate pos_drop_rate
    patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate head_init_scale attn_pool_mlp_ratio
    use_pre_transformer_norm qk_norm attn_only_layer_scale num_kv_heads
    """.split()
)
BEIT_ARGS = frozenset(
    """
    img_size patch_size in_chans num_classes global_pool embed_dim depth num_heads qkv_bias
    mlp_ratio swiglu_mlp scale_mlp drop_rate pos_drop_rate proj_drop_rate attn_drop_rate
    drop_path_rate init_values use_abs_pos_emb use_rel_pos_bias use_shared_rel_pos_bias
    head_init_scale use_fc_norm
    """.split()
)
RELPOS_ARGS = frozenset(
    """
    img_size patch_size in_chans num_classes global_pool embed_dim depth num_heads mlp_ratio
    qkv_bias qk_norm init_values class_token fc_norm rel_pos_type rel_pos_dim shared_rel_pos
    drop_rate proj_drop_rate attn_drop_rate drop_path_rate weight_init fix_init act_layer
    """.split()
)
# The same of those of naflexvit.py.
NAFLEX_ARGS = frozenset(
    """
    patch_size in_chans num_classes embed_dim depth num_heads mlp_ratio qkv_bias init_values
    class_token reg_tokens pos_embed pos_embed_grid_size pos_embed_interp_mode pos_embed_antialias
    pos_embed_align_corners pos_embed_ar_preserving pre_norm final_norm fc_norm global_pool
    act_layer drop_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate
    weight_init fix_init use_key_only_attn_mask
    """.split()
)
UNNAMED = (
    "is not named, and no key shows it: no rotary positions, softmax attention scaled by "
    "head_dim^-0.5, each norm before its branch, and only the patches averaged where any are"
)
UNNAMED_DINOV3 = "is not named: rotary positions and their base are DINOv3's"


def current(name: str) -> str:
    """A timm model name without the tag of its weights, in the spelling since timm 0.9."""
    name = name.split(".")[0]
    name = re.sub(r"_(224|384)_clip_laion2b$", r"_clip_\1", name)
    name = re.sub(r"_(in21k|in21ft1k|dino|sam)$", "", name)
    name = re.sub(r"_bitm$", "_bit", name)
    name = re.sub(r"_bit_(distilled|teacher|teacher_384)$", "_bit", name)
    return re.sub(r"_resnet50_(224|384)$", r"_r50_s16_\1", name)


def arguments(name: str) -> frozenset[str]:
    """The arguments of a timm architecture that may be given in a config.json."""
    kinds = {TIMM_EVA: EVA_ARGS, TIMM_BEIT: BEIT_ARGS, TIMM_RELPOS: RELPOS_ARGS}
    kinds[TIMM_NAFLEX] = NAFLEX_ARGS
    return next((args for names, args in kinds.items() if name in names), TIMM_ARGS)


def named(dialect: str, config: Mapping[str, Any], given: str | None = None) -> str | None:
    """Returns the architecture name of timm or Hugging Face weights, None if there is none.

    Args:
      dialect: "timm" or "hf".
      config: the contents of config.json.
      given: the name that the user gave, which takes precedence.

    Raises:
      UserError: the architecture is not a known one.
    """
    timm, hf = config.get("architecture"), _of_hugging_face(config)
    if given is not None:
        names = [given]
    elif dialect == "timm":
        names = hf[:1] if timm is None else [timm]
    else:
        names = hf or ([] if timm is None else [timm])
    known = TIMM if dialect == "timm" else {*HF, *(name for each in HF.values() for name in each)}
    for name in names:
        if not isinstance(name, str):
            if given is not None:
                raise UserError(f"architecture is {name!r}; expected a name")
            raise UserError(f"config.json is damaged: {name!r} is no name of an architecture")
        if (current(name) if dialect == "timm" else name) not in known:
            raise UserError(_unknown(name, dialect, known, given is not None))
    return next((current(name) if dialect == "timm" else name for name in names), None)


def _of_hugging_face(config: Mapping[str, Any]) -> list[Any]:
    """Architecture names in a config.json of transformers: the class first, then model types."""
    found = config.get("architectures") or []
    if not isinstance(found, (list, tuple)):
        return [found]
    inner = config.get("vision_config")
    kinds = [part.get("model_type") for part in (config, inner) if isinstance(part, Mapping)]
    return [*found[:1], *(kind for kind in kinds if kind is not None)]


def _unknown(name: str, dialect: str, known: Iterable[str], given: bool) -> str:
    near = nearest(name, known)
    near = f"the nearest known name is {near.split(chr(39))[1]!r}" if near.endswith("?") else ""
    if given:
        whose, usual = {
            "timm": ("timm", "vit_base_patch16_224"),
            "hf": ("transformers", "ViTModel"),
        }[dialect]
        near = near or f"such as {usual!r}"
        return f"architecture {name!r} is none of {whose} that is known; {near}"
    return (
        f"config.json names the architecture {name!r}, which is not known to compute what its keys "
        "look like (rotary positions, activations and more have no keys)"
        + (f"; {near}" if near else "")
        + ". If its code computes what that of a known one does, say which: "
        'architecture="NAME", or --set architecture=NAME'
    )

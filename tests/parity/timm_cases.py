"""Families of Vision Transformers as timm builds them, narrowed, with random weights."""

import dataclasses
import functools

import timm

from parity.references import randomise


@dataclasses.dataclass(frozen=True)
class Case:
    """A family; `known` is what its file alone does not say, `writes` the formats that hold it."""

    family: str
    name: str
    changes: dict
    known: dict = dataclasses.field(default_factory=dict)
    writes: tuple = ("timm",)

    def build(self, seed=0, **changes):
        options = SIZE[self.patch] | self.changes | changes
        return randomise(timm.create_model(self.name, **options))

    @property
    def patch(self):
        return next((p for p in SIZE if f"patch{p}" in self.name), 16)

    @property
    def reference(self):
        return f"timm {timm.__version__} {self.name}"


SIZE = {p: dict(depth=2, img_size=4 * p) for p in (14, 16)} | {32: dict(depth=2, img_size=96)}
ALL = ("google", "big_vision", "timm", "hf")
CASES = {
    "plain": Case("ViT, AugReg", "vit_tiny_patch16_224", dict(num_classes=7), writes=ALL),
    "grey": Case(
        "ViT, one channel, 21 classes",
        "vit_small_patch32_224",
        dict(in_chans=1, num_classes=21, embed_dim=64, num_heads=2, depth=3),
        dict(num_heads=2),
        writes=ALL,
    ),
    "oblong": Case(
        "ViT, 64x32 pixels",
        "vit_tiny_patch16_224",
        dict(img_size=(64, 32), num_classes=7),
        dict(image_size=(64, 32), position_prefix=1),  # 9 rows make a square, too
        writes=ALL,
    ),
    "none": Case(
        "ViT without positions",
        "vit_tiny_patch16_224",
        dict(pos_embed="none", num_classes=7),
        dict(image_size=(64, 64)),
    ),
    "miil": Case(
        "MIIL, no QKV bias",
        "vit_base_patch16_224_miil",
        dict(embed_dim=64, num_heads=2, num_classes=7),
        dict(num_heads=2),
        writes=("timm", "hf"),
    ),
    "dino": Case("DINO, no head", "vit_small_patch16_224", dict(num_classes=0), writes=ALL),
    "mae": Case(
        "MAE, class token",
        "vit_base_patch16_224",
        dict(embed_dim=64, num_heads=4, num_classes=7),
        dict(num_heads=4),
        writes=ALL,
    ),
    "mae_gap": Case(
        "MAE, mean then LayerNorm",
        "vit_base_patch16_224",
        dict(embed_dim=64, num_heads=4, global_pool="avg", num_classes=7),
        dict(num_heads=4),
    ),
    "eva": Case(
        "EVA, mean then LayerNorm",
        "eva_large_patch14_196",
        dict(embed_dim=64, num_heads=2, num_classes=7),
        dict(num_heads=2),
    ),
    "gap": Case(
        "ViT GAP, no class token",
        "vit_base_patch16_gap_224",
        dict(embed_dim=64, num_heads=4, num_classes=7),
        dict(num_heads=4),
        writes=("google", "big_vision", "timm"),
    ),
    "medium": Case(
        "ViT GAP, LayerScale, no QKV bias",
        "vit_medium_patch16_gap_240",
        dict(embed_dim=128, num_heads=2, num_classes=7),
    ),
    "reg4": Case(
        "ViT GAP, 4 registers",
        "vit_medium_patch16_reg4_gap_256",
        dict(embed_dim=128, num_heads=2, num_classes=7),
    ),
    "flexivit": Case(
        "FlexiViT",
        "flexivit_small",
        dict(num_classes=7, patch_size=16, img_size=64),
        writes=ALL,
    ),
    "siglip": Case(
        "SigLIP",
        "vit_base_patch16_siglip_224",
        dict(embed_dim=64, num_heads=4),
        dict(num_heads=4),
        writes=("big_vision", "timm", "hf"),
    ),
    "siglip_head": Case(
        "SigLIP with a head",
        "vit_base_patch16_siglip_224",
        dict(embed_dim=64, num_heads=4, num_classes=7),
        dict(num_heads=4),
        writes=("big_vision", "timm"),
    ),
    "siglip2": Case(
        "SigLIP 2, tanh GELU",
        "vit_base_patch32_siglip_256",
        dict(embed_dim=64, num_heads=4),
        dict(num_heads=4, gelu="tanh"),
        writes=("big_vision", "timm", "hf"),
    ),
    "siglip_gap": Case(
        "SigLIP GAP",
        "vit_base_patch16_siglip_gap_224",
        dict(embed_dim=64, num_heads=4),
        dict(num_heads=4),
        writes=("google", "big_vision", "timm"),
    ),
    "map_reg4": Case(
        "attention pooling beside registers",
        "vit_so150m_patch16_reg4_map_256",
        dict(embed_dim=128, num_heads=2, num_classes=7),
    ),
    "deit": Case("DeiT", "deit_tiny_patch16_224", dict(num_classes=7), writes=ALL),
    "distilled": Case(
        "DeiT, distilled",
        "deit_tiny_distilled_patch16_224",
        dict(num_classes=7),
        writes=("timm", "hf"),
    ),
    "deit3": Case("DeiT III", "deit3_small_patch16_224", dict(num_classes=7)),
    "dinov2": Case("DINOv2", "vit_small_patch14_dinov2", {}, writes=("timm", "hf")),
    "dinov2_head": Case(
        "DINOv2, class token's head", "vit_small_patch14_dinov2", dict(num_classes=7)
    ),
    "dinov2_reg4": Case(
        "DINOv2, 4 registers", "vit_small_patch14_reg4_dinov2", {}, writes=("timm", "hf")
    ),
    "swiglu": Case(
        "DINOv2, giant (SwiGLU)",
        "vit_giant_patch14_dinov2",
        dict(embed_dim=48, num_heads=3),
        dict(num_heads=3),
        writes=("timm", "hf"),
    ),
    "clip": Case(
        "CLIP, exact GELU",
        "vit_base_patch16_clip_224",
        dict(embed_dim=128, num_heads=2, num_classes=7),
    ),
    "clip_quick": Case(
        "CLIP, quick GELU",
        "vit_base_patch16_clip_quickgelu_224",
        dict(embed_dim=128, num_heads=2, num_classes=0),
        dict(gelu="quick"),
        writes=("timm", "hf"),
    ),
}


def built(cases):
    """A function of a case's name: its model, built once."""
    return functools.cache(lambda name: cases[name].build())


model_of = built(CASES)

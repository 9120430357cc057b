"""Weight name tables: how other code bases name our parameters, as rows (see rows.py)."""

import dataclasses
from collections.abc import Iterable, Sequence

from vit_jax.checkpoints.rows import Dialect, Row, torch_attention
from vit_jax.checkpoints.rows import conv_rows as _conv
from vit_jax.checkpoints.rows import layer_rows as _each
from vit_jax.checkpoints.rows import linear_rows as _linear
from vit_jax.checkpoints.rows import norm_rows as _norm
from vit_jax.checkpoints.tables_eva import HF_DINOV3, TIMM_EVA, TIMM_POOL, gated_rows
from vit_jax.checkpoints.tables_hf import HF_AIMV2, HF_INTERNVL, HF_SAPIENS2
from vit_jax.checkpoints.tables_parallel import beside, parallel
from vit_jax.checkpoints.tables_relative import HF_BEIT, INDEX, TIMM_RELPOS_BIAS
from vit_jax.models import differential

_FLAX = {"kernel": "/kernel", "bias": "/bias"}


def _dense(ours: str, theirs: str) -> list[Row]:
    return _each(ours, theirs, _FLAX, {"kernel": "i o -> i o", "bias": "o -> o"})


def _flax_attention(ours: str, theirs: str) -> list[Row]:
    """Linen's MultiHeadDotProductAttention."""
    names = [f"{theirs}/{name}" for name in ("query", "key", "value")]
    return [
        Row(f"{ours}/qkv/kernel", tuple(f"{n}/kernel" for n in names), "t d h k -> d t h k"),
        Row(f"{ours}/qkv/bias", tuple(f"{n}/bias" for n in names), "t h k -> t h k"),
        Row(f"{ours}/out/kernel", (f"{theirs}/out/kernel",), "h k d -> h k d"),
        Row(f"{ours}/out/bias", (f"{theirs}/out/bias",), "d -> d"),
    ]


def _flax_norm(ours: str, theirs: str) -> list[Row]:
    return _norm(ours, theirs, "/scale", "/bias")


def _flax_block(block: str, attention: int, norm2: int, mlp: int) -> list[Row]:
    return [
        *_flax_norm("blocks/norm1", f"{block}/LayerNorm_0"),
        *_flax_attention("blocks/attention", f"{block}/MultiHeadDotProductAttention_{attention}"),
        *_flax_norm("blocks/norm2", f"{block}/LayerNorm_{norm2}"),
        *_dense("blocks/mlp/fc1", f"{block}/MlpBlock_{mlp}/Dense_0"),
        *_dense("blocks/mlp/fc2", f"{block}/MlpBlock_{mlp}/Dense_1"),
    ]


@dataclasses.dataclass(frozen=True)
class _ResNet:
    """The names of a ResNet's root and units, in stages numbered 1, 2, ... or 0, 1, ...

    `stage` is the name up to a unit's number; `norms` and `convs` are the names inside a unit, the
    last of each in the shortcut.
    """

    root: str
    norm_root: str | None
    stage: str
    convs: tuple[str, str, str, str]
    norms: tuple[str, str, str, str]
    norm: str | None = None
    sep: str = "/"
    leaves: tuple[str, str] = ("scale", "bias")
    layout: str = "p q i o -> p q i o"
    norm_layout: str = "d -> d"
    first: int = 1
    digits: int = 1

    def rows(self, prefix: str = "") -> list[Row]:
        rows = [Row("resnet/conv_root/kernel", (prefix + self.root,), self.layout)]
        for ours, theirs in (("norm_root", self.norm_root), ("norm", self.norm)):
            rows += self._norm(f"resnet/{ours}", prefix + theirs) if theirs else []
        for stage in range(4):
            ours = f"resnet/stage{stage + 1}"
            theirs = prefix + self.stage.replace("{}", str(stage + self.first))
            first = f"{theirs}{self.first:0{self.digits}}{self.sep}"
            rows += self._unit(f"{ours}/first", first, 4)
            rest = self._unit(f"{ours}/rest", f"{theirs}{{}}{self.sep}", 3)
            counted = dict(first=self.first + 1, digits=self.digits)
            rows += [dataclasses.replace(row, **counted) for row in rest]
        return rows

    def _unit(self, ours: str, theirs: str, parts: int) -> list[Row]:
        names, rows = ("1", "2", "3", "_proj"), []
        for name, conv, norm in list(zip(names, self.convs, self.norms, strict=True))[:parts]:
            rows.append(Row(f"{ours}/conv{name}/kernel", (theirs + conv,), self.layout))
            rows += self._norm(f"{ours}/norm{name}", theirs + norm)
        return rows

    def _norm(self, ours: str, theirs: str) -> list[Row]:
        rows = _norm(ours, theirs, *(self.sep + leaf for leaf in self.leaves))
        changes = dict(layout=self.norm_layout, any_rank=True)
        return [dataclasses.replace(row, **changes) for row in rows]


_CONVS = ("conv1/kernel", "conv2/kernel", "conv3/kernel", "conv_proj/kernel")
_GROUP_NORMS = ("gn1", "gn2", "gn3", "gn_proj")
_STANDARDIZED = "standardized_conv2d/kernel"
# google-research/vision_transformer: models_resnet.py; google-research/big_vision: models/bit.py
_RESNET = _ResNet("conv_root/kernel", "gn_root", "block{}/unit", _CONVS, _GROUP_NORMS)
# google-research/big_transfer: bit_jax/models.py, which reads the files of its TensorFlow
_RESNET_BIT = _ResNet(
    f"root_block/{_STANDARDIZED}",
    None,
    "block{}/unit",
    tuple(f"{part}/{_STANDARDIZED}" for part in ("a", "b", "c", "a/proj")),
    ("a/group_norm", "b/group_norm", "c/group_norm", "a/proj/group_norm"),
    "group_norm",
    leaves=("gamma", "beta"),
    digits=2,
)
# google-research/big_vision: models/bit_paper.py
_RESNET_PAPER = dataclasses.replace(
    _RESNET,
    root="root_block/conv_root/kernel",
    norm_root=None,
    norm="norm-pre-head",
    norm_layout="1 1 1 d -> d",
    digits=2,
)
# huggingface/pytorch-image-models: timm/models/resnetv2.py
_RESNET_TIMM = _ResNet(
    "stem.conv.weight",
    "stem.norm",
    "stages.{}.blocks.",
    ("conv1.weight", "conv2.weight", "conv3.weight", "downsample.conv.weight"),
    ("norm1", "norm2", "norm3", "downsample.norm"),
    "norm",
    sep=".",
    leaves=("weight", "bias"),
    layout="o i p q -> p q i o",
    first=0,
)


_FLAX_ENDS = (
    Row("patch_embed/kernel", ("embedding/kernel",), "p q c d -> p q c d"),
    Row("patch_embed/bias", ("embedding/bias",), "d -> d"),
    Row("cls_token", ("cls",), "1 1 d -> 1 1 d"),
    *_flax_norm("norm", "Transformer/encoder_norm"),
    *_dense("pre_logits", "pre_logits"),
    *_dense("head", "head"),
)
# Before Linen, layers of a block are numbered together; in Linen, each type separately.
_PRE_LINEN, _LINEN = (1, 2, 3), (0, 1, 0)

# google-research/vision_transformer: vit_jax/models_vit.py, checkpoint.py
GOOGLE = Dialect(
    "google",
    (
        "Transformer/posembed_input/pos_embedding",
        "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel",
    ),
    (
        *_RESNET.rows(),
        *_FLAX_ENDS,
        Row("pos_embed", ("Transformer/posembed_input/pos_embedding",), "1 n d -> n d"),
        *_flax_block("Transformer/encoderblock_{}", *_PRE_LINEN),
        *_flax_block("Transformer/encoderblock_{}", *_LINEN),
    ),
    leftover=(r"opt/state/",),
    prefixes=("", "opt/target/", "params/", "target/"),
)

# google-research/big_vision: big_vision/models/vit.py
BIG_VISION = Dialect(
    "big_vision",
    ("Transformer/encoder_norm/scale",),
    (
        *_FLAX_ENDS,
        Row("pos_embed", ("pos_embedding",), "1 n d -> n d"),
        *_flax_block("Transformer/encoderblock_{}", *_LINEN),
        *_flax_block("Transformer/encoderblock", *_LINEN),
        Row("attention_pool/probe", ("MAPHead_0/probe",), "1 1 d -> 1 1 d"),
        *_flax_attention("attention_pool/attention", "MAPHead_0/MultiHeadDotProductAttention_0"),
        *_flax_norm("attention_pool/norm", "MAPHead_0/LayerNorm_0"),
        *_dense("attention_pool/mlp/fc1", "MAPHead_0/MlpBlock_0/Dense_0"),
        *_dense("attention_pool/mlp/fc2", "MAPHead_0/MlpBlock_0/Dense_1"),
    ),
    leftover=(r"opt/", r"params/txt/", r"txt/", r"(params/)?(t|b)$"),
    prefixes=("params/", "params/img/", "", "img/", "opt/target/"),
)

_DISTILLED = {"distillation": "head"}

# huggingface/pytorch-image-models: timm/models/vision_transformer.py, deit.py, and
# vision_transformer_relpos.py
TIMM = Dialect(
    "timm",
    ("patch_embed.proj.weight",),
    (
        # A root without stages has no prefix.
        *(
            dataclasses.replace(row, says={"resnet": ()})
            for row in dataclasses.replace(
                _RESNET_TIMM, root="conv.weight", norm_root="norm", norm=None
            ).rows("patch_embed.backbone.")[:3]
        ),
        *_RESNET_TIMM.rows("patch_embed.backbone."),
        *_conv("patch_embed.proj"),
        *_norm("patch_embed/norm", "patch_embed.norm"),
        Row("cls_token", ("cls_token",), "1 1 d -> 1 1 d"),
        Row("dist_token", ("dist_token",), "1 1 d -> 1 1 d"),
        Row("registers", ("reg_token",), "1 r d -> 1 r d"),
        Row("pos_embed", ("pos_embed",), "1 n d -> n d"),
        *_norm("pre_norm", "norm_pre"),
        *_norm("blocks/norm1", "blocks.{}.norm1"),
        *torch_attention("blocks/attention", ["blocks.{}.attn.qkv."], "blocks.{}.attn.proj"),
        *_norm("blocks/attention/norm", "blocks.{}.attn.norm"),
        *TIMM_RELPOS_BIAS,
        *(
            Row(f"blocks/attention/{name}", (f"blocks.{{}}.attn.{name}",), "k -> k")
            for name in differential.NAMES
        ),
        *_norm("blocks/attention/head_norm", "blocks.{}.attn.sub_norm"),
        *_norm("blocks/attention/q_norm", "blocks.{}.attn.q_norm"),
        *_norm("blocks/attention/k_norm", "blocks.{}.attn.k_norm"),
        Row("blocks/scale1", ("blocks.{}.ls1.gamma",), "d -> d"),
        *_norm("blocks/norm2", "blocks.{}.norm2"),
        *(
            dataclasses.replace(row, only={"patch_norm": False})
            for row in _linear("blocks/mlp/fc1", "blocks.{}.mlp.fc1")
        ),
        *(  # AIMv2's gate has a kernel of its own, DINOv2's giant has one for both
            dataclasses.replace(row, says={"mlp": "swiglu"}, only={"patch_norm": True})
            for row in gated_rows(("blocks.{}.mlp.fc1_g", "blocks.{}.mlp.fc1_x"))
        ),
        *_norm("blocks/mlp/norm", "blocks.{}.mlp.norm"),
        *_linear("blocks/mlp/fc2", "blocks.{}.mlp.fc2"),
        Row("blocks/scale2", ("blocks.{}.ls2.gamma",), "d -> d"),
        *(dataclasses.replace(r, says={"norm_after_pool": False}) for r in _norm("norm", "norm")),
        *(dataclasses.replace(r, says={"norm_after_pool": True}) for r in _norm("norm", "fc_norm")),
        *TIMM_POOL,
        *_linear("head", "head"),
        *_linear("head_dist", "head_dist"),
    ),
    leftover=(r"mask_token$", r"decoder_", INDEX),
    resnet_style="timm_v1",
)
TIMM_PARALLEL = parallel(TIMM)
TIMM_BESIDE = beside(TIMM)


def _hf_names(base: str, names: Sequence[str]) -> list[str]:
    return [f"{base}.{name}." for name in names]


def _hf_attention(layer: str) -> list[Row]:
    """Attention under the names published on the hub, and under those of transformers 5."""
    old = _hf_names(f"{layer}.attention.attention", ("query", "key", "value"))
    new = _hf_names(f"{layer}.attention", ("q_proj", "k_proj", "v_proj"))
    return [
        *torch_attention("blocks/attention", old, f"{layer}.attention.output.dense"),
        *torch_attention("blocks/attention", new, f"{layer}.attention.o_proj"),
    ]


_HF_STEM = (
    *_conv("embeddings.patch_embeddings.projection"),
    Row("cls_token", ("embeddings.cls_token",), "1 1 d -> 1 1 d"),
    Row("pos_embed", ("embeddings.position_embeddings",), "1 n d -> n d"),
)
_HF_OLD, _HF_NEW = "encoder.layer.{}", "layers.{}"

# huggingface/transformers: models/vit, deit, vit_mae
HF_VIT = Dialect(
    "hf",
    ("embeddings.patch_embeddings.projection.weight",),
    (
        *_HF_STEM,
        Row("dist_token", ("embeddings.distillation_token",), "1 1 d -> 1 1 d"),
        *_hf_attention(_HF_OLD),
        *_hf_attention(_HF_NEW),
        *(
            row
            for layer in (_HF_OLD, _HF_NEW)
            for row in _norm("blocks/norm1", f"{layer}.layernorm_before")
        ),
        *(
            row
            for layer in (_HF_OLD, _HF_NEW)
            for row in _norm("blocks/norm2", f"{layer}.layernorm_after")
        ),
        *_linear("blocks/mlp/fc1", f"{_HF_OLD}.intermediate.dense"),
        *_linear("blocks/mlp/fc2", f"{_HF_OLD}.output.dense"),
        *_linear("blocks/mlp/fc1", f"{_HF_NEW}.mlp.fc1"),
        *_linear("blocks/mlp/fc2", f"{_HF_NEW}.mlp.fc2"),
        *_norm("norm", "layernorm"),
        *_linear("pre_logits", "pooler.dense"),
        *(dataclasses.replace(r, says=_DISTILLED) for r in _linear("head", "/cls_classifier")),
        *_linear("head", "/classifier"),
        *_linear("head_dist", "/distillation_classifier"),
    ),
    leftover=(r"decoder\.", r"(\w+\.)?embeddings\.mask_token$"),
    prefixes=("", "vit.", "deit.", "ijepa."),
)

# huggingface/transformers: models/dinov2, dinov2_with_registers
HF_DINOV2 = Dialect(
    "hf",
    ("encoder.layer.0.layer_scale1.lambda1",),
    (
        *_HF_STEM,
        Row("registers", ("embeddings.register_tokens",), "1 r d -> 1 r d"),
        *_norm("blocks/norm1", f"{_HF_OLD}.norm1"),
        *_hf_attention(_HF_OLD),
        Row("blocks/scale1", (f"{_HF_OLD}.layer_scale1.lambda1",), "d -> d"),
        *_norm("blocks/norm2", f"{_HF_OLD}.norm2"),
        *(
            dataclasses.replace(row, says={"mlp": "gelu"})
            for fc in ("fc1", "fc2")
            for row in _linear(f"blocks/mlp/{fc}", f"{_HF_OLD}.mlp.{fc}")
        ),
        *(
            dataclasses.replace(row, says={"mlp": "swiglu"})
            for row in (
                *_linear("blocks/mlp/fc1", f"{_HF_OLD}.mlp.weights_in"),
                *_linear("blocks/mlp/fc2", f"{_HF_OLD}.mlp.weights_out"),
                Row(
                    "blocks/mlp/fc1/kernel",
                    (f"{_HF_OLD}.mlp.gate_proj.weight", f"{_HF_OLD}.mlp.up_proj.weight"),
                    "o i -> i o",
                ),
                Row(
                    "blocks/mlp/fc1/bias",
                    (f"{_HF_OLD}.mlp.gate_proj.bias", f"{_HF_OLD}.mlp.up_proj.bias"),
                    "o -> o",
                ),
                *_linear("blocks/mlp/fc2", f"{_HF_OLD}.mlp.down_proj"),
            )
        ),
        Row("blocks/scale2", (f"{_HF_OLD}.layer_scale2.lambda1",), "d -> d"),
        *_norm("norm", "layernorm"),
        *_linear("head", "/classifier"),
    ),
    leftover=(r"(\w+\.)?embeddings\.mask_token$",),
    prefixes=("", "dinov2.", "dinov2_with_registers."),
)

_SIGLIP = "encoder.layers.{}"

# huggingface/transformers: models/siglip, clip (the vision towers)
HF_SIGLIP = Dialect(
    "hf",
    ("embeddings.patch_embedding.weight",),
    (
        *_conv("embeddings.patch_embedding"),
        Row("cls_token", ("embeddings.class_embedding",), "d -> 1 1 d"),
        Row("pos_embed", ("embeddings.position_embedding.weight",), "n d -> n d"),
        *_norm("pre_norm", "pre_layrnorm"),
        *_norm("blocks/norm1", f"{_SIGLIP}.layer_norm1"),
        *torch_attention(
            "blocks/attention",
            _hf_names(f"{_SIGLIP}.self_attn", ("q_proj", "k_proj", "v_proj")),
            f"{_SIGLIP}.self_attn.out_proj",
        ),
        *_norm("blocks/norm2", f"{_SIGLIP}.layer_norm2"),
        *_linear("blocks/mlp/fc1", f"{_SIGLIP}.mlp.fc1"),
        *_linear("blocks/mlp/fc2", f"{_SIGLIP}.mlp.fc2"),
        *_norm("norm", "post_layernorm"),
        Row("attention_pool/probe", ("head.probe",), "1 1 d -> 1 1 d"),
        *torch_attention(
            "attention_pool/attention", ["head.attention.in_proj_"], "head.attention.out_proj"
        ),
        *_norm("attention_pool/norm", "head.layernorm"),
        *_linear("attention_pool/mlp/fc1", "head.mlp.fc1"),
        *_linear("attention_pool/mlp/fc2", "head.mlp.fc2"),
    ),
    leftover=(
        r"(vision_model\.)?embeddings\.position_ids$",
        r"text_model\.",
        r"logit_(scale|bias)$",
        r"(visual|text)_projection\.",
    ),
    prefixes=("", "vision_model."),
)

# The Flax versions of the same in transformers 4: modeling_flax_vit.py, _dinov2.py, _clip.py
FLAX_VIT = HF_VIT.in_flax()
FLAX_DINOV2 = HF_DINOV2.in_flax()
FLAX_CLIP = HF_SIGLIP.in_flax()

# ResNet classifiers; sources as above.
RESNET_V1 = Dialect(
    "big_vision",
    ("conv_root/kernel",),
    (*_RESNET.rows(), *_dense("head", "head")),
    leftover=(r"opt/",),
    prefixes=("params/", "", "opt/target/", "target/"),
    family="resnet",
)
RESNET_PAPER = Dialect(
    "big_vision",
    ("root_block/conv_root/kernel",),
    (*_RESNET_PAPER.rows(), *_dense("head", "head")),
    leftover=(r"opt/",),
    prefixes=("params/", ""),
    family="resnet",
    resnet_style="v2",
)
RESNET_BIT = Dialect(
    "google",
    (f"root_block/{_STANDARDIZED}",),
    (
        *_RESNET_BIT.rows(),
        Row("head/kernel", ("head/conv2d/kernel",), "1 1 i o -> i o"),
        Row("head/bias", ("head/conv2d/bias",), "o -> o"),
    ),
    prefixes=("resnet/",),
    family="resnet",
    resnet_style="v2",
    aliases=(r"/standardized_conv2d_\d+/", "/standardized_conv2d/"),
)
RESNET_TIMM = Dialect(
    "timm",
    ("stages.0.blocks.0.downsample.conv.weight",),
    (
        *_RESNET_TIMM.rows(),
        Row("head/kernel", ("head.fc.weight",), "o i 1 1 -> i o"),
        Row("head/bias", ("head.fc.bias",), "o -> o"),
    ),
    family="resnet",
    resnet_style="timm_v2",
)

# In the order of detection: DINOv2's and BEiT's files have HF_VIT's marker, too, EVA's have TIMM's.
FOREIGN = (
    *(GOOGLE, BIG_VISION, TIMM_EVA, TIMM_PARALLEL, TIMM_BESIDE, TIMM, HF_SAPIENS2, HF_DINOV3),
    *(HF_DINOV2, HF_AIMV2, HF_INTERNVL, HF_BEIT, HF_SIGLIP, HF_VIT),
    *(FLAX_DINOV2, FLAX_CLIP, FLAX_VIT),
    *(RESNET_V1, RESNET_PAPER, RESNET_BIT, RESNET_TIMM),
)


def native(names: Iterable[str]) -> Dialect:
    """The dialect of our own names."""
    markers = ("patch_embed/kernel", "resnet/conv_root/kernel")
    return Dialect("vit_jax", markers, tuple(Row(name, (name,)) for name in names))

"""Model configurations as frozen dataclasses; variants.py has the published ones."""

import dataclasses
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

from vit_jax.errors import UserError, nearest
from vit_jax.models.lora import Lora
from vit_jax.models.posembed import NATIVE_METHODS
from vit_jax.models.relative import RelativeBias
from vit_jax.models.rotary import Rotary

CHOICES = {
    "pool": ("token", "gap", "map", "token_gap", "none", "locations"),
    "distillation": ("none", "token", "head"),
    "position": (
        *("learned", "learned2d", "learned2d_added", "sincos2d", "relative", "relative_bias"),
        *("rope", "none"),
    ),
    "position_at": ("input", "layers", "layers_shared"),
    "mlp": ("gelu", "swiglu"),
    "norm": ("layernorm", "rmsnorm"),
    "qk_norm": ("none", "head", "all"),
    "gelu": ("tanh", "erf", "quick"),
    "dtype": ("float32", "bfloat16"),
    "attention": ("auto", "xla", "cudnn"),
    "remat": ("none", "dots", "full"),
    "resnet_style": ("v1", "v2", "timm_v1", "timm_v2"),
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A plain Vision Transformer; sizes in pixels and channels, rates in [0, 1).

    The tokens before the patches are the class token, the distillation token and the registers, in
    this order. A hybrid (paper, section 3.1) has a ResNet before the patches, which are then cut
    from its feature map. `attention`, `scan` and `remat` change how the model is computed, never
    its parameters.

    Attributes:
      image_size: (h, w) of the images; one number means square.
      patch_size: (h, w) of a patch, in pixels of the image or, in hybrids, of the feature map.
      in_channels: channels of the images: 1 for grey, 3 for RGB.
      max_patches: the most patches of an image, for images of any shape, each resized to a grid of
        its own (NaFlex, arXiv 2502.14786); `image_size` is then that of the position tables. None
        is images of `image_size`.
      native_resize: how position tables are resized to each image's grid, in models that are made
        for it; training takes `position_resize`.
      resnet: bottleneck units in each of the up to four stages of a ResNet; in hybrids, () is its
        root alone, and None is no ResNet.
      resnet_width: channels of the ResNet's root, a multiple of 32.
      resnet_style: code base that the ResNet follows: `v1` normalises after each convolution, like
        the ResNets of Google's hybrids and of big_vision's bit.py; `v2` before it, like BiT's
        (arXiv 1912.11370); `timm_v1` and `timm_v2` are timm's, with other epsilons.
      width: size of a token, D in the paper.
      depth: number of blocks.
      mlp_dim: hidden units of each block's MLP.
      num_heads: attention heads, which divide `width`.
      num_classes: outputs of the head; 0 is a model that outputs the pooled representation.
      pool: what the head reads: the class token, the mean of the patch tokens (`gap`), an attention
        pooling head over them (`map`), the first two concatenated (`token_gap`, DINOv2's), each
        patch token by itself (`none`), for outputs [b gh gw num_classes], as in segmentation, or
        each location of the maps of a pyramid (`locations`), for outputs [b n num_classes + 5], as
        in detection (see models/detector.py).
      pyramid: channels of a feature pyramid between patches and head (ViTDet, arXiv 2203.16527):
        with pool `none`, outputs are then of a quarter of a patch, and None is a linear head alone;
        pool `locations` needs one, of 32, 64, 96, ... channels.
      towers: with pool `locations`, 3x3 convolutions in each of the head's two towers, of classes
        and of boxes (FCOS, arXiv 1904.01355).
      class_token: whether there is a class token; None is where `pool` reads it.
      distillation: DeiT's distillation token: `token`, or `head` with a head of its own, averaged
        with the other.
      registers: number of register tokens (DINOv2).
      position: position embedding (paper, appendix D.4): a table with a row for each token
        (`learned`), tables for rows and columns, concatenated (`learned2d`) or added
        (`learned2d_added`), fixed sines and cosines (`sincos2d`), learned embeddings of the offsets
        between patches whose products with queries add to the attention logits (`relative`), a
        bias of these logits for each offset (`relative_bias`), rotary positions (`rope`), or
        `none`.
      rotary: how queries and keys are rotated, with `rope` or beside another embedding; None is not
        at all, with `rope` as DINOv3 does.
      relative_bias: what adds to attention logits, with `relative_bias` or beside another
        embedding; None is nothing, with `relative_bias` as in BEiT.
      position_at: where learned tables are added: at the `input`, before every layer with tables of
        its own (`layers`), or before every layer with the same ones (`layers_shared`).
      position_prefix: how many tokens before the patches have a row in the table; None is all.
      representation_size: width of the tanh layer before the head (paper, section 3.1); None is
        no such layer.
      dropout: rate of dropout of embedded tokens, hidden units of MLPs and outputs of residual
        branches (paper, appendix B.1).
      drop_path: rate of stochastic depth in the last block; it grows linearly from 0.
      patch_dropout: share of the patch tokens of each training image that is left out, at random,
        behind the positions (FLIP, arXiv 2212.00794); evaluation sees all.
      mlp: `gelu`, or `swiglu` with a gate of `mlp_dim` hidden units.
      gelu: form of GELU: by `tanh`, exact by `erf`, or `quick`, x sigmoid(1.702 x).
      norm: every norm: `layernorm`, or `rmsnorm` without mean and bias (arXiv 1910.07467), as in
        AIMv2 (arXiv 2411.14402). A LayerNorm is named below where either may stand.
      layernorm_eps: epsilon of every norm.
      norm_after_branch: whether the norms of a block are behind its residual branches rather than
        before them (Swin v2's res-post-norm, arXiv 2111.09883; EVA-02's enormous CLIP).
      parallel: whether attention and MLP of a block read the same normalised tokens, and their sum
        is one branch (ViT-22B, arXiv 2302.05442).
      branches: how many blocks run on the same tokens, to which they add their attentions, and then
        their MLPs (arXiv 2203.09795): a depth of 36 with 2 is timm's 18x2.
      layer_scale: initial scale of each residual branch (CaiT); None is no scale.
      mlp_scale: whether the branch of the MLP has such a scale, too; in Sapiens 2 it has not.
      patch_norm: whether a norm is between the patch embedding and the positions (AIMv2).
      pre_norm: whether a LayerNorm follows the positions (CLIP).
      norm_after_pool: whether the last LayerNorm is behind the pooling (MAE's fc_norm).
      final_norm: whether there is such a last LayerNorm; in most of the Perception Encoders (arXiv
        2504.13181) there is none.
      pool_heads: heads of the pooling head (`map`); None is num_heads.
      pool_mlp_dim: hidden units of its MLP; None is mlp_dim.
      pool_prefix: whether it reads the tokens before the patches, too (Perception Encoder).
      patch_bias: whether the patch embedding has a bias.
      qkv_bias: whether queries, keys and values have a bias.
      key_bias: whether keys have one where queries and values do; in EVA and DINOv3 they do not.
      proj_bias: whether the attention's projection and the layers of the MLP have a bias.
      qk_norm: norms of queries and keys: `none`, of each `head`, or of `all` heads together.
      differential: whether each head's attention is the difference of two maps, of half the
        channels each (arXiv 2410.05258).
      attention_norm: whether a LayerNorm is between the heads and their projection (EVA-02's CLIP).
      mlp_norm: whether a LayerNorm is before the MLP's last layer (EVA-02).
      head_bias: initial bias of the head.
      patch_outputs: outputs for a corrupted patch in masked patch prediction; training sets it.
      dtype: dtype of the computation; parameters are always float32.
      attention: implementation: XLA's, cuDNN's, or `auto`, cuDNN's on GPUs where it applies.
      scan: whether blocks run in `lax.scan` or in a Python loop; None chooses by device.
      remat: what the backward pass recomputes to save memory: at most elementwise operations
        (`none`), all but the products with kernels (`dots`), or whole blocks (`full`).
      lora: low-rank adapters beside the kernels, for fine-tuning; None is a plain model.

    Raises:
      UserError: a size that does not divide another, or a choice that does not exist.
    """

    image_size: int | Sequence[int] = (224, 224)
    patch_size: int | Sequence[int] = (16, 16)
    in_channels: int = 3
    max_patches: int | None = None
    native_resize: str | None = None
    resnet: Sequence[int] | None = None
    resnet_width: int = 64
    resnet_style: str = "v1"
    width: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12
    num_classes: int = 1000
    pool: str = "token"
    pyramid: int | None = None
    towers: int = 4
    class_token: bool | None = None
    distillation: str = "none"
    registers: int = 0
    position: str = "learned"
    rotary: Rotary | None = None
    relative_bias: RelativeBias | None = None
    position_at: str = "input"
    position_prefix: int | None = None
    representation_size: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.0
    patch_dropout: float = 0.0
    mlp: str = "gelu"
    gelu: str = "tanh"
    norm: str = "layernorm"
    layernorm_eps: float = 1e-6
    norm_after_branch: bool = False
    parallel: bool = False
    branches: int = 1
    layer_scale: float | None = None
    mlp_scale: bool = True
    patch_norm: bool = False
    pre_norm: bool = False
    norm_after_pool: bool = False
    final_norm: bool = True
    pool_heads: int | None = None
    pool_mlp_dim: int | None = None
    pool_prefix: bool = False
    patch_bias: bool = True
    qkv_bias: bool = True
    key_bias: bool = True
    proj_bias: bool = True
    qk_norm: str = "none"
    differential: bool = False
    attention_norm: bool = False
    mlp_norm: bool = False
    head_bias: float = 0.0
    patch_outputs: int = 0
    dtype: str = "float32"
    attention: str = "auto"
    scan: bool | None = None
    remat: str = "none"
    lora: Lora | None = None

    def __post_init__(self):
        for name in ("image_size", "patch_size"):
            object.__setattr__(self, name, pair(getattr(self, name), name))
        _check_choices(self)
        if self.resnet is not None:
            _check_resnet(self)
        smallest = dict(in_channels=1, width=1, depth=1, mlp_dim=1, num_heads=1, num_classes=0)
        smallest |= dict(registers=0, patch_outputs=0, branches=1, towers=1)
        for name in ("representation_size", "pool_heads", "pool_mlp_dim", "max_patches", "pyramid"):
            if getattr(self, name) is not None:
                smallest[name] = 1
        if self.position_prefix is not None:
            smallest["position_prefix"] = 0
        for name, least in smallest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UserError(f"model.{name} is {value!r}; expected an integer from {least} up")
        for name in ("dropout", "drop_path", "patch_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be in [0, 1)")
        for name in ("layernorm_eps", "layer_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"model.{name} is {value}; expected a positive number")
        if self.pools_class_token and not self.has_class_token:
            raise UserError(f"model.pool {self.pool!r} reads a class token: class_token is false")
        if self.distillation == "head" and (self.pool != "token" or self.representation_size):
            raise UserError(
                "model.distillation 'head' goes with pool 'token' and no representation_size"
            )
        if (self.position_prefix or 0) > self.num_prefix_tokens:
            raise UserError(
                f"model.position_prefix is {self.position_prefix}, but there are only "
                f"{self.num_prefix_tokens} tokens before the patches"
            )
        (h, w), (ph, pw) = self.image_size, self.patch_pixels
        if h % ph or w % pw:
            raise UserError(
                f"an image of {h}x{w} pixels does not divide into patches of {ph}x{pw}: change "
                f"model.image_size to a multiple of the patch, such as {max(h // ph, 1) * ph}x"
                f"{max(w // pw, 1) * pw}, or the patch size"
            )
        for name in ("num_heads", "pool_heads"):
            if self.width % (getattr(self, name) or 1):
                raise UserError(
                    f"model.width {self.width} does not divide into {getattr(self, name)} heads "
                    f"(model.{name})"
                )
        if self.position_at != "input" and not self.position.startswith("learned"):
            raise UserError(
                f"model.position_at {self.position_at!r} is for learned tables; model.position "
                f"{self.position!r} goes with 'input' alone"
            )
        _check_native(self)
        _check_branches(self)
        _check_relative_bias(self)
        if self.biases_logits and self.attention == "cudnn":
            name = "position 'relative'" if self.relative_bias is None else "relative_bias"
            raise UserError(
                f"model.attention 'cudnn' does not take the bias of model.{name}: use 'auto' or "
                "'xla'"
            )
        if self.differential:
            _check_differential(self)
        _check_rotary(self)
        if self.norm_after_pool and not self.final_norm:
            raise UserError(
                "model.norm_after_pool moves the last LayerNorm, and model.final_norm is false: "
                "set one of them only"
            )
        if self.parallel and (self.norm_after_branch or not self.mlp_scale):
            name = "norm_after_branch" if self.norm_after_branch else "mlp_scale"
            raise UserError(
                f"model.parallel has one branch a block, to which model.{name} "
                f"{getattr(self, name)} does not apply: change one of them"
            )
        if not self.mlp_scale and self.layer_scale is None:
            raise UserError(
                "model.mlp_scale is false, and without model.layer_scale no branch has a scale: "
                "set only the latter"
            )
        if not (self.key_bias or self.qkv_bias):
            raise UserError(
                "model.key_bias is false, and so is model.qkv_bias: set only the latter"
            )
        if self.pool == "none" and self.representation_size:
            raise UserError(
                "model.pool 'none' has a linear head on the patches, and no representation_size: "
                "set model.representation_size to None"
            )
        _check_pyramid(self)
        whole = {
            "pool": self.pool in ("none", "locations"),
            "position": self.biases_logits,
            "position_at": self.position_at != "input",
        }
        for name, needed in (whole | {"patch_outputs": self.patch_outputs > 0}).items():
            if needed and self.patch_dropout:
                what = f"{name} {getattr(self, name)!r}"
                if name == "position" and self.position != "relative":
                    what = "relative_bias"
                raise UserError(
                    f"model.patch_dropout is {self.patch_dropout:g}, but model.{what} needs all "
                    "patches: set model.patch_dropout to 0"
                )
        if self.position == "learned2d" and self.width % 2:
            raise UserError(f"position learned2d needs an even width, not {self.width}")
        if self.position == "sincos2d" and (self.width % 4 or self.width < 8):
            raise UserError(f"position sincos2d needs a width of 8, 12, 16, ..., not {self.width}")

    @property
    def patch_pixels(self) -> tuple[int, int]:
        """The (h, w) in image pixels that one patch covers; in hybrids, `patch_size` strides."""
        stride = 1 if self.resnet is None else resnet_stride(self.resnet)
        return self.patch_size[0] * stride, self.patch_size[1] * stride

    @property
    def patch_channels(self) -> int:
        """Channels of the patches' input: of the image, or of the ResNet's feature map."""
        if self.resnet is None:
            return self.in_channels
        return resnet_channels(self.resnet, self.resnet_width)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of patches, (down, across)."""
        (h, w), (ph, pw) = self.image_size, self.patch_pixels
        return h // ph, w // pw

    @property
    def biases_logits(self) -> bool:
        """Whether something adds to attention logits, which cuDNN's kernel is not given."""
        return self.position == "relative" or self.relative_bias is not None

    @property
    def num_patches(self) -> int:
        """Of an image, with padding."""
        return self.max_patches or self.grid[0] * self.grid[1]

    @property
    def pools_class_token(self) -> bool:
        return self.pool in ("token", "token_gap")

    @property
    def has_class_token(self) -> bool:
        return self.pools_class_token if self.class_token is None else self.class_token

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class token, distillation token, registers."""
        return self.has_class_token + (self.distillation != "none") + self.registers

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches

    @property
    def num_position_prefix(self) -> int:
        """Number of prefix tokens that have a row in the position embedding."""
        return self.num_prefix_tokens if self.position_prefix is None else self.position_prefix

    @property
    def num_positions(self) -> int:
        """Rows of the position embedding."""
        return self.num_position_prefix + self.grid[0] * self.grid[1]

    def with_fresh_head(self, num_classes: int) -> "ViTConfig":
        """Returns the config to fine-tune: one linear head on the pooled output (paper, B.1.1).

        The head of masked patch prediction is dropped as well.
        """
        distillation = "token" if self.distillation == "head" else self.distillation
        return dataclasses.replace(
            self,
            num_classes=num_classes,
            representation_size=None,
            distillation=distillation,
            head_bias=0.0,
            patch_outputs=0,
        )

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """A ResNet with group normalisation and weight standardisation, the paper's baseline.

    `resnet` is the number of bottleneck units in each stage, for one to four stages. The fields are
    as in `ViTConfig`.

    Raises:
      UserError: a size or a choice that does not exist.
    """

    image_size: int | Sequence[int] = (224, 224)
    in_channels: int = 3
    resnet: Sequence[int] = (3, 4, 6, 3)
    resnet_width: int = 64
    resnet_style: str = "v2"
    num_classes: int = 1000
    head_bias: float = 0.0
    dtype: str = "float32"
    scan: bool | None = None
    remat: str = "none"

    def __post_init__(self):
        object.__setattr__(self, "image_size", pair(self.image_size, "image_size"))
        _check_choices(self)
        _check_resnet(self)
        if not self.resnet:
            raise UserError("model.resnet is (): a ResNet has at least one stage")
        for name, least in {"in_channels": 1, "num_classes": 0}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UserError(f"model.{name} is {value!r}; expected an integer from {least} up")

    @property
    def width(self) -> int:
        """Channels of the feature map that is pooled."""
        return resnet_channels(self.resnet, self.resnet_width)

    def with_fresh_head(self, num_classes: int) -> "ResNetConfig":
        """Returns the config to fine-tune with: one linear head on the pooled output."""
        return dataclasses.replace(self, num_classes=num_classes, head_bias=0.0)


ModelConfig = ViTConfig | ResNetConfig
# Fields that are dataclasses themselves.
SECTIONS = {"lora": Lora, "rotary": Rotary, "relative_bias": RelativeBias}
FAMILIES = {"vit": ViTConfig, "resnet": ResNetConfig}


def resnet_stride(units: Sequence[int]) -> int:
    """Total stride of a ResNet, in pixels."""
    return 4 * 2 ** max(len(units) - 1, 0)


def resnet_channels(units: Sequence[int], width: int) -> int:
    """Channels of a ResNet's feature map."""
    return width * 4 * 2 ** (len(units) - 1) if units else width


def _check_choices(config: ModelConfig) -> None:
    for name, choices in CHOICES.items():
        value = getattr(config, name, choices[0])
        if value not in choices:
            raise UserError(f"model.{name} is {value!r}: {nearest(value, choices)}")


def _check_relative_bias(config: ViTConfig) -> None:
    """Sets the default of `relative_bias` with position `relative_bias`."""
    if config.position == "relative_bias" and config.relative_bias is None:
        object.__setattr__(config, "relative_bias", RelativeBias())
    if config.relative_bias is not None and config.position in ("none", "relative", "rope"):
        raise UserError(
            f"model.relative_bias does not go with model.position {config.position!r}: set "
            "model.position to 'relative_bias', or to a table that is added as well"
        )


def _check_rotary(config: ViTConfig) -> None:
    """Sets the default of `rotary` with position `rope`."""
    if config.position == "rope" and config.rotary is None:
        object.__setattr__(config, "rotary", Rotary())
    if config.rotary is None:
        return
    if config.position in ("none", "relative", "relative_bias"):
        raise UserError(
            f"model.rotary does not go with model.position {config.position!r}: set model.position "
            "to 'rope', or to a table that is added as well"
        )
    if config.head_dim % 4:
        raise UserError(
            f"model.rotary needs heads of 4, 8, 12, ... channels, not {config.head_dim}: change "
            "model.width or model.num_heads"
        )


def _check_pyramid(config: ViTConfig) -> None:
    """Raises a UserError for what a feature pyramid or a head of its locations has no place for."""
    (gh, gw), reads = config.grid, config.pool in ("none", "locations")
    if config.pyramid and (not reads or config.width % 4 or min(gh, gw) < 2):
        raise UserError(
            "model.pyramid is for pools 'none' and 'locations', a width of 4, 8, 12, ... and at "
            f"least 2x2 patches, found pool {config.pool!r}, width {config.width} and {gh}x{gw} "
            "patches: change these, or set model.pyramid to None"
        )
    fits = {
        "pyramid": (config.pyramid and config.pyramid % 32 == 0, "32, 64, 96, ..., such as 256"),
        "patch_size": (len(set(config.patch_pixels)) == 1, "as high as wide, in pixels"),
        "num_classes": (config.num_classes, "at least 1"),
        "representation_size": (not config.representation_size, "None"),
        "head_bias": (config.head_bias == 0, "0, as its head begins with -log(99)"),
    }
    for name, (fit, wanted) in fits.items():
        if config.pool == "locations" and not fit:
            raise UserError(
                f"model.pool 'locations' does not go with model.{name} {getattr(config, name)!r}: "
                f"it must be {wanted}"
            )


def _check_differential(config: ViTConfig) -> None:
    """Raises a UserError for what differential attention has no place for."""
    without = {"position": ("relative",), "attention": ("cudnn",), "qk_norm": ("head", "all")}
    for name, values in without.items():
        if getattr(config, name) in values:
            raise UserError(
                f"model.differential does not go with model.{name} {getattr(config, name)!r}: "
                "change one of them"
            )
    if config.rotary is not None or config.attention_norm or config.head_dim % 2:
        what = "model.rotary" if config.rotary is not None else "model.attention_norm"
        what = "heads of an odd number of channels" if config.head_dim % 2 else what
        raise UserError(f"model.differential does not go with {what}: change one of them")


def _check_branches(config: ViTConfig) -> None:
    """Raises a UserError for what has no place in blocks that run on the same tokens."""
    if config.depth % config.branches:
        raise UserError(
            f"model.depth {config.depth} does not divide into layers of {config.branches} blocks "
            "(model.branches): change one of them"
        )
    without = {"position_at": config.position_at != "input", "differential": config.differential}
    for name, there in without.items():
        if there and config.branches > 1:
            raise UserError(
                f"model.branches does not go with model.{name} {getattr(config, name)!r}: change "
                "one of them"
            )


def _check_native(config: ViTConfig) -> None:
    """Sets the default of `native_resize` with `max_patches`."""
    if config.native_resize is None and config.max_patches is not None:
        object.__setattr__(config, "native_resize", "zoom")
    method = config.native_resize
    if method is not None and method not in NATIVE_METHODS:
        raise UserError(f"model.native_resize is {method!r}: {nearest(method, NATIVE_METHODS)}")
    possible: dict[str, tuple[Any, ...]] = {
        "position": ("learned", "learned2d", "learned2d_added", "sincos2d", "rope", "none"),
        "position_at": ("input",),
        "resnet": (None,),
        "patch_dropout": (0,),
        "patch_outputs": (0,),
        "relative_bias": (None,),
        "differential": (False,),
        "pool": ("token", "gap", "map", "token_gap"),
    }
    for name, values in possible.items():
        if config.max_patches is not None and getattr(config, name) not in values:
            raise UserError(
                f"model.max_patches is for images of any shape, and model.{name} "
                f"{getattr(config, name)!r} is not: leave max_patches out, or have model.{name} "
                f"{' or '.join(map(repr, values))}"
            )


def _check_resnet(config: ModelConfig) -> None:
    units, width = config.resnet, config.resnet_width
    whole = isinstance(units, (tuple, list)) and all(type(n) is int for n in units)
    if not whole or len(units) > 4 or any(n < 1 for n in units):
        raise UserError(
            f"model.resnet is {units!r}; expected the units of up to four stages, such as (3, 4, 9)"
        )
    object.__setattr__(config, "resnet", tuple(units))
    if not isinstance(width, int) or width < 32 or width % 32:
        raise UserError(f"model.resnet_width is {width!r}; expected 32, 64, 96, ... channels")


def pair(value: Any, name: str) -> tuple[int, int]:
    """Converts an int or a sequence of one or two ints to (h, w); one number means square."""
    sides = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(sides) not in (1, 2) or not all(isinstance(s, Integral) and s > 0 for s in sides):
        raise UserError(f"model.{name} is {value!r}; expected one positive integer or (h, w)")
    return (int(sides[0]), int(sides[-1]))


def check_fields(kind: type, names: Iterable[str]) -> None:
    """Raises a UserError if any of `names` is not a field of the config class."""
    known = {field.name for field in dataclasses.fields(kind)}
    for name in names:
        if name not in known:
            of = {ViTConfig: "", ResNetConfig: " of a ResNet"}.get(kind, f" of {kind.__name__}")
            raise UserError(f"unknown model field {name!r}{of}; {nearest(name, known)}")

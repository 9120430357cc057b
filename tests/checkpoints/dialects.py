"""Tiny weights as each code base writes them, and what they are under our names.

Names, shapes and axes are written down from the code bases themselves: models_vit.py of
google-research/vision_transformer, models/vit.py of big_vision, vision_transformer.py and deit.py
of timm, and the state dicts of transformers 4 and 5. Nothing here imports vit_jax.

`read` parses a file on its own, and `ours` rearranges its arrays in plain NumPy, also those of a
file that was tampered with: what is in it decides, not what was once written.
"""

import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

# Width, MLP and so on of all models here; no two of them are equal, where that can be helped.
D, MLP, HEADS, DEPTH, PATCH, IMAGE, CHANNELS, CLASSES = 8, 12, 2, 2, 4, 8, 3, 5
GRID = IMAGE // PATCH
PATCHES = GRID * GRID
SIZES = dict(
    image_size=IMAGE,
    patch_size=PATCH,
    in_channels=CHANNELS,
    width=D,
    depth=DEPTH,
    mlp_dim=MLP,
    num_heads=HEADS,
)


@dataclasses.dataclass(frozen=True)
class Example:
    """One file, or folder, of weights.

    Attributes:
      format: what `vit_jax.save` calls its code base.
      arrays: as they are in the file.
      config: fields of ViTConfig that the file amounts to; the others have their defaults.
      known: fields that the file cannot say, so that the user has to.
      files: JSON files beside the weights, in whose folder they are model.safetensors.
      leftover: names that are no part of a ViT.
      canonical: the arrays as they are written back, where that is not as they came.
      card: what our own `save` puts into the file with the arrays.
      shards: how many files the arrays are spread over.
    """

    name: str
    format: str
    arrays: Arrays
    config: dict[str, Any]
    known: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: dict[str, dict] = dataclasses.field(default_factory=dict)
    leftover: tuple[str, ...] = ()
    canonical: Arrays | None = None
    card: dict[str, Any] | None = None
    shards: int = 1

    @property
    def ending(self) -> str:
        return ".npz" if self.format in ("google", "big_vision") else ".safetensors"

    def params(self) -> Arrays:
        return ours(self.arrays, self.config.get("num_heads", HEADS))[0]

    def written_back(self) -> Arrays:
        """What `save` in the same format makes of the loaded model: in float32."""
        arrays = self.arrays if self.canonical is None else self.canonical
        return {k: as_float32(v) for k, v in arrays.items() if k not in self.leftover}

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        """Writes it into `folder`; returns what to load."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_text(json.dumps(content))
        if self.shards > 1:
            place = self.index()["weight_map"]
            for file in set(place.values()):
                part = {name: value for name, value in self.arrays.items() if place[name] == file}
                (folder / file).write_bytes(to_safetensors(part, {"format": "pt"}))
            (folder / "model.safetensors.index.json").write_text(json.dumps(self.index()))
            return folder
        if self.files:
            path = folder / "model.safetensors"
        else:
            path = folder / f"weights{self.ending}"
        path.write_bytes(self.to_bytes())
        if self.card and self.ending == ".npz":
            sidecar = {"vit_jax": self.card, "weights": fingerprint(path.read_bytes())}
            path.with_suffix(".json").write_text(json.dumps(sidecar))
        return folder if self.files else path

    def index(self) -> dict[str, Any]:
        """Which of its files each array is in."""
        place = {
            name: f"model-{i % self.shards + 1:05}-of-{self.shards:05}.safetensors"
            for i, name in enumerate(sorted(self.arrays))
        }
        return {"metadata": {"total_size": 0}, "weight_map": place}

    def to_bytes(self) -> bytes:
        """The file of weights itself."""
        if self.ending == ".npz":
            return to_npz(self.arrays)
        metadata = {"format": "pt"}
        if self.card:
            metadata["vit_jax"] = json.dumps(self.card)
        return to_safetensors(self.arrays, metadata)


# -- Files ---------------------------------------------------------------------------------------

_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "V2", "I64": "<i8", "I32": "<i4"}


def to_npz(arrays: Arrays, compress: bool = False) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def to_safetensors(arrays: Arrays, metadata: Mapping[str, str] | None = None) -> bytes:
    """8 bytes of length, a JSON of names, types, shapes and places, and the numbers; V2 is BF16."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data, kinds = b"", {np.dtype(v): k for k, v in _TYPES.items()}
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": kinds[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return safetensors_of(header, data)


def safetensors_of(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def fingerprint(raw: bytes) -> str:
    """What ties the .json beside an .npz to it: of the names and checksums of its members."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = sorted((info.filename, info.CRC) for info in archive.infolist())
    return hashlib.sha256(repr(members).encode()).hexdigest()


def split_safetensors(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the numbers of a safetensors file."""
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def read(path: pathlib.Path) -> Arrays:
    """The arrays of a file or folder, as they are in it."""
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = ["model.safetensors"]
        return {k: v for file in files for k, v in read(path / file).items()}
    raw = path.read_bytes()
    if raw.startswith(b"PK"):
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    header, data = split_safetensors(raw)
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        kind = np.dtype(_TYPES.get(entry["dtype"], "V1"))
        flat = np.frombuffer(data[start:end], kind)
        arrays[name] = flat.reshape(entry["shape"]) if kind.itemsize > 1 else flat
    return arrays


def read_record(path: pathlib.Path) -> Any:
    """What our own `save` put beside the arrays of a file or folder; None where it did not."""
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.exists():
            return None
    raw = path.read_bytes()
    if raw.startswith(b"PK"):
        sidecar = path.with_suffix(".json")
        beside = json.loads(sidecar.read_text()) if sidecar.exists() else {}
        return beside.get("vit_jax") if beside.get("weights") == fingerprint(raw) else None
    text = split_safetensors(raw)[0].get("__metadata__", {}).get("vit_jax")
    return json.loads(text) if text else None


def as_float32(array: np.ndarray) -> np.ndarray:
    """Numbers of any type in float32; two bytes of no type are bfloat16, float32's upper half."""
    if array.dtype == np.dtype("V2"):
        halves = np.ascontiguousarray(array).view(np.uint16).astype(np.uint32)
        return (halves << 16).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float32)


# -- From their names to ours --------------------------------------------------------------------


class Source:
    """Arrays by name, in float32; `taken` are those that were asked for."""

    def __init__(self, arrays: Arrays, prefix: str = ""):
        self.arrays, self.prefix, self.taken = arrays, prefix, set()

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        self.taken.add(self.prefix + name)
        return as_float32(self.arrays[self.prefix + name])

    def copy(self, out: Arrays, names: Mapping[str, str]) -> None:
        """Those of `names` (ours -> theirs) that are there, as they are."""
        out |= {mine: self[theirs] for mine, theirs in names.items() if theirs in self}

    def depth(self, pattern: str) -> int:
        """One more than the largest block that a name mentions."""
        found = (re.match(re.escape(self.prefix) + pattern, name) for name in self.arrays)
        return max((int(match[1]) + 1 for match in found if match), default=0)


def ours(arrays: Arrays, heads: int) -> tuple[Arrays, set[str]]:
    """Our parameters by their paths, and the names of the file that none of them is made of.

    Raises:
      KeyError, ValueError and the like: the arrays are not those of a ViT.
    """
    if "patch_embed/kernel" in arrays:
        return {name: as_float32(value) for name, value in arrays.items()}, set()
    for prefix in ("", "opt/target/", "params/", "target/"):
        if prefix + "Transformer/posembed_input/pos_embedding" in arrays:
            return _of_flax(Source(arrays, prefix), "Transformer/posembed_input/pos_embedding")
    for prefix in ("params/", "params/img/", "", "img/", "opt/target/"):
        if prefix + "Transformer/encoder_norm/scale" in arrays:
            return _of_flax(Source(arrays, prefix), "pos_embedding")
    for prefix in ("", "model.", "module."):
        if prefix + "patch_embed.proj.weight" in arrays:
            return _of_timm(Source(arrays, prefix), heads)
    for prefix in ("", "dinov2.", "dinov2_with_registers."):
        if prefix + "encoder.layer.0.layer_scale1.lambda1" in arrays:
            return _of_dinov2(Source(arrays, prefix), heads)
    for prefix in ("", "vision_model."):
        if prefix + "embeddings.patch_embedding.weight" in arrays:
            return _of_siglip_or_clip(Source(arrays, prefix), heads)
    for prefix in ("", "vit.", "deit."):
        if prefix + "embeddings.patch_embeddings.projection.weight" in arrays:
            return _of_hf_vit(Source(arrays, prefix), heads)
    raise KeyError("no dialect")


def _stacked(blocks: list[Arrays]) -> Arrays:
    return {f"blocks/{k}": np.stack([block[k] for block in blocks]) for k in blocks[0]}


def _flax_attention(at, ours: str) -> Arrays:
    """Linen's [d heads head_dim] three times, side by side on the second axis."""
    out = {}
    for leaf, axis in (("kernel", 1), ("bias", 0)):
        if at(f"query/{leaf}") is not None:
            parts = [at(f"{name}/{leaf}") for name in ("query", "key", "value")]
            out[f"{ours}/qkv/{leaf}"] = np.stack(parts, axis=axis)
        if at(f"out/{leaf}") is not None:
            out[f"{ours}/out/{leaf}"] = at(f"out/{leaf}")
    return out


def _of_flax(f: Source, position: str) -> tuple[Arrays, set[str]]:
    names = {
        "patch_embed/kernel": "embedding/kernel",  # [p q c d] in both
        "patch_embed/bias": "embedding/bias",
        "cls_token": "cls",
        "norm/scale": "Transformer/encoder_norm/scale",
        "norm/bias": "Transformer/encoder_norm/bias",
    }
    for layer in ("pre_logits", "head"):
        names |= {f"{layer}/kernel": f"{layer}/kernel", f"{layer}/bias": f"{layer}/bias"}
    out: Arrays = {}
    f.copy(out, names)
    if position in f:
        (out["pos_embed"],) = f[position]

    def block(name: str, layer: int | None) -> Arrays:
        def at(part: str) -> np.ndarray | None:
            if f"{name}/{part}" not in f:
                return None
            return f[f"{name}/{part}"] if layer is None else f[f"{name}/{part}"][layer]

        # Before linen, the layers of a block were counted together, whatever their kind.
        old = f"{name}/MlpBlock_3/Dense_0/kernel" in f
        attention, norm2, mlp = (1, 2, 3) if old else (0, 1, 0)
        found = _flax_attention(
            lambda part: at(f"MultiHeadDotProductAttention_{attention}/{part}"), "attention"
        )
        for mine, theirs in {"norm1": "LayerNorm_0", "norm2": f"LayerNorm_{norm2}"}.items():
            found |= {f"{mine}/{leaf}": at(f"{theirs}/{leaf}") for leaf in ("scale", "bias")}
        for mine, theirs in {"mlp/fc1": "Dense_0", "mlp/fc2": "Dense_1"}.items():
            for leaf in ("kernel", "bias"):
                found[f"{mine}/{leaf}"] = at(f"MlpBlock_{mlp}/{theirs}/{leaf}")
        return {k: v for k, v in found.items() if v is not None}

    if "Transformer/encoderblock/LayerNorm_0/scale" in f:  # one array for all blocks
        depth = len(f["Transformer/encoderblock/LayerNorm_0/scale"])
        out |= _stacked([block("Transformer/encoderblock", i) for i in range(depth)])
    else:
        depth = f.depth(r"Transformer/encoderblock_(\d+)/")
        out |= _stacked([block(f"Transformer/encoderblock_{i}", None) for i in range(depth)])

    if "MAPHead_0/probe" in f:
        head = "MAPHead_0"
        names = {
            "probe": "probe",
            "norm/scale": "LayerNorm_0/scale",
            "norm/bias": "LayerNorm_0/bias",
            "mlp/fc1/kernel": "MlpBlock_0/Dense_0/kernel",
            "mlp/fc1/bias": "MlpBlock_0/Dense_0/bias",
            "mlp/fc2/kernel": "MlpBlock_0/Dense_1/kernel",
            "mlp/fc2/bias": "MlpBlock_0/Dense_1/bias",
        }
        f.copy(out, {f"attention_pool/{k}": f"{head}/{v}" for k, v in names.items()})

        def at(part):
            name = f"{head}/MultiHeadDotProductAttention_0/{part}"
            return f[name] if name in f else None

        out |= _flax_attention(at, "attention_pool/attention")
    return out, set(f.arrays) - f.taken


def _torch_linear(f: Source, out: Arrays, mine: str, theirs: str) -> None:
    if f"{theirs}.weight" in f:
        out[f"{mine}/kernel"] = f[f"{theirs}.weight"].T
    if f"{theirs}.bias" in f:
        out[f"{mine}/bias"] = f[f"{theirs}.bias"]


def _torch_norm(f: Source, out: Arrays, mine: str, theirs: str) -> None:
    f.copy(out, {f"{mine}/scale": f"{theirs}.weight", f"{mine}/bias": f"{theirs}.bias"})


def _torch_attention(
    f: Source, out: Arrays, mine: str, weights: list[str], biases: list[str], to: str, heads: int
) -> None:
    """Rows are outputs: those of q come first, then k, then v, each of them head after head."""
    if weights[0] in f:
        rows = np.concatenate([f[name] for name in weights])
        d = rows.shape[1]
        rows = rows.reshape(3, heads, d // heads, d)
        out[f"{mine}/qkv/kernel"] = np.moveaxis(rows, 3, 0)
    if biases[0] in f:
        rows = np.concatenate([f[name] for name in biases])
        out[f"{mine}/qkv/bias"] = rows.reshape(3, heads, len(rows) // 3 // heads)
    if f"{to}.weight" in f:
        columns = f[f"{to}.weight"].T
        d = len(columns)
        out[f"{mine}/out/kernel"] = columns.reshape(heads, d // heads, d)
    f.copy(out, {f"{mine}/out/bias": f"{to}.bias"})


def _torch_patches(f: Source, out: Arrays, theirs: str) -> None:
    out["patch_embed/kernel"] = f[f"{theirs}.weight"].transpose(2, 3, 1, 0)
    f.copy(out, {"patch_embed/bias": f"{theirs}.bias"})


def _of_timm(f: Source, heads: int) -> tuple[Arrays, set[str]]:
    out: Arrays = {}
    _torch_patches(f, out, "patch_embed.proj")
    f.copy(out, {"cls_token": "cls_token", "dist_token": "dist_token", "registers": "reg_token"})
    if "pos_embed" in f:
        (out["pos_embed"],) = f["pos_embed"]
    _torch_norm(f, out, "pre_norm", "norm_pre")
    _torch_norm(f, out, "norm", "norm" if "norm.weight" in f else "fc_norm")
    blocks = []
    for i in range(f.depth(r"blocks\.(\d+)\.")):
        block: Arrays = {}
        _torch_norm(f, block, "norm1", f"blocks.{i}.norm1")
        qkv = f"blocks.{i}.attn.qkv"
        _torch_attention(
            f,
            block,
            "attention",
            *([f"{qkv}.weight"], [f"{qkv}.bias"]),
            f"blocks.{i}.attn.proj",
            heads,
        )
        _torch_norm(f, block, "norm2", f"blocks.{i}.norm2")
        _torch_linear(f, block, "mlp/fc1", f"blocks.{i}.mlp.fc1")
        _torch_linear(f, block, "mlp/fc2", f"blocks.{i}.mlp.fc2")
        f.copy(block, {"scale1": f"blocks.{i}.ls1.gamma", "scale2": f"blocks.{i}.ls2.gamma"})
        blocks.append(block)
    out |= _stacked(blocks)
    if "attn_pool.latent" in f:
        out["attention_pool/probe"] = f["attn_pool.latent"]
        weights = ["attn_pool.q.weight", "attn_pool.kv.weight"]
        biases = ["attn_pool.q.bias", "attn_pool.kv.bias"]
        pool = "attention_pool/attention"
        _torch_attention(f, out, pool, weights, biases, "attn_pool.proj", heads)
        _torch_norm(f, out, "attention_pool/norm", "attn_pool.norm")
        _torch_linear(f, out, "attention_pool/mlp/fc1", "attn_pool.mlp.fc1")
        _torch_linear(f, out, "attention_pool/mlp/fc2", "attn_pool.mlp.fc2")
    _torch_linear(f, out, "head", "head")
    _torch_linear(f, out, "head_dist", "head_dist")
    return out, set(f.arrays) - f.taken


def _hf_attention(f: Source, block: Arrays, layer: str, heads: int) -> None:
    names, to = ("q_proj", "k_proj", "v_proj"), f"{layer}.attention.o_proj"
    base = f"{layer}.attention"
    if f"{base}.attention.query.weight" in f:
        base, names = f"{base}.attention", ("query", "key", "value")
        to = f"{layer}.attention.output.dense"
    weights = [f"{base}.{name}.weight" for name in names]
    biases = [f"{base}.{name}.bias" for name in names]
    _torch_attention(f, block, "attention", weights, biases, to, heads)


def _hf_head(f: Source, out: Arrays, mine: str, theirs: str) -> None:
    """Classifiers stand beside the encoder, not in it."""
    outside = Source(f.arrays)
    _torch_linear(outside, out, mine, theirs)
    f.taken |= outside.taken


def _hf_stem(f: Source, out: Arrays) -> None:
    _torch_patches(f, out, "embeddings.patch_embeddings.projection")
    f.copy(
        out,
        {
            "cls_token": "embeddings.cls_token",
            "dist_token": "embeddings.distillation_token",
            "registers": "embeddings.register_tokens",
        },
    )
    if "embeddings.position_embeddings" in f:
        (out["pos_embed"],) = f["embeddings.position_embeddings"]


def _of_hf_vit(f: Source, heads: int) -> tuple[Arrays, set[str]]:
    out: Arrays = {}
    _hf_stem(f, out)
    old = f.depth(r"encoder\.layer\.(\d+)\.")
    blocks = []
    for i in range(old or f.depth(r"layers\.(\d+)\.")):
        block: Arrays = {}
        layer = f"encoder.layer.{i}" if old else f"layers.{i}"
        _torch_norm(f, block, "norm1", f"{layer}.layernorm_before")
        _torch_norm(f, block, "norm2", f"{layer}.layernorm_after")
        _hf_attention(f, block, layer, heads)
        fc1, fc2 = ("intermediate.dense", "output.dense") if old else ("mlp.fc1", "mlp.fc2")
        _torch_linear(f, block, "mlp/fc1", f"{layer}.{fc1}")
        _torch_linear(f, block, "mlp/fc2", f"{layer}.{fc2}")
        blocks.append(block)
    out |= _stacked(blocks)
    _torch_norm(f, out, "norm", "layernorm")
    _torch_linear(f, out, "pre_logits", "pooler.dense")
    teacher = "cls_classifier.weight" in f.arrays
    _hf_head(f, out, "head", "cls_classifier" if teacher else "classifier")
    _hf_head(f, out, "head_dist", "distillation_classifier")
    return out, set(f.arrays) - f.taken


def _of_dinov2(f: Source, heads: int) -> tuple[Arrays, set[str]]:
    out: Arrays = {}
    _hf_stem(f, out)
    blocks = []
    for i in range(f.depth(r"encoder\.layer\.(\d+)\.")):
        block: Arrays = {}
        layer = f"encoder.layer.{i}"
        _torch_norm(f, block, "norm1", f"{layer}.norm1")
        _torch_norm(f, block, "norm2", f"{layer}.norm2")
        _hf_attention(f, block, layer, heads)
        scales = {"scale1": "layer_scale1.lambda1", "scale2": "layer_scale2.lambda1"}
        f.copy(block, {mine: f"{layer}.{theirs}" for mine, theirs in scales.items()})
        mlp = f"{layer}.mlp"
        if f"{mlp}.gate_proj.weight" in f:  # transformers 5: the gate and what it gates apart
            gates = [f[f"{mlp}.{name}.weight"] for name in ("gate_proj", "up_proj")]
            block["mlp/fc1/kernel"] = np.concatenate(gates).T
            gates = [f[f"{mlp}.{name}.bias"] for name in ("gate_proj", "up_proj")]
            block["mlp/fc1/bias"] = np.concatenate(gates)
            _torch_linear(f, block, "mlp/fc2", f"{mlp}.down_proj")
        else:
            for mine, names in {
                "fc1": ("fc1", "weights_in"),
                "fc2": ("fc2", "weights_out"),
            }.items():
                for name in names:
                    _torch_linear(f, block, f"mlp/{mine}", f"{mlp}.{name}")
        blocks.append(block)
    out |= _stacked(blocks)
    _torch_norm(f, out, "norm", "layernorm")
    _hf_head(f, out, "head", "classifier")
    return out, set(f.arrays) - f.taken


def _of_siglip_or_clip(f: Source, heads: int) -> tuple[Arrays, set[str]]:
    out: Arrays = {}
    _torch_patches(f, out, "embeddings.patch_embedding")
    if "embeddings.class_embedding" in f:
        out["cls_token"] = f["embeddings.class_embedding"].reshape(1, 1, -1)
    f.copy(out, {"pos_embed": "embeddings.position_embedding.weight"})
    _torch_norm(f, out, "pre_norm", "pre_layrnorm")
    blocks = []
    for i in range(f.depth(r"encoder\.layers\.(\d+)\.")):
        block: Arrays = {}
        layer = f"encoder.layers.{i}"
        _torch_norm(f, block, "norm1", f"{layer}.layer_norm1")
        _torch_norm(f, block, "norm2", f"{layer}.layer_norm2")
        names = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
        weights, biases = ([f"{name}.{leaf}" for name in names] for leaf in ("weight", "bias"))
        _torch_attention(
            f, block, "attention", weights, biases, f"{layer}.self_attn.out_proj", heads
        )
        _torch_linear(f, block, "mlp/fc1", f"{layer}.mlp.fc1")
        _torch_linear(f, block, "mlp/fc2", f"{layer}.mlp.fc2")
        blocks.append(block)
    out |= _stacked(blocks)
    _torch_norm(f, out, "norm", "post_layernorm")
    if "head.probe" in f:
        out["attention_pool/probe"] = f["head.probe"]
        fused = "head.attention.in_proj_"
        pool = "attention_pool/attention"
        weight, bias = [f"{fused}weight"], [f"{fused}bias"]
        _torch_attention(f, out, pool, weight, bias, "head.attention.out_proj", heads)
        _torch_norm(f, out, "attention_pool/norm", "head.layernorm")
        _torch_linear(f, out, "attention_pool/mlp/fc1", "head.mlp.fc1")
        _torch_linear(f, out, "attention_pool/mlp/fc2", "head.mlp.fc2")
    return out, set(f.arrays) - f.taken


def count(config: Any) -> int:
    """Parameters of a ViTConfig, added up by hand."""
    d, (ph, pw), (h, w) = config.width, config.patch_size, config.image_size
    patches = (h // ph) * (w // pw)
    fc1 = config.mlp_dim * (2 if config.mlp == "swiglu" else 1)
    mlp = d * fc1 + fc1 + config.mlp_dim * d + d
    attention = 3 * d * d + (3 * d if config.qkv_bias else 0) + d * d + d
    block = 2 * d + attention + 2 * d + mlp + (2 * d if config.layer_scale is not None else 0)
    token = "token" in config.pool if config.class_token is None else config.class_token
    prefix = token + (config.distillation != "none") + config.registers
    total = ph * pw * config.in_channels * d + (d if config.patch_bias else 0) + prefix * d
    if config.position == "learned":
        rows = prefix if config.position_prefix is None else config.position_prefix
        total += (rows + patches) * d
    total += (2 * d if config.pre_norm else 0) + config.depth * block + 2 * d
    if config.pool == "map":
        total += d + attention + 2 * d + mlp
    pooled = d * (2 if config.pool == "token_gap" else 1)
    if config.representation_size:
        total += pooled * config.representation_size + config.representation_size
        pooled = config.representation_size
    heads = 2 if config.distillation == "head" else 1
    return total + (heads * (pooled + 1) * config.num_classes if config.num_classes else 0)


# -- The examples --------------------------------------------------------------------------------


def _random(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Arrays:
    """Values that float16 and bfloat16 hold exactly, so that one example serves all types."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(-127, 128, shape) / 64).astype(np.float32)
        for name, shape in shapes.items()
    }


def _flax(
    prefix: str,
    *,
    old: bool = False,
    position: str | None = None,
    rows: int = PATCHES,
    scanned: bool = False,
    cls: bool = False,
    hidden: int = 0,
    pool: bool = False,
    classes: int = CLASSES,
    patch: tuple[int, int] = (PATCH, PATCH),
    seed: int = 0,
) -> Arrays:
    """Names of Google's code and of big_vision's, which differ in how blocks are numbered."""
    shapes = {
        "embedding/kernel": (*patch, CHANNELS, D),
        "embedding/bias": (D,),
        "Transformer/encoder_norm/scale": (D,),
        "Transformer/encoder_norm/bias": (D,),
    }
    if cls:
        shapes["cls"] = (1, 1, D)
    if position:
        shapes[position] = (1, rows, D)
    attention, norm2, mlp = (1, 2, 3) if old else (0, 1, 0)
    layers = {"LayerNorm_0/scale": (D,), "LayerNorm_0/bias": (D,)}
    layers |= {f"LayerNorm_{norm2}/scale": (D,), f"LayerNorm_{norm2}/bias": (D,)}
    multi_head = {}
    for name in ("query", "key", "value"):
        multi_head[f"{name}/kernel"] = (D, HEADS, D // HEADS)
        multi_head[f"{name}/bias"] = (HEADS, D // HEADS)
    multi_head |= {"out/kernel": (HEADS, D // HEADS, D), "out/bias": (D,)}
    dense = {
        "Dense_0/kernel": (D, MLP),
        "Dense_0/bias": (MLP,),
        "Dense_1/kernel": (MLP, D),
        "Dense_1/bias": (D,),
    }
    layers |= {f"MultiHeadDotProductAttention_{attention}/{k}": v for k, v in multi_head.items()}
    layers |= {f"MlpBlock_{mlp}/{k}": v for k, v in dense.items()}
    if scanned:
        shapes |= {f"Transformer/encoderblock/{k}": (DEPTH, *v) for k, v in layers.items()}
    else:
        for i in range(DEPTH):
            shapes |= {f"Transformer/encoderblock_{i}/{k}": v for k, v in layers.items()}
    if pool:
        shapes |= {
            f"MAPHead_0/MultiHeadDotProductAttention_0/{k}": v for k, v in multi_head.items()
        }
        shapes |= {f"MAPHead_0/MlpBlock_0/{k}": v for k, v in dense.items()}
        shapes |= {"MAPHead_0/LayerNorm_0/scale": (D,), "MAPHead_0/LayerNorm_0/bias": (D,)}
        shapes["MAPHead_0/probe"] = (1, 1, D)
    if hidden:
        shapes |= {"pre_logits/kernel": (D, hidden), "pre_logits/bias": (hidden,)}
    if classes:
        shapes |= {"head/kernel": (hidden or D, classes), "head/bias": (classes,)}
    return _random({prefix + name: shape for name, shape in shapes.items()}, seed)


GOOGLE_POSITION = "Transformer/posembed_input/pos_embedding"
_BASE = {**SIZES, "num_classes": CLASSES}  # gelu tanh and epsilon 1e-6 are the defaults


def _renamed(arrays: Arrays, *changes: tuple[str, str]) -> Arrays:
    """The arrays with regular expressions replaced in their names, one after the other."""
    for pattern, new in changes:
        arrays = {re.sub(pattern, new, name): value for name, value in arrays.items()}
    return arrays


def _unscanned(arrays: Arrays, inside: str = "Transformer/encoderblock/") -> Arrays:
    out = {}
    for name, value in arrays.items():
        if inside in name:
            for i in range(DEPTH):
                out[name.replace(inside, f"{inside[:-1]}_{i}/")] = value[i]
        else:
            out[name] = value
    return out


def _google() -> list[Example]:
    paper = dict(old=True, position=GOOGLE_POSITION, rows=1 + PATCHES, cls=True)
    plain = _flax("", **paper, seed=1)
    target = {**_flax("opt/target/", **paper, hidden=6, seed=2)}
    target["opt/state/step"] = np.asarray(7, np.int32)
    gap = _flax("", position=GOOGLE_POSITION, seed=3)
    return [
        Example("google paper", "google", plain, _BASE),
        Example(
            "google opt/target",
            "google",
            target,
            {**_BASE, "representation_size": 6},
            leftover=("opt/state/step",),
            canonical=_renamed(target, ("opt/target/", "")),
        ),
        Example(
            "google linen gap",
            "google",
            gap,
            {**_BASE, "pool": "gap"},
            canonical=_renamed(
                gap,
                ("MlpBlock_0", "MlpBlock_3"),
                ("LayerNorm_1", "LayerNorm_2"),
                ("Attention_0", "Attention_1"),
            ),
        ),
        Example(
            "google no head",
            "google",
            _flax("", **paper, classes=0, seed=4),
            {**_BASE, "num_classes": 0},
        ),
    ]


def bfloat16(arrays: Arrays) -> Arrays:
    """As NumPy saves bfloat16: two bytes of no type."""
    return {
        name: (np.ascontiguousarray(value).view(np.uint32) >> 16).astype(np.uint16).view("V2")
        for name, value in arrays.items()
    }


def _big_vision() -> list[Example]:
    token = _flax("params/", position="pos_embedding", cls=True, seed=11)
    scanned = _flax("params/", position="pos_embedding", scanned=True, seed=12)
    pool = _flax("params/", position="pos_embedding", pool=True, classes=0, seed=13)
    towers = _flax("params/img/", position="pos_embedding", pool=True, seed=15)
    text = _random({f"params/txt/{name}": (3, 2) for name in ("head/kernel", "Embed_0/x")}, 16)
    text |= _random({"params/t": (1,), "params/b": (1,)}, 17)
    return [
        Example("big_vision token", "big_vision", token, {**_BASE, "position_prefix": 0}),
        Example(
            "big_vision scanned",
            "big_vision",
            scanned,
            {**_BASE, "pool": "gap"},
            canonical=_unscanned(scanned),
        ),
        Example("big_vision map", "big_vision", pool, {**_BASE, "pool": "map", "num_classes": 0}),
        Example(
            "big_vision sincos2d",
            "big_vision",
            _flax("params/", hidden=6, seed=14),
            {**_BASE, "pool": "gap", "position": "sincos2d", "representation_size": 6},
            known={"image_size": IMAGE},
        ),
        Example(
            "big_vision two towers",
            "big_vision",
            {**towers, **text},
            {**_BASE, "pool": "map"},
            leftover=tuple(text),
            canonical=_renamed(towers, ("params/img/", "params/")),
        ),
        Example(
            "big_vision bfloat16",
            "big_vision",
            bfloat16(_flax("", position="pos_embedding", seed=18)),
            {**_BASE, "pool": "gap"},
            canonical=_flax("params/", position="pos_embedding", seed=18),
        ),
    ]


def _timm(
    *,
    tokens: Mapping[str, int] | None = None,
    rows: int = 1 + PATCHES,
    norm: str = "norm",
    pool: bool = False,
    pre_norm: bool = False,
    scale: bool = False,
    swiglu: bool = False,
    qkv_bias: bool = True,
    classes: int = CLASSES,
    distilled: bool = False,
    seed: int = 0,
) -> Arrays:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, number in ({"cls_token": 1} if tokens is None else tokens).items():
        shapes[name] = (1, number, D)
    shapes |= {"pos_embed": (1, rows, D), "patch_embed.proj.weight": (D, CHANNELS, PATCH, PATCH)}
    if pre_norm:
        shapes |= {"norm_pre.weight": (D,), "norm_pre.bias": (D,)}
    else:
        shapes["patch_embed.proj.bias"] = (D,)
    mlp = {"mlp.fc1.weight": (MLP, D), "mlp.fc1.bias": (MLP,)}
    mlp |= {"mlp.fc2.weight": (D, MLP // 2 if swiglu else MLP), "mlp.fc2.bias": (D,)}
    for i in range(DEPTH):
        block = {"norm1.weight": (D,), "norm1.bias": (D,), "attn.qkv.weight": (3 * D, D)}
        if qkv_bias:
            block["attn.qkv.bias"] = (3 * D,)
        block |= {"attn.proj.weight": (D, D), "attn.proj.bias": (D,)}
        block |= {"norm2.weight": (D,), "norm2.bias": (D,), **mlp}
        if scale:
            block |= {"ls1.gamma": (D,), "ls2.gamma": (D,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {f"{norm}.weight": (D,), f"{norm}.bias": (D,)}
    if pool:
        shapes |= {"attn_pool.latent": (1, 1, D)}
        shapes |= {"attn_pool.q.weight": (D, D), "attn_pool.q.bias": (D,)}
        shapes |= {"attn_pool.kv.weight": (2 * D, D), "attn_pool.kv.bias": (2 * D,)}
        shapes |= {"attn_pool.proj.weight": (D, D), "attn_pool.proj.bias": (D,)}
        shapes |= {"attn_pool.norm.weight": (D,), "attn_pool.norm.bias": (D,)}
        shapes |= {f"attn_pool.{name}": shape for name, shape in mlp.items()}
    for head in ("head", "head_dist") if distilled else ("head",):
        if classes:
            shapes |= {f"{head}.weight": (classes, D), f"{head}.bias": (classes,)}
    return _random(shapes, seed)


def timm_config(architecture: str, **args: Any) -> dict[str, dict]:
    """The config.json that timm pushes to the hub beside model.safetensors."""
    return {
        "config.json": {
            "architecture": architecture,
            "num_classes": CLASSES,
            "num_features": D,
            "global_pool": "token",
            "model_args": {"img_size": IMAGE, "num_heads": HEADS, **args},
            "pretrained_cfg": {
                "tag": "augreg",
                "input_size": [3, IMAGE, IMAGE],
                "fixed_input_size": True,
                "interpolation": "bicubic",
                "crop_pct": 0.9,
                "crop_mode": "center",
                "mean": [0.5, 0.5, 0.5],
                "std": [0.5, 0.5, 0.5],
                "num_classes": CLASSES,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
        }
    }


def _timm_examples() -> list[Example]:
    base = {**_BASE, "gelu": "erf"}
    known = {"num_heads": HEADS}
    gap = dict(tokens={}, rows=PATCHES)
    both = {"cls_token": 1, "dist_token": 1}
    registers = {"cls_token": 1, "reg_token": 3}

    def timm(name, config, known=known, **arrays):
        return Example(f"timm {name}", "timm", _timm(**arrays), {**base, **config}, known)

    return [
        timm("plain", {}, seed=21),
        timm("fc_norm", {"pool": "gap", "norm_after_pool": True}, **gap, norm="fc_norm", seed=22),
        timm("map", {"pool": "map", "num_classes": 0}, **gap, pool=True, classes=0, seed=23),
        timm("distilled", {"distillation": "head"}, tokens=both, rows=6, distilled=True, seed=24),
        timm("layer scale", {"layer_scale": 1e-5}, scale=True, seed=25),
        timm(
            "registers",
            {"registers": 3, "position_prefix": 0, "layer_scale": 1e-5},
            tokens=registers,
            rows=PATCHES,
            scale=True,
            seed=26,
        ),
        timm(
            "pre_norm",
            {"pre_norm": True, "patch_bias": False, "layernorm_eps": 1e-5},
            pre_norm=True,
            seed=27,
        ),
        timm(
            "swiglu",
            {"mlp": "swiglu", "mlp_dim": MLP // 2, "gelu": "tanh", "layer_scale": 1e-5},
            swiglu=True,
            scale=True,
            seed=28,
        ),
        timm("no qkv bias", {"qkv_bias": False}, qkv_bias=False, seed=29),
        Example(
            "timm folder",
            "timm",
            _timm(seed=30),
            base,
            files=timm_config("vit_tiny_patch16_224"),
        ),
    ]


def _hf_vit(
    prefix: str, *, teacher: bool = False, pooler: int = 0, classes: int = CLASSES, seed: int = 0
) -> Arrays:
    """Names of the files on the hub: of ViT and, with its teacher, of DeiT."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, D),
        "embeddings.position_embeddings": (1, 1 + teacher + PATCHES, D),
        "embeddings.patch_embeddings.projection.weight": (D, CHANNELS, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (D,),
        "layernorm.weight": (D,),
        "layernorm.bias": (D,),
    }
    if teacher:
        shapes["embeddings.distillation_token"] = (1, 1, D)
    for i in range(DEPTH):
        layers = {
            "attention.attention.query": (D, D),
            "attention.attention.key": (D, D),
            "attention.attention.value": (D, D),
            "attention.output.dense": (D, D),
            "intermediate.dense": (MLP, D),
            "output.dense": (D, MLP),
        }
        for name, shape in layers.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
        for name in ("layernorm_before", "layernorm_after"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (D,)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (D,)
    if pooler:
        shapes |= {"pooler.dense.weight": (pooler, D), "pooler.dense.bias": (pooler,)}
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    heads = ("cls_classifier", "distillation_classifier") if teacher else ("classifier",)
    for head in heads if classes else ():
        shapes |= {f"{head}.weight": (classes, D), f"{head}.bias": (classes,)}
    return _random(shapes, seed)


# How the modules of transformers 5 are called in memory; `save_pretrained` writes the old names.
_VERSION_5 = (
    (r"encoder\.layer\.(\d+)\.", r"layers.\1."),
    (r"attention\.attention\.query", "attention.q_proj"),
    (r"attention\.attention\.key", "attention.k_proj"),
    (r"attention\.attention\.value", "attention.v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)


def hf_config(kind: str, **fields: Any) -> dict[str, Any]:
    """The fields of a config.json of transformers that decide about the model."""
    return {
        "model_type": kind,
        "architectures": [kind],
        "hidden_act": "gelu",
        "hidden_size": D,
        "image_size": IMAGE,
        "intermediate_size": MLP,
        "layer_norm_eps": 1e-12,
        "num_attention_heads": HEADS,
        "num_channels": CHANNELS,
        "num_hidden_layers": DEPTH,
        "patch_size": PATCH,
        "qkv_bias": True,
        **fields,
    }


NAMES = {str(i): name for i, name in enumerate(["ant", "bee", "cat", "dog", "eel"])}
PREPROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.25, 0.5, 0.75],
    "image_processor_type": "ViTImageProcessor",
    "image_std": [0.5, 0.25, 0.5],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": IMAGE, "width": IMAGE},
}


def _dinov2(
    prefix: str, *, registers: int = 0, swiglu: bool = False, classes: int = 0, seed: int = 0
) -> Arrays:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, D),
        "embeddings.mask_token": (1, D),
        "embeddings.position_embeddings": (1, 1 + PATCHES, D),
        "embeddings.patch_embeddings.projection.weight": (D, CHANNELS, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (D,),
        "layernorm.weight": (D,),
        "layernorm.bias": (D,),
    }
    if registers:
        shapes["embeddings.register_tokens"] = (1, registers, D)
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}"
        linear = {f"attention.attention.{name}": (D, D) for name in ("query", "key", "value")} | {
            "attention.output.dense": (D, D)
        }
        if swiglu:
            linear |= {"mlp.weights_in": (2 * D, D), "mlp.weights_out": (D, D)}
        else:
            linear |= {"mlp.fc1": (MLP, D), "mlp.fc2": (D, MLP)}
        for name, shape in linear.items():
            shapes[f"{layer}.{name}.weight"] = shape
            shapes[f"{layer}.{name}.bias"] = shape[:1]
        for name in ("norm1", "norm2"):
            shapes |= {f"{layer}.{name}.weight": (D,), f"{layer}.{name}.bias": (D,)}
        shapes |= {f"{layer}.layer_scale{n}.lambda1": (D,) for n in (1, 2)}
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    if classes:
        shapes |= {"classifier.weight": (classes, 2 * D), "classifier.bias": (classes,)}
    return _random(shapes, seed)


def _split_gates(arrays: Arrays) -> Arrays:
    """SwiGLU under the names of transformers 5."""
    out = {}
    for name, value in arrays.items():
        if "weights_in" in name:
            gate, up = value[: len(value) // 2], value[len(value) // 2 :]
            out[name.replace("weights_in", "gate_proj")] = gate
            out[name.replace("weights_in", "up_proj")] = up
        else:
            out[name.replace("weights_out", "down_proj")] = value
    return out


def _vision(prefix: str, *, clip: bool, seed: int) -> Arrays:
    """The vision tower of SigLIP, or of CLIP."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (D, CHANNELS, PATCH, PATCH),
        "embeddings.position_embedding.weight": (clip + PATCHES, D),
    }
    norms = ["post_layernorm"]
    linear: dict[str, tuple[int, int]] = {}
    for i in range(DEPTH):
        layer = f"encoder.layers.{i}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        linear |= {f"{layer}.self_attn.{name}_proj": (D, D) for name in ("k", "v", "q", "out")}
        linear |= {f"{layer}.mlp.fc1": (MLP, D), f"{layer}.mlp.fc2": (D, MLP)}
    if clip:
        shapes["embeddings.class_embedding"] = (D,)
        norms.append("pre_layrnorm")
    else:
        shapes |= {"embeddings.patch_embedding.bias": (D,), "head.probe": (1, 1, D)}
        shapes |= {"head.attention.in_proj_weight": (3 * D, D)}
        shapes |= {"head.attention.in_proj_bias": (3 * D,)}
        norms.append("head.layernorm")
        linear |= {"head.attention.out_proj": (D, D)}
        linear |= {"head.mlp.fc1": (MLP, D), "head.mlp.fc2": (D, MLP)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    return _random({prefix + name: shape for name, shape in shapes.items()}, seed)


def _hf_examples() -> list[Example]:
    base = {**_BASE, "gelu": "erf", "layernorm_eps": 1e-12}
    described = {"preprocessor_config.json": PREPROCESSOR}
    vit = _hf_vit("vit.", seed=41)
    model = _hf_vit("", pooler=D, classes=0, seed=42)
    deit = _hf_vit("deit.", teacher=True, seed=43)
    vit_files = {"config.json": hf_config("vit", id2label=NAMES), **described}

    dino = {**base, "layer_scale": 1e-5, "layernorm_eps": 1e-6}
    dino_config = hf_config("dinov2", layer_norm_eps=1e-6, layerscale_value=1.0)
    del dino_config["intermediate_size"]
    classifier = _dinov2("dinov2.", classes=CLASSES, seed=44)
    registers = _dinov2("", registers=3, seed=45)
    gated = _dinov2("", swiglu=True, seed=46)
    gated_config = {**dino_config, "use_swiglu_ffn": True}
    gated_fields = {**dino, "num_classes": 0, "mlp": "swiglu", "mlp_dim": D, "gelu": "tanh"}

    mae = _hf_vit("vit.", classes=0, seed=47)
    decoder = _random(
        {
            "decoder.mask_token": (1, 1, D),
            "decoder.decoder_pos_embed": (1, 1 + PATCHES, D),
            "decoder.decoder_embed.weight": (D, D),
            "decoder.decoder_layers.0.attention.attention.query.weight": (D, D),
            "decoder.decoder_layers.1.intermediate.dense.bias": (MLP,),
            "decoder.decoder_norm.bias": (D,),
        },
        48,
    )
    siglip = _vision("vision_model.", clip=False, seed=49)
    siglip_config = hf_config("siglip_vision_model", hidden_act="gelu_pytorch_tanh")
    siglip_config["layer_norm_eps"] = 1e-6
    clip = _vision("vision_model.", clip=True, seed=50)
    text = _random(
        {
            "logit_scale": (),
            "text_model.embeddings.token_embedding.weight": (3, D),
            "text_model.encoder.layers.0.self_attn.q_proj.weight": (D, D),
            "text_model.encoder.layers.0.mlp.fc1.bias": (MLP,),
            "text_model.final_layer_norm.weight": (D,),
            "text_projection.weight": (6, D),
            "visual_projection.weight": (6, D),
        },
        51,
    )
    text["vision_model.embeddings.position_ids"] = np.arange(5, dtype=np.int64)[None]
    clip_config = {
        "model_type": "clip",
        "projection_dim": 6,
        "text_config": {"hidden_size": D, "num_attention_heads": 4, "layer_norm_eps": 1.0},
        "vision_config": hf_config(
            "clip_vision_model", hidden_act="quick_gelu", layer_norm_eps=1e-5
        ),
    }
    without = (r"^vision_model\.", "")
    return [
        Example("hf vit", "hf", vit, base, files=vit_files),
        Example(
            "hf vit version 5",
            "hf",
            _renamed(vit, *_VERSION_5),
            base,
            files=vit_files,
            canonical=vit,
        ),
        Example(
            "hf vit pooler",
            "hf",
            model,
            {**base, "num_classes": 0, "representation_size": D},
            files={"config.json": hf_config("vit", pooler_output_size=D)},
        ),
        Example(
            "hf vit alone",  # what the config.json would say is then taken from known models
            "hf",
            vit,
            base,
            known={"num_heads": HEADS},
        ),
        Example(
            "hf deit",
            "hf",
            deit,
            {**base, "distillation": "head"},
            files={"config.json": hf_config("deit", id2label=NAMES)},
        ),
        Example(
            "hf deit version 5",
            "hf",
            _renamed(deit, *_VERSION_5),
            {**base, "distillation": "head"},
            files={"config.json": hf_config("deit", id2label=NAMES)},
            canonical=deit,
        ),
        Example(
            "hf dinov2",
            "hf",
            classifier,
            {**dino, "pool": "token_gap"},
            files={"config.json": dino_config},
            leftover=("dinov2.embeddings.mask_token",),
        ),
        Example(
            "hf dinov2 registers",
            "hf",
            registers,
            {**dino, "num_classes": 0, "registers": 3, "position_prefix": 1},
            files={"config.json": {**dino_config, "model_type": "dinov2_with_registers"}},
            leftover=("embeddings.mask_token",),
        ),
        Example(
            "hf dinov2 swiglu",
            "hf",
            gated,
            gated_fields,
            files={"config.json": gated_config},
            leftover=("embeddings.mask_token",),
        ),
        Example(
            "hf dinov2 swiglu version 5",
            "hf",
            _split_gates(_renamed(gated, *_VERSION_5[1:5])),
            gated_fields,
            files={"config.json": gated_config},
            leftover=("embeddings.mask_token",),
            canonical=gated,
        ),
        Example(
            "hf mae",
            "hf",
            {**mae, **decoder},
            {**base, "num_classes": 0},
            files={"config.json": hf_config("vit_mae")},
            leftover=tuple(decoder),
            canonical=_renamed(mae, (r"^vit\.", "")),
        ),
        Example(
            "hf siglip vision",
            "hf",
            siglip,
            {**_BASE, "pool": "map", "num_classes": 0},
            files={"config.json": siglip_config, **described},
            canonical=_renamed(siglip, without),
        ),
        Example(
            "hf clip",
            "hf",
            {**clip, **text},
            {
                **_BASE,
                "num_classes": 0,
                "gelu": "quick",
                "layernorm_eps": 1e-5,
                "pre_norm": True,
                "patch_bias": False,
            },
            files={"config.json": clip_config},
            leftover=tuple(text),
            canonical=_renamed(clip, without),
        ),
        Example(
            "hf sharded",
            "hf",
            vit,
            base,
            files={"config.json": hf_config("vit", id2label=NAMES)},
            shards=3,
        ),
    ]


def card(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """What `vit_jax.save` writes beside the weights of a model."""
    classes = config.get("num_classes", 1000)
    return {
        "config": dict(config),
        "preprocess": {
            "image_size": [IMAGE, IMAGE],
            "in_channels": CHANNELS,
            "resize": "bicubic_antialias",
            "aspect": "keep",
            "crop": 0.875,
            "resize_dtype": "uint8",
            "mean": [0.25, 0.5, 0.75],
            "std": 0.5,
        },
        "labels": [f"class {i}" for i in range(classes)],
        "fingerprint": "",
        "objective": "sigmoid",
        "position_resize": "bilinear",
        **changes,
    }


def _ours() -> list[Example]:
    shapes = {
        "patch_embed/kernel": (PATCH, PATCH, CHANNELS, D),
        "patch_embed/bias": (D,),
        "cls_token": (1, 1, D),
        "registers": (1, 2, D),
        "pos_embed": (3 + PATCHES, D),
        "blocks/norm1/scale": (DEPTH, D),
        "blocks/norm1/bias": (DEPTH, D),
        "blocks/attention/qkv/kernel": (DEPTH, D, 3, HEADS, D // HEADS),
        "blocks/attention/qkv/bias": (DEPTH, 3, HEADS, D // HEADS),
        "blocks/attention/out/kernel": (DEPTH, HEADS, D // HEADS, D),
        "blocks/attention/out/bias": (DEPTH, D),
        "blocks/norm2/scale": (DEPTH, D),
        "blocks/norm2/bias": (DEPTH, D),
        "blocks/mlp/fc1/kernel": (DEPTH, D, MLP),
        "blocks/mlp/fc1/bias": (DEPTH, MLP),
        "blocks/mlp/fc2/kernel": (DEPTH, MLP, D),
        "blocks/mlp/fc2/bias": (DEPTH, D),
        "norm/scale": (D,),
        "norm/bias": (D,),
        "head/kernel": (D, CLASSES),
        "head/bias": (CLASSES,),
    }
    fields = {**_BASE, "registers": 2, "gelu": "quick", "layernorm_eps": 1e-3, "dropout": 0.25}
    timm = {**_BASE, "gelu": "tanh"}
    google = {**_BASE, "gelu": "erf"}
    arrays = _random(shapes, 61)
    paper = dict(old=True, position=GOOGLE_POSITION, rows=1 + PATCHES, cls=True, seed=63)
    return [
        Example("ours", "vit_jax", arrays, fields, card=card(fields)),
        Example("ours as timm", "timm", _timm(seed=62), timm, card=card(timm)),
        Example("ours as google", "google", _flax("", **paper), google, card=card(google)),
    ]


@functools.cache
def examples() -> dict[str, Example]:
    """All of them, by name."""
    found = [*_google(), *_big_vision(), *_timm_examples(), *_hf_examples(), *_ours()]
    return {example.name: example for example in found}

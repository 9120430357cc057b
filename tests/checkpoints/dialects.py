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
import math
import pathlib
import re
import struct
import types
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]

# Width, MLP and so on of all models here; no two of them are equal, where that can be helped.
D, MLP, HEADS, DEPTH, PATCH, IMAGE, CHANNELS, CLASSES = 8, 12, 2, 2, 4, 8, 3, 5
GRID = IMAGE // PATCH
PATCHES = GRID * GRID
SIZES = dict(image_size=IMAGE, patch_size=PATCH, in_channels=CHANNELS, width=D, depth=DEPTH)
SIZES |= dict(mlp_dim=MLP, num_heads=HEADS)


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

# A line is: what becomes of the arrays (see `_KINDS`), our name, and theirs. `*` is a leaf such as
# "weight" or "bias", {} the number of a block, @ what all names of a block start with, (q,k) stands
# for two names whose arrays make one of ours, | for other spellings. / keeps the prefix away.
_TABLES = {
    "flax": """@ = Transformer/encoderblock_{}/
same  patch_embed                 embedding/*
as    cls_token                   cls
row   pos_embed                   Transformer/posembed_input/pos_embedding | pos_embedding
same  blocks/norm1                @LayerNorm_0/*
side  blocks/attention/qkv        @MultiHeadDotProductAttention_1/(query,key,value)/* \
 | @MultiHeadDotProductAttention_0/(query,key,value)/*
same  blocks/attention/out        @MultiHeadDotProductAttention_1/out/* \
 | @MultiHeadDotProductAttention_0/out/*
same  blocks/norm2                @LayerNorm_2/* | @LayerNorm_1/*
same  blocks/mlp/fc1              @MlpBlock_3/Dense_0/* | @MlpBlock_0/Dense_0/*
same  blocks/mlp/fc2              @MlpBlock_3/Dense_1/* | @MlpBlock_0/Dense_1/*
same  norm                        Transformer/encoder_norm/*
as    attention_pool/probe        MAPHead_0/probe
side  attention_pool/attention/qkv  MAPHead_0/MultiHeadDotProductAttention_0/(query,key,value)/*
same  attention_pool/attention/out  MAPHead_0/MultiHeadDotProductAttention_0/out/*
same  attention_pool/norm         MAPHead_0/LayerNorm_0/*
same  attention_pool/mlp/fc1      MAPHead_0/MlpBlock_0/Dense_0/*
same  attention_pool/mlp/fc2      MAPHead_0/MlpBlock_0/Dense_1/*
same  pre_logits                  pre_logits/*
same  head                        head/*
""",
    "timm": """@ = blocks.{}.
conv  patch_embed                 patch_embed.proj.*
as    cls_token                   cls_token
as    dist_token                  dist_token
as    registers                   reg_token
row   pos_embed                   pos_embed
norm  pre_norm                    norm_pre.*
norm  blocks/norm1                @norm1.*
qkv   blocks/attention/qkv        @attn.qkv.*
out   blocks/attention/out        @attn.proj.*
as    blocks/scale1               @ls1.gamma
norm  blocks/norm2                @norm2.*
lin   blocks/mlp/fc1              @mlp.fc1.*
lin   blocks/mlp/fc2              @mlp.fc2.*
as    blocks/scale2               @ls2.gamma
norm  norm                        norm.* | fc_norm.*
as    attention_pool/probe        attn_pool.latent
qkv   attention_pool/attention/qkv  attn_pool.(q,kv).*
out   attention_pool/attention/out  attn_pool.proj.*
norm  attention_pool/norm         attn_pool.norm.*
lin   attention_pool/mlp/fc1      attn_pool.mlp.fc1.*
lin   attention_pool/mlp/fc2      attn_pool.mlp.fc2.*
lin   head                        head.*
lin   head_dist                   head_dist.*
""",
    # Second spellings are those of transformers 5 in memory; `save_pretrained` writes the first.
    "vit": """@ = encoder.layer.{}.
conv  patch_embed                 embeddings.patch_embeddings.projection.*
as    cls_token                   embeddings.cls_token
as    dist_token                  embeddings.distillation_token
row   pos_embed                   embeddings.position_embeddings
norm  blocks/norm1                @layernorm_before.* | layers.{}.layernorm_before.*
qkv   blocks/attention/qkv        @attention.attention.(query,key,value).* \
 | layers.{}.attention.(q_proj,k_proj,v_proj).*
out   blocks/attention/out        @attention.output.dense.* | layers.{}.attention.o_proj.*
norm  blocks/norm2                @layernorm_after.* | layers.{}.layernorm_after.*
lin   blocks/mlp/fc1              @intermediate.dense.* | layers.{}.mlp.fc1.*
lin   blocks/mlp/fc2              @output.dense.* | layers.{}.mlp.fc2.*
norm  norm                        layernorm.*
lin   pre_logits                  pooler.dense.*
lin   head                        /classifier.* | /cls_classifier.*
lin   head_dist                   /distillation_classifier.*
""",
    "dinov2": """@ = encoder.layer.{}.
conv  patch_embed                 embeddings.patch_embeddings.projection.*
as    cls_token                   embeddings.cls_token
as    registers                   embeddings.register_tokens
row   pos_embed                   embeddings.position_embeddings
norm  blocks/norm1                @norm1.*
qkv   blocks/attention/qkv        @attention.attention.(query,key,value).* \
 | @attention.(q_proj,k_proj,v_proj).*
out   blocks/attention/out        @attention.output.dense.* | @attention.o_proj.*
as    blocks/scale1               @layer_scale1.lambda1
norm  blocks/norm2                @norm2.*
lin   blocks/mlp/fc1              @mlp.fc1.* | @mlp.(gate_proj,up_proj).* | @mlp.weights_in.*
lin   blocks/mlp/fc2              @mlp.fc2.* | @mlp.down_proj.* | @mlp.weights_out.*
as    blocks/scale2               @layer_scale2.lambda1
norm  norm                        layernorm.*
lin   head                        /classifier.*
""",
    "vision": """@ = encoder.layers.{}.
conv  patch_embed                 embeddings.patch_embedding.*
flat  cls_token                   embeddings.class_embedding
as    pos_embed                   embeddings.position_embedding.weight
norm  pre_norm                    pre_layrnorm.*
norm  blocks/norm1                @layer_norm1.*
qkv   blocks/attention/qkv        @self_attn.(q_proj,k_proj,v_proj).*
out   blocks/attention/out        @self_attn.out_proj.*
norm  blocks/norm2                @layer_norm2.*
lin   blocks/mlp/fc1              @mlp.fc1.*
lin   blocks/mlp/fc2              @mlp.fc2.*
norm  norm                        post_layernorm.*
as    attention_pool/probe        head.probe
qkv   attention_pool/attention/qkv  head.attention.in_proj_*
out   attention_pool/attention/out  head.attention.out_proj.*
norm  attention_pool/norm         head.layernorm.*
lin   attention_pool/mlp/fc1      head.mlp.fc1.*
lin   attention_pool/mlp/fc2      head.mlp.fc2.*
""",
}
GOOGLE_POSITION = "Transformer/posembed_input/pos_embedding"
# A name that tells the table, and what may stand before all names: at times nothing.
_MARKS = {
    GOOGLE_POSITION: "flax  opt/target/ params/ target/",
    "Transformer/encoder_norm/scale": "flax params/ params/img/  img/ opt/target/",
    "patch_embed.proj.weight": "timm  model. module.",
    "encoder.layer.0.layer_scale1.lambda1": "dinov2  dinov2. dinov2_with_registers.",
    "embeddings.patch_embedding.weight": "vision  vision_model.",
    "embeddings.patch_embeddings.projection.weight": "vit  vit. deit.",
}
_TORCH = {"weight": "kernel", "bias": "bias"}
# Their leaves and ours of each kind.
_KINDS = {
    "same": {leaf: leaf for leaf in ("kernel", "bias", "scale")},
    "side": {leaf: leaf for leaf in ("kernel", "bias")},
    "norm": {"weight": "scale", "bias": "bias"},
    **dict.fromkeys(("conv", "lin", "qkv", "out"), _TORCH),
    **{kind: {"": ""} for kind in ("as", "row", "flat")},
}


@functools.cache
def _rows(table: str) -> list[tuple[str, str, list[list[str]]]]:
    """Kind, our name, and theirs: spellings of names that are joined."""
    start, *lines = _TABLES[table].splitlines()
    found = []
    for line in lines:
        kind, mine, theirs = line.replace("@", start.removeprefix("@ = ")).split(maxsplit=2)
        spellings = []
        for spelling in theirs.split(" | "):
            parts = re.fullmatch(r"(.*)\((.*)\)(.*)", spelling.strip())
            one = [spelling.strip()]
            spellings.append(
                [parts[1] + p + parts[3] for p in parts[2].split(",")] if parts else one
            )
        found.append((kind, mine, spellings))
    return found


def _forward(kind: str, leaf: str, parts: list[np.ndarray], heads: int) -> np.ndarray:
    """Our array of theirs. Torch's rows are outputs: q's come first, head after head."""
    if kind == "side":  # linen's [d heads head_dim] three times, side by side
        return np.stack(parts, axis=1 if leaf == "kernel" else 0)
    whole = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if kind == "row":
        (whole,) = whole
    elif kind == "flat":
        return whole.reshape(1, 1, -1)
    elif leaf == "kernel" and kind == "conv":
        return whole.transpose(2, 3, 1, 0)
    elif leaf == "kernel" and kind == "lin":
        return whole.T
    elif leaf == "kernel" and kind == "out":
        return whole.T.reshape(heads, len(whole.T) // heads, -1)
    elif kind == "qkv":
        rows = whole.reshape(3, heads, len(whole) // 3 // heads, *whole.shape[1:])
        return np.moveaxis(rows, 3, 0) if leaf == "kernel" else rows
    return whole


def _backward(kind: str, leaf: str, array: np.ndarray, number: int) -> list[np.ndarray]:
    """Their `number` arrays of ours."""
    if kind == "side":
        return list(np.moveaxis(array, 1, 0) if leaf == "kernel" else array)
    if kind == "row":
        array = array[None]
    elif kind == "flat":
        array = array.reshape(-1)
    elif leaf == "kernel" and kind == "conv":
        array = array.transpose(3, 2, 0, 1)
    elif leaf == "kernel" and kind == "out":
        array = array.reshape(-1, array.shape[-1]).T
    elif leaf == "kernel" and kind == "lin":
        array = array.T
    elif kind == "qkv":
        array = np.moveaxis(array, 0, 3) if leaf == "kernel" else array
        array = array.reshape(-1, *array.shape[3:])
        return np.split(array, [len(array) // 3, 2 * len(array) // 3][: number - 1])
    return np.split(array, number) if number > 1 else [array]


def ours(arrays: Arrays, heads: int) -> tuple[Arrays, set[str]]:
    """Our parameters by their paths, and the names of the file that none of them is made of.

    Raises:
      KeyError, ValueError and the like: the arrays are not those of a ViT.
    """
    if "patch_embed/kernel" in arrays:
        return {name: as_float32(value) for name, value in arrays.items()}, set()
    for mark, told in _MARKS.items():
        table, *prefixes = told.split(" ")
        for prefix in prefixes:
            if prefix + mark in arrays:
                return _read(table, prefix, arrays, heads)
    raise KeyError("no dialect")


def _read(table: str, prefix: str, arrays: Arrays, heads: int) -> tuple[Arrays, set[str]]:
    files, arrays = unscanned(arrays)
    taken: set[str] = set()

    def made(kind, mine, names, block):
        """Our leaves of a parameter; of one block, where there is a number for it."""
        out = {}
        names = [n[1:] if n.startswith("/") else prefix + n for n in names]
        for theirs, leaf in _KINDS[kind].items():
            full = [name.format(block).replace("*", theirs) for name in names]
            if full[0] in arrays:
                taken.update(full)
                parts = [as_float32(arrays[name]) for name in full]
                out[f"{mine}/{leaf}".rstrip("/")] = _forward(kind, leaf, parts, heads)
        return out

    found: Arrays = {}
    for kind, mine, spellings in _rows(table):
        for names in spellings:
            if "{}" in names[0]:
                start, end = re.escape(prefix + names[0]).split(r"\{\}")
                numbers = (re.match(start + r"(\d+)" + end[:2], name) for name in arrays)
                depth = max((int(number[1]) + 1 for number in numbers if number), default=0)
                blocks = [made(kind, mine, names, i) for i in range(depth)]
                new = {k: np.stack([b[k] for b in blocks]) for k in (blocks[0] if blocks else ())}
            else:
                new = made(kind, mine, names, None)
            if new:
                found |= new
                break
    return found, {files[name] for name in arrays if name not in taken}


def unscanned(arrays: Arrays) -> tuple[dict[str, str], Arrays]:
    """linen's blocks in one array each as arrays of their own; and from which each of them is."""
    names, out = {}, {}
    for name, value in arrays.items():
        before, inside, leaf = name.partition("Transformer/encoderblock/")
        new = (
            {f"{before}{inside[:-1]}_{i}/{leaf}": v for i, v in enumerate(value)} if inside else {}
        )
        out |= new or {name: value}
        names |= dict.fromkeys(new or [name], name)
    return names, out


def scanned(arrays: Arrays) -> Arrays:
    """The inverse."""
    out = {
        re.sub(r"encoderblock_\d+", "encoderblock", name): value for name, value in arrays.items()
    }
    for name in out:
        if "encoderblock/" in name:
            each = (name.replace("encoderblock", f"encoderblock_{i}") for i in range(DEPTH))
            out[name] = np.stack([arrays[part] for part in each])
    return out


# -- Parameters ----------------------------------------------------------------------------------


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Our parameters of a ViT of these fields, those that are left out as by default."""
    c = types.SimpleNamespace(**{**_DEFAULTS, **config})
    d, heads, classes = c.width, c.num_heads, c.num_classes
    (ih, iw), (ph, pw) = (
        each if isinstance(each, tuple) else (each, each) for each in (c.image_size, c.patch_size)
    )
    patches = (ih // ph) * (iw // pw)

    def dense(name, inputs, outputs):
        return {f"{name}/kernel": (inputs, outputs), f"{name}/bias": (outputs,)}

    def norm(name):
        return {f"{name}/scale": (d,), f"{name}/bias": (d,)}

    def attention(name):
        out = {f"{name}/qkv/kernel": (d, 3, heads, d // heads)}
        out |= {f"{name}/qkv/bias": (3, heads, d // heads)} if c.qkv_bias else {}
        return out | {f"{name}/out/kernel": (heads, d // heads, d), f"{name}/out/bias": (d,)}

    def mlp(name):
        hidden = c.mlp_dim * (2 if c.mlp == "swiglu" else 1)
        return dense(f"{name}/fc1", d, hidden) | dense(f"{name}/fc2", c.mlp_dim, d)

    token = "token" in c.pool if c.class_token is None else c.class_token
    prefix = {"cls_token": token, "dist_token": c.distillation != "none", "registers": c.registers}
    rows = sum(prefix.values()) if c.position_prefix is None else c.position_prefix
    out = {"patch_embed/kernel": (ph, pw, c.in_channels, d)}
    out |= {"patch_embed/bias": (d,)} if c.patch_bias else {}
    out |= {name: (1, int(number), d) for name, number in prefix.items() if number}
    out |= {"pos_embed": (rows + patches, d)} if c.position == "learned" else {}
    out |= norm("pre_norm") if c.pre_norm else {}
    block = norm("norm1") | attention("attention") | norm("norm2") | mlp("mlp")
    block |= {"scale1": (d,), "scale2": (d,)} if c.layer_scale is not None else {}
    out |= {f"blocks/{name}": (c.depth, *shape) for name, shape in block.items()}
    out |= norm("norm")
    if c.pool == "map":
        pool = attention("attention") | norm("norm") | mlp("mlp") | {"probe": (1, 1, d)}
        out |= {f"attention_pool/{name}": shape for name, shape in pool.items()}
    pooled = d * (2 if c.pool == "token_gap" else 1)
    if c.representation_size:
        out |= dense("pre_logits", pooled, c.representation_size)
        pooled = c.representation_size
    if classes:
        out |= dense("head", pooled, classes)
        out |= dense("head_dist", pooled, classes) if c.distillation == "head" else {}
    return out


_DEFAULTS = dict(
    pool="token", class_token=None, distillation="none", registers=0, position="learned",
    position_prefix=None, qkv_bias=True, patch_bias=True, pre_norm=False, layer_scale=None,
    mlp="gelu", representation_size=None,
)  # fmt: skip


def count(config: Any) -> int:
    """Parameters of a ViTConfig."""
    return sum(math.prod(shape) for shape in shapes(dataclasses.asdict(config)).values())


def _random(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Arrays:
    """Values that float16 and bfloat16 hold exactly, so that one example serves all types."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.integers(-127, 128, shape) / 64).astype(np.float32)
        for name, shape in shapes.items()
    }


def spelt(
    table: str, fields: Mapping[str, Any], *, prefix: str = "", nth: int = 0, seed: int = 0
) -> Arrays:
    """Random arrays of a model under a table's names, in its first or another spelling."""
    params, out = _random(shapes({**_BASE, **fields}), seed), {}
    for kind, mine, spellings in _rows(table):
        names = spellings[min(nth, len(spellings) - 1)]
        names = [n[1:] if n.startswith("/") else prefix + n for n in names]
        for theirs, leaf in _KINDS[kind].items():
            array = params.pop(f"{mine}/{leaf}".rstrip("/"), None)
            if array is None:
                continue
            for block in range(DEPTH) if "{}" in names[0] else [None]:
                one = array if block is None else array[block]
                full = [name.format(block).replace("*", theirs) for name in names]
                out |= zip(full, _backward(kind, leaf, one, len(names)), strict=True)
    assert not params, params.keys()
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


# -- The examples --------------------------------------------------------------------------------

_BASE = {**SIZES, "num_classes": CLASSES}  # gelu tanh and epsilon 1e-6 are the defaults
_LINEN = (("MlpBlock_3", "MlpBlock_0"), ("LayerNorm_2", "LayerNorm_1"))
_LINEN += (("Attention_1", "Attention_0"),)
_GATED = (("mlp.fc1", "mlp.weights_in"), ("mlp.fc2", "mlp.weights_out"))


def renamed(arrays: Arrays, *changes: tuple[str, str]) -> Arrays:
    """The arrays with regular expressions replaced in their names, one after the other."""
    for pattern, new in changes:
        arrays = {re.sub(pattern, new, name): value for name, value in arrays.items()}
    return arrays


def bfloat16(arrays: Arrays) -> Arrays:
    """As NumPy saves bfloat16: two bytes of no type."""
    return {
        name: (np.ascontiguousarray(value).view(np.uint32) >> 16).astype(np.uint16).view("V2")
        for name, value in arrays.items()
    }


def made(
    name: str,
    format: str,
    fields: Mapping[str, Any],
    *,
    table: str = "",
    prefix: str = "",
    back: str | None = None,
    nth: int | None = None,
    changes: tuple[tuple[str, str], ...] = (),
    kept: tuple[tuple[str, str], ...] = (),
    packed: Callable[[Arrays], Arrays] = lambda arrays: arrays,
    beside: Arrays | None = None,
    **more: Any,
) -> Example:
    """An example: `prefix`, the `nth` spelling and `changes` are the file's, `kept` stays.

    Args:
      back: the prefix of what is written back.
      packed: what is done to the arrays at last.
      beside: arrays that are no part of the model.
    """
    table = table or {"timm": "timm", "hf": "vit"}.get(format, "flax")
    usual, seed = int(format == "big_vision"), zlib.crc32(name.encode())
    arrays = spelt(table, fields, prefix=prefix, nth=usual if nth is None else nth, seed=seed)
    back = prefix if back is None else back
    back = spelt(table, fields, prefix=back, nth=usual, seed=seed)
    beside = beside or {}
    return Example(
        name,
        format,
        packed(renamed(arrays, *kept, *changes)) | beside,
        {**_BASE, **fields},
        leftover=tuple(beside),
        canonical=renamed(back, *kept),
        **more,
    )


def _google() -> list[Example]:
    step = {"opt/state/step": np.asarray(7, np.int32)}
    hidden = {"representation_size": 6}
    return [
        made("google paper", "google", {}),
        made("google opt/target", "google", hidden, prefix="opt/target/", back="", beside=step),
        made("google linen gap", "google", {"pool": "gap"}, changes=_LINEN),
        made("google no head", "google", {"num_classes": 0}),
    ]


def _big_vision() -> list[Example]:
    text = _random({f"params/txt/{name}": (3, 2) for name in ("head/kernel", "Embed_0/x")})
    text |= _random({"params/t": (1,), "params/b": (1,)})
    gap, attention = {"pool": "gap"}, {"pool": "map"}
    fixed = {**gap, "position": "sincos2d", "representation_size": 6}
    img = dict(prefix="params/img/", back="params/")

    def big_vision(name, fields, prefix="params/", **more):
        return made(f"big_vision {name}", "big_vision", fields, prefix=prefix, **more)

    return [
        big_vision("token", {"position_prefix": 0}),
        big_vision("scanned", gap, packed=scanned),
        big_vision("map", {**attention, "num_classes": 0}),
        big_vision("sincos2d", fixed, known={"image_size": IMAGE}),
        big_vision("two towers", attention, **img, beside=text),
        big_vision("bfloat16", gap, prefix="", back="params/", packed=bfloat16),
    ]


def timm_config(architecture: str, **args: Any) -> dict[str, dict]:
    """The config.json that timm pushes to the hub beside model.safetensors."""
    args = dict(img_size=IMAGE, num_heads=HEADS) | args
    described = dict(tag="augreg", input_size=[3, IMAGE, IMAGE], fixed_input_size=True)
    described |= dict(interpolation="bicubic", crop_pct=0.9, crop_mode="center", mean=[0.5] * 3)
    described |= dict(std=[0.5] * 3, num_classes=CLASSES, first_conv="patch_embed.proj")
    described |= dict(classifier="head")
    config = dict(architecture=architecture, num_classes=CLASSES, num_features=D)
    config |= dict(global_pool="token", model_args=args, pretrained_cfg=described)
    return {"config.json": config}


def _timm() -> list[Example]:
    scale = {"layer_scale": 1e-5}
    swiglu = {"mlp": "swiglu", "mlp_dim": MLP // 2, "gelu": "tanh", **scale}
    pre_norm = {"pre_norm": True, "patch_bias": False, "layernorm_eps": 1e-5}
    after = {"pool": "gap", "norm_after_pool": True}

    def timm(name, fields, known=(("num_heads", HEADS),), **more):
        fields = {"gelu": "erf", **fields}
        return made(f"timm {name}", "timm", fields, known=dict(known), **more)

    return [
        timm("plain", {}),
        timm("fc_norm", after, kept=((r"^norm\.", "fc_norm."),)),
        timm("map", {"pool": "map", "num_classes": 0}),
        timm("distilled", {"distillation": "head"}),
        timm("layer scale", scale),
        timm("registers", {"registers": 3, "position_prefix": 0, **scale}),
        timm("pre_norm", pre_norm),
        timm("swiglu", swiglu),
        timm("no qkv bias", {"qkv_bias": False}),
        timm("folder", {}, known=(), files=timm_config("vit_tiny_patch16_224")),
    ]


def hf_config(kind: str, **fields: Any) -> dict[str, Any]:
    """The fields of a config.json of transformers that decide about the model."""
    config = dict(model_type=kind, architectures=[kind], hidden_act="gelu", hidden_size=D)
    config |= dict(image_size=IMAGE, intermediate_size=MLP, layer_norm_eps=1e-12)
    config |= dict(num_attention_heads=HEADS, num_channels=CHANNELS, num_hidden_layers=DEPTH)
    return config | dict(patch_size=PATCH, qkv_bias=True) | fields


NAMES = {str(i): name for i, name in enumerate(["ant", "bee", "cat", "dog", "eel"])}
PREPROCESSOR = dict(do_normalize=True, do_rescale=True, do_resize=True, resample=2)
PREPROCESSOR |= dict(image_mean=[0.25, 0.5, 0.75], image_std=[0.5, 0.25, 0.5])
PREPROCESSOR |= dict(image_processor_type="ViTImageProcessor", rescale_factor=0.00392156862745098)
PREPROCESSOR["size"] = {"height": IMAGE, "width": IMAGE}


def _hf() -> list[Example]:
    described = {"preprocessor_config.json": PREPROCESSOR}
    vit = {"config.json": hf_config("vit", id2label=NAMES)}
    deit = {"config.json": hf_config("deit", id2label=NAMES)}
    teacher = dict(prefix="deit.", files=deit, kept=((r"^classifier", "cls_classifier"),))
    headless, tanh = {"num_classes": 0}, {"gelu": "tanh"}

    dino = {"layer_scale": 1e-5, "layernorm_eps": 1e-6}
    dino_config = hf_config("dinov2", layer_norm_eps=1e-6, layerscale_value=1.0)
    del dino_config["intermediate_size"]
    with_registers = {"config.json": {**dino_config, "model_type": "dinov2_with_registers"}}
    registers = {**dino, **headless, "registers": 3, "position_prefix": 1}
    swiglu = {**dino, **headless, **tanh, "mlp": "swiglu", "mlp_dim": D}
    gated = {"config.json": {**dino_config, "use_swiglu_ffn": True}}

    decoder = {"mask_token": (1, 1, D), "decoder_pos_embed": (1, 1 + PATCHES, D)}
    decoder |= {"decoder_embed.weight": (D, D), "decoder_norm.bias": (D,)}
    decoder["decoder_layers.0.attention.attention.query.weight"] = (D, D)
    decoder["decoder_layers.1.intermediate.dense.bias"] = (MLP,)
    decoder = _random({f"decoder.{name}": shape for name, shape in decoder.items()})
    siglip_config = hf_config("siglip_vision_model", hidden_act="gelu_pytorch_tanh")
    siglip_config["layer_norm_eps"] = 1e-6
    siglip = {**headless, **tanh, "pool": "map", "layernorm_eps": 1e-6}
    text = {"embeddings.token_embedding.weight": (3, D), "final_layer_norm.weight": (D,)}
    text |= {"encoder.layers.0.self_attn.q_proj.weight": (D, D)}
    text |= {"encoder.layers.0.mlp.fc1.bias": (MLP,)}
    text = {f"text_model.{name}": shape for name, shape in text.items()}
    text |= {f"{name}_projection.weight": (6, D) for name in ("text", "visual")}
    text = _random({"logit_scale": (), **text})
    text["vision_model.embeddings.position_ids"] = np.arange(5, dtype=np.int64)[None]
    clip = {**headless, "gelu": "quick", "layernorm_eps": 1e-5}
    clip |= {"pre_norm": True, "patch_bias": False}
    vision = hf_config("clip_vision_model", hidden_act="quick_gelu", layer_norm_eps=1e-5)
    clip_config = {
        "model_type": "clip",
        "projection_dim": 6,
        "text_config": {"hidden_size": D, "num_attention_heads": 4, "layer_norm_eps": 1.0},
        "vision_config": vision,
    }
    tower = dict(table="vision", prefix="vision_model.", back="")

    def hf(name, fields=types.MappingProxyType({}), **more):
        if isinstance(more.get("files"), str):
            more["files"] = {"config.json": hf_config(more["files"])}
        return made(f"hf {name}", "hf", {"gelu": "erf", "layernorm_eps": 1e-12, **fields}, **more)

    def dinov2(name, fields, config, prefix="", **more):
        mask = _random({f"{prefix}embeddings.mask_token": (1, D)})
        more |= dict(table="dinov2", prefix=prefix, files=config, beside=mask)
        return hf(f"dinov2{name}", fields, **more)

    pooler = {"config.json": hf_config("vit", pooler_output_size=D)}
    return [
        hf("vit", prefix="vit.", files={**vit, **described}),
        hf("vit version 5", prefix="vit.", nth=1, changes=_V5_HEAD, files={**vit, **described}),
        hf("vit pooler", {**headless, "representation_size": D}, files=pooler),
        # What the config.json would say is then taken from known models.
        hf("vit alone", prefix="vit.", known={"num_heads": HEADS}),
        hf("deit", {"distillation": "head"}, **teacher),
        hf("deit version 5", {"distillation": "head"}, nth=1, **teacher),
        dinov2("", {**dino, "pool": "token_gap"}, {"config.json": dino_config}, "dinov2."),
        dinov2(" registers", registers, with_registers),
        dinov2(" swiglu", swiglu, gated, kept=_GATED),
        dinov2(" swiglu version 5", swiglu, gated, nth=1, kept=_GATED),
        hf("mae", headless, prefix="vit.", back="", files="vit_mae", beside=decoder),
        hf("siglip vision", siglip, **tower, files={"config.json": siglip_config, **described}),
        hf("clip", clip, **tower, files={"config.json": clip_config}, beside=text),
        hf("sharded", prefix="vit.", files=vit, shards=3),
    ]


_V5_HEAD = ((r"^cls_classifier", "classifier"),)  # which `nth` would take for DeiT's


def card(config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """What `vit_jax.save` writes beside the weights of a model."""
    preprocess = dict(image_size=[IMAGE, IMAGE], in_channels=CHANNELS, resize="bicubic_antialias")
    preprocess |= dict(aspect="keep", crop=0.875, resize_dtype="uint8", mean=[0.25, 0.5, 0.75])
    labels = [f"class {i}" for i in range(config.get("num_classes", 1000))]
    said = dict(config=dict(config), preprocess=preprocess | {"std": 0.5}, labels=labels)
    said |= dict(fingerprint="", objective="sigmoid", position_resize="bilinear")
    return said | changes


def _ours() -> list[Example]:
    fields = {**_BASE, "registers": 2, "gelu": "quick", "layernorm_eps": 1e-3, "dropout": 0.25}
    timm, google = {**_BASE, "gelu": "tanh"}, {**_BASE, "gelu": "erf"}
    return [
        Example("ours", "vit_jax", _random(shapes(fields), 1), fields, card=card(fields)),
        made("ours as timm", "timm", timm, card=card(timm)),
        made("ours as google", "google", google, card=card(google)),
    ]


@functools.cache
def examples() -> dict[str, Example]:
    """All of them, by name."""
    found = [*_google(), *_big_vision(), *_timm(), *_hf(), *_ours()]
    return {example.name: example for example in found}

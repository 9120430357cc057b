"""Labels of ImageNet, published checkpoints, and how they get onto this disk."""

import csv
import fnmatch
import importlib
import logging
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import types

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from vit_jax.checkpoints import published as module
from vit_jax.checkpoints.published import AUGREG, fetch, published
from vit_jax.data.labels import imagenet_labels, imagenet_synsets
from vit_jax.errors import UserError
from vit_jax.models.variants import variant

ROOT = pathlib.Path(__file__).parents[2]
REGISTRY = importlib.import_module("fsspec.registry")._registry


def test_labels_are_those_of_imagenet():
    names, ids = imagenet_labels(), imagenet_synsets()
    assert len(names) == len(set(names)) == len(ids) == len(set(ids)) == 1000
    assert ids == tuple(sorted(ids)) and imagenet_labels() is names
    for index, synset, name in [
        (0, "n01440764", "tench, Tinca tinca"),
        (1, "n01443537", "goldfish, Carassius auratus"),
        (207, "n02099601", "golden retriever"),
        (281, "n02123045", "tabby, tabby cat"),
        (134, "n02012849", "crane [n02012849]"),
        (517, "n03126707", "crane [n03126707]"),
        (999, "n15075141", "toilet tissue, toilet paper, bathroom tissue"),
    ]:
        assert (ids[index], names[index]) == (synset, name)


def test_labels_are_in_the_wheel(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    patterns = given["package_data"]["vit_jax.data"]
    assert "vit_jax.data" in given["packages"]
    assert any(fnmatch.fnmatch("imagenet_labels.txt", pattern) for pattern in patterns)


@pytest.fixture
def store(monkeypatch, tmp_path):
    """An empty store, memory://, and an empty cache; `copied` lists what was copied from it."""
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    copied, get_file = [], MemoryFileSystem.get_file

    def counted(self, remote, *args, **kwargs):
        copied.append(remote)
        return get_file(self, remote, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    fs = fsspec.filesystem("memory")
    return types.SimpleNamespace(put=fs.pipe_file, copied=copied, cache=tmp_path / "cache")


def unreachable(monkeypatch):
    def info(self, path):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(MemoryFileSystem, "info", info)


def test_what_is_local_or_a_folder_stays_as_it_is(tmp_path):
    for path in ("runs/mine", "weights.npz", "C:\\weights.npz", ""):
        assert fetch(path) == path
    assert fetch(tmp_path / "x.npz") == str(tmp_path / "x.npz")


def test_a_file_is_copied_once_with_what_describes_it(store):
    store.put("/bucket/a+b/x.npz", b"weights")
    store.put("/bucket/a+b/x.json", b'{"pool": "gap"}')
    local = pathlib.Path(fetch("memory://bucket/a+b/x.npz"))
    assert local == store.cache / "memory" / "bucket" / "a+b" / "x.npz"
    assert local.read_bytes() == b"weights"
    assert local.with_suffix(".json").read_bytes() == b'{"pool": "gap"}'

    # The weights not again; their description again, since it may change and stay as long.
    store.put("/bucket/a+b/x.json", b'{"pool": "map"}')
    store.copied.clear()
    assert fetch("memory://bucket/a+b/x.npz") == str(local)
    assert store.copied == ["/bucket/a+b/x.json"]
    assert local.with_suffix(".json").read_bytes() == b'{"pool": "map"}'

    store.put("/bucket/a+b/x.npz", b"other weights")
    fetch("memory://bucket/a+b/x.npz")
    assert local.read_bytes() == b"other weights"
    assert sorted(path.name for path in local.parent.iterdir()) == ["x.json", "x.npz"]


def test_no_two_urls_share_a_file_and_none_leaves_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    urls = [
        "gs://a/b.npz",
        "gs://a//b.npz",
        "gs://a/../b.npz",
        "gs://a/%2E%2E/b.npz",
        "s3://a/b.npz",
    ]
    urls += ["gs://../../../b.npz", "gs://a/./b.npz", "gs://a/%/b.npz", "gs://a%2Fb.npz"]
    paths = [module._cache_path(url) for url in urls]
    assert len(set(paths)) == len(urls)
    assert all(pathlib.Path(os.path.normpath(path)).is_relative_to(tmp_path) for path in paths)
    monkeypatch.delenv("VIT_JAX_CACHE")
    home = pathlib.Path.home() / ".cache" / "vit_jax"
    assert module._cache_path("gs://a/b.npz") == home / "gs" / "a" / "b.npz"


def test_a_kill_leaves_no_half_a_file(store):
    code = """
import os, signal, sys, fsspec
from fsspec.implementations.memory import MemoryFileSystem
from vit_jax.checkpoints.published import fetch
def get_file(self, remote, local, **kwargs):
    with open(local, "wb") as file:
        file.write(b"weig")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
fsspec.filesystem("memory").pipe_file("/bucket/x.npz", b"weights")
MemoryFileSystem.get_file = get_file
fetch("memory://bucket/x.npz")
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    folder = store.cache / "memory" / "bucket"
    (part,) = folder.iterdir()
    assert part.suffix == ".part" and part.read_bytes() == b"weig"

    store.put("/bucket/x.npz", b"weights")
    assert pathlib.Path(fetch("memory://bucket/x.npz")).read_bytes() == b"weights"
    assert part.exists()  # it might be somebody's who is at it
    os.utime(part, (0, 0))
    store.put("/bucket/x.npz", b"newer weights")
    fetch("memory://bucket/x.npz")
    assert [path.name for path in folder.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("reset by peer"), None])
def test_an_interrupted_copy_is_no_copy(store, monkeypatch, error):
    def get_file(self, remote, local, **kwargs):
        pathlib.Path(local).write_bytes(b"weig")
        if error:
            raise error

    store.put("/bucket/x.npz", b"weights")
    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    kind, message = (UserError, r"4 of 7 bytes came|reset by peer")
    if error is KeyboardInterrupt:
        kind, message = KeyboardInterrupt, None
    with pytest.raises(kind, match=message):
        fetch("memory://bucket/x.npz")
    assert not list((store.cache / "memory" / "bucket").iterdir())


def test_without_the_store_the_copy_serves(store, monkeypatch, caplog):
    store.put("/bucket/x.npz", b"weights")
    local = fetch("memory://bucket/x.npz")
    unreachable(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert fetch("memory://bucket/x.npz") == local
    assert "no route to host); using the copy of it in" in caplog.text
    with pytest.raises(UserError, match=r"y.npz could not be fetched .*no route to host.*by hand"):
        fetch("memory://bucket/y.npz")


def test_what_is_not_there_is_said(store):
    with pytest.raises(UserError, match=r"could not be fetched \(FileNotFoundError"):
        fetch("memory://bucket/none.npz")
    with pytest.raises(UserError, match="Protocol not known: nowhere"):
        fetch("nowhere://bucket/none.npz")
    assert not store.cache.exists()


def test_google_without_gcsfs(store, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(REGISTRY, "gs", raising=False)
    url = "gs://vit_models/imagenet21k+imagenet2012/ViT-B_16.npz"
    with pytest.raises(UserError) as caught:
        fetch(url)
    assert "[gcs]'. To fetch it by hand" in str(caught.value)
    address = "https://storage.googleapis.com/vit_models/imagenet21k%2Bimagenet2012/ViT-B_16.npz"
    assert address in str(caught.value)
    local = module._cache_path(url)
    local.parent.mkdir(parents=True)
    local.write_bytes(b"weights")
    assert fetch(url) == str(local) and "using the copy" in caplog.text


def test_google_out_of_reach_is_not_waited_for(store, monkeypatch):
    def getaddrinfo(host, port):
        raise OSError(f"no {host}")

    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setitem(REGISTRY, "gs", Bucket)
    monkeypatch.setattr(module.socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(UserError, match=r"\(OSError: no storage.googleapis.com\)"):
        fetch("gs://bucket/x.npz")


class Bucket(MemoryFileSystem):
    """Refuses anybody without credentials to read gs://private, the way gcsfs does."""

    protocol = "gs"
    cachable = False
    tokens: list = []  # noqa: RUF012

    def __init__(self, token=None, **_):
        super().__init__()
        self.token = token
        Bucket.tokens.append(token)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").lstrip("/")

    def info(self, path, **kwargs):
        if "private" in path and self.token == "anon":
            raise OSError(f"Forbidden: {path}\nAnonymous caller")
        if path.endswith("listless/x.json"):
            raise OSError(f"Forbidden: {path}\nmust not list, so who knows whether it is there")
        return super().info(path, **kwargs)


def test_google_is_asked_anonymously_first(store, monkeypatch):
    monkeypatch.setitem(REGISTRY, "gs", Bucket)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "this one")
    for folder, tokens in [
        ("public", ["anon"]),
        ("private", ["anon", None]),
        ("listless", ["anon"]),
    ]:
        Bucket.tokens.clear()
        store.put(f"/{folder}/x.npz", b"weights")
        assert pathlib.Path(fetch(f"gs://{folder}/x.npz")).read_bytes() == b"weights"
        assert Bucket.tokens == tokens


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A huggingface_hub that hands out `tmp_path`, or raises `error`; `asked` is what it was."""
    fake = types.ModuleType("huggingface_hub")
    fake.asked, fake.error = [], None

    def answer(*args, **kwargs):
        fake.asked.append((*args, kwargs))
        if fake.error:
            raise fake.error
        return str(tmp_path)

    fake.snapshot_download = answer
    fake.hf_hub_download = answer
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_hub_folders_and_files(hub, tmp_path):
    (tmp_path / "model.safetensors").touch()
    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.npz"]
    for path, repo, revision in [
        ("hf:google/vit-base-patch16-224", "google/vit-base-patch16-224", None),
        ("hf://google/vit", "google/vit", None),
        ("hf:timm/vit.augreg2_in21k@v1.0", "timm/vit.augreg2_in21k", "v1.0"),
        ("hf:facebook/deit@refs/pr/3", "facebook/deit", "refs/pr/3"),
    ]:
        assert fetch(path) == str(tmp_path)
        assert hub.asked.pop() == (repo, {"revision": revision, "allow_patterns": patterns})
    for path, repo, file, revision in [
        ("hf:a/b/c.npz", "a/b", "c.npz", None),
        ("hf:a/b@main/c/d.npz", "a/b", "c/d.npz", "main"),
        ("hf:a/b@refs/pr/3/c.npz", "a/b", "c.npz", "refs/pr/3"),
    ]:
        assert fetch(path) == str(tmp_path)
        assert hub.asked.pop() == (repo, file, {"revision": revision})


@pytest.mark.parametrize("path", ["hf:", "hf:vit", "hf:a/b@", "hf:a/b/", "hf:a/b@c@d", "hf:@x/y"])
def test_what_is_no_name_on_the_hub(hub, path):
    with pytest.raises(UserError, match="expected hf:OWNER/NAME"):
        fetch(path)
    assert not hub.asked


def test_hub_errors_say_how_to_do_it_by_hand(hub, monkeypatch):
    class GatedRepoError(Exception):
        pass

    for error in (GatedRepoError("403\n\nask for access"), ValueError("bad"), OSError("offline")):
        hub.error = error
        with pytest.raises(UserError) as caught:
            fetch("hf:a/b@v2")
        message = str(caught.value)
        assert type(error).__name__ in message and "https://huggingface.co/a/b/tree/v2" in message
        for part in ("model.safetensors", "config.json", "preprocessor_config.json", "(FOLDER)"):
            assert part in message
    with pytest.raises(UserError, match=r"put c.npz from https://huggingface.co/a/b/tree/main "):
        fetch("hf:a/b/c.npz")
    hub.error = None
    with pytest.raises(UserError, match=r"no .safetensors or .npz file.*a/b/discussions"):
        fetch("hf:a/b")  # nothing but pickled weights came
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"\[hub\]'.*/a/b/tree/main"):
        fetch("hf:a/b")


def test_the_table():
    table = published()
    assert len({entry.name for entry in table}) == len({entry.path for entry in table})
    assert len({entry.name for entry in table}) == len(table) > 40
    for entry in table:
        assert variant(entry.variant, image_size=entry.image_size).num_classes == 1000
        assert entry.path.startswith(("gs://", "hf:")) and entry.source
        assert entry.path.endswith(".npz") == entry.path.startswith("gs://")
        assert entry.top1 is None or 70 < entry.top1 < 90
        assert entry.name.startswith(entry.variant + " ")
    by_name = {entry.name: entry for entry in table}
    assert by_name["B/16 augreg i21k -> imagenet 384"] == module.Published(
        "B/16 augreg i21k -> imagenet 384",
        f"{AUGREG}/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
        "--imagenet2012-steps_20k-lr_0.03-res_384.npz",
        *("B/16", "i21k", 384, 85.49, "google-research/vision_transformer README"),
    )
    assert by_name["L/16 vit i21k -> imagenet 384"].top1 == 85.15
    assert by_name["B/16 vit i21k"].path == "gs://vit_models/imagenet21k/ViT-B_16.npz"
    assert by_name["B/16 vit i21k -> imagenet 224"].path.endswith("2012/ViT-B_16-224.npz")
    assert by_name["B/14 facebook/dinov2-base"].top1 is None  # it has no head
    assert {entry.path for entry in published(variant="H/14")} == {
        "gs://vit_models/imagenet21k/ViT-H_14.npz"
    }
    assert {entry.image_size for entry in published(variant="B/16", image_size=384)} == {384}
    with pytest.raises(UserError, match=r"has variant 'B/17'; did you mean 'B/1"):
        published(variant="B/17")
    with pytest.raises(UserError, match="needs an index"):
        published(adapted="imagenet2012")


COLUMNS = (
    "name ds epochs lr aug wd do sd best_val final_val final_test adapt_ds adapt_lr adapt_steps "
    "adapt_resolution adapt_final_val adapt_final_test params infer_samples_per_sec filename "
    "adapt_filename"
).split()


def row(filename, final_val, adapt_ds, size, adapt_final_val, adapt_final_test, **more):
    ds = filename.split("-")[1]
    adapted = f"{filename}--{adapt_ds}-res_{size}-{adapt_final_val}"
    values = dict(name="B/16", ds=ds, final_val=final_val, final_test="0.7123", adapt_ds=adapt_ds)
    values |= dict(adapt_resolution=size, adapt_final_val=adapt_final_val, filename=filename)
    values |= dict(adapt_final_test=adapt_final_test, adapt_filename=adapted)
    return dict.fromkeys(COLUMNS, "") | values | more


ROWS = [
    row("B_16-i21k-low", "0.40", "imagenet2012", 384, "0.90", "0.8700"),
    row("B_16-i21k-low", "0.40", "imagenet2012", 224, "0.89", "0.8600"),
    row("B_16-i21k-best", "0.48", "imagenet2012", 224, "0.84", "0.8412"),
    row("B_16-i21k-best", "0.48", "imagenet2012", 384, "0.86", "0.85486"),
    row("B_16-i21k-best", "0.48", "cifar100", 384, "0.91", "0.92"),
    row("B_16-i21k-tie", "0.48", "imagenet2012", 384, "0.86", "0.85"),
    row("B_16-i21k-unknown", "", "imagenet2012", 384, "0.99", ""),
    row("B_16-i1k-a", "0.78", "imagenet2012", 224, "0.80", "0.79"),
    row("B_16-i21k_30-a", "0.47", "imagenet2012", 224, "0.83", "0.84"),
    row("L_16-i21k-a", "0.49", "imagenet2012", 384, "0.87", "0.8559", name="L/16"),
    row("R50_L_32-i21k-a", "0.50", "imagenet2012", 384, "0.88", "0.86", name="R50+L/32"),
]


def write(path, rows=ROWS, columns=COLUMNS):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_an_index_is_sorted_by_upstream_accuracy(tmp_path):
    index = write(tmp_path / "index.csv")
    found = published(index, variant="B/16", pretraining="i21k", adapted="imagenet2012")
    assert [(entry.path.removeprefix(f"{AUGREG}/B_16-i21k-"), entry.top1) for entry in found] == [
        # Not "low", although it is the best downstream; the tie as in the file.
        ("best--imagenet2012-res_384-0.86.npz", 85.486),
        ("tie--imagenet2012-res_384-0.86.npz", 85.0),
        ("best--imagenet2012-res_224-0.84.npz", 84.12),
        ("low--imagenet2012-res_384-0.90.npz", 87.0),
        ("low--imagenet2012-res_224-0.89.npz", 86.0),
        ("unknown--imagenet2012-res_384-0.99.npz", None),
    ]
    assert {(entry.variant, entry.pretraining) for entry in found} == {("B/16", "i21k")}
    small = published(str(index), variant="B/16", adapted="imagenet2012", image_size=224)
    assert [entry.pretraining for entry in small] == ["i1k", "i21k", "i21k_30", "i21k"]

    found = published(index, variant="B/16", pretraining="i21k", folder=tmp_path)
    assert [entry.path for entry in found] == [
        f"{tmp_path}/B_16-i21k-{name}.npz" for name in ("best", "tie", "low", "unknown")
    ]
    assert {(entry.image_size, entry.top1) for entry in found} == {(224, None)}
    assert published(index, pretraining="i1k")[0].top1 == 71.23  # its head is ImageNet-1k's
    assert published(index)[1].variant == "R50+L/32"  # behind i1k's validation accuracy
    (cifar,) = published(index, adapted="cifar100")
    assert cifar.top1 is None and cifar.image_size == 384
    assert len({entry.name for entry in published(index)}) == len(published(index))


def test_an_index_in_a_store(store, tmp_path):
    store.put("/bucket/index.csv", write(tmp_path / "index.csv").read_bytes())
    store.put("/bucket/index.json", b"{}")
    assert published("memory://bucket/index.csv") == published(tmp_path / "index.csv")
    assert store.copied == ["/bucket/index.csv"]


def test_what_is_wrong_with_an_index_is_said(tmp_path):
    index = write(tmp_path / "index.csv")
    with pytest.raises(UserError, match=r"has variant 'B/61'; did you mean 'B/16'"):
        published(index, variant="B/61")
    with pytest.raises(UserError, match=r"has pretraining 'i22k'; did you mean 'i21k'"):
        published(index, pretraining="i22k")
    with pytest.raises(UserError, match=r"has adapted 'imagenet'; did you mean 'imagenet2012'"):
        published(index, adapted="imagenet")
    with pytest.raises(UserError, match=r"has image_size 512; known: 224, 384"):
        published(index, adapted="imagenet2012", image_size=512)
    columns = [{"final_val": "finalval"}.get(column, column) for column in COLUMNS]
    with pytest.raises(UserError, match=r"no column 'final_val'; did you mean 'final"):
        published(write(tmp_path / "other.csv", columns=columns))
    # Only what is asked for has to be there.
    few = write(tmp_path / "few.csv", columns=["name", "ds", "final_val", "final_test", "filename"])
    assert published(few) == published(index)
    with pytest.raises(UserError, match="no column 'adapt_ds'"):
        published(few, adapted="imagenet2012")
    (tmp_path / "weights.npz").write_bytes(b"PK\x03\x04\xff\xfe")
    for path in ("none.csv", "weights.npz", "."):
        with pytest.raises(UserError, match=r"cannot be read .* expected AugReg's index.csv"):
            published(tmp_path / path)

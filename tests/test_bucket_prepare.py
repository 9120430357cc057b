"""Data prepared into buckets, on servers of this machine: equal to that on a disk."""
# ruff: noqa: F811 - fixtures that are imported

import json
import re
import shutil

import numpy as np
import pytest
import simplejpeg
from conftest import fails
from processes import SIGKILL, Command
from test_buckets import FAULTS, STORES, servers_of, store, stores  # noqa: F401 - fixtures

from vit_jax import objects
from vit_jax.data import destinations, shards
from vit_jax.data.prepare import Conversion, prepare
from vit_jax.errors import UserError
from vit_jax.lease import Lease
from vit_jax.objects import Objects

ON_S3 = pytest.mark.parametrize("store", ["s3"], indirect=True)


def jpeg(number):
    """An image that differs from those of other numbers."""
    return simplejpeg.encode_jpeg(np.full((8, 8, 3), number, np.uint8), 90) + b"%d" % number


def tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


@pytest.fixture
def pets(tmp_path):
    """Ten images of two classes, one that cannot be read, and a file that is no image."""
    images = {f"train/{'cat' if i % 2 else 'dog'}/{i}.jpg": jpeg(i) for i in range(10)}
    others = {"train/cat/broken.jpg": b"\xff\xd8\xff\xe0 no more", "train/dog/notes.txt": b"woof"}
    val = {f"val/cat/{i}.jpg": jpeg(i) for i in range(20, 24)}
    tree(tmp_path / "pets", {**images, **others, **val, "val/dog/9.jpg": jpeg(9)})
    return str(tmp_path / "pets")


def kept(url):
    """The objects of a folder by their names, hidden ones aside."""
    found = Objects(url)
    return {name: found.read(name)[0] for name in found.names() if name[0] != "."}


def hidden(url):
    return [name for name in Objects(url).names() if name[0] == "."]


def on_disk(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def counted(monkeypatch):
    """The names of the shards that are written from here on."""
    made, write = [], shards.write_shard

    def write_shard(path, *args):
        made.append(path[-14:-9])
        return write(path, *args)

    monkeypatch.setattr(shards, "write_shard", write_shard)
    return made


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_a_bucket_gets_what_a_disk_gets_despite_faults(store, pets, tmp_path, caplog):
    """To the byte, all files; 5% of the requests fail."""
    caplog.set_level("INFO", "vit_jax")
    url = f"{store}://runs/data/pets/"
    FAULTS[store].share = 0.05
    for split in ("train", "val"):
        options = dict(split=split, part=split, shard_examples=3)
        info = prepare(pets, url, **options)
        assert info == prepare(pets, str(tmp_path / "disk"), **options)
        assert info == prepare(pets, url, **options)  # is there, and is not made again
    FAULTS[store].share = 0.0
    expected = on_disk(tmp_path / "disk")
    assert len(expected) == 15 and kept(url[:-1]) == expected
    assert hidden(url[:-1]) == [".lease"]
    assert f"listed in {url}passed_over_train.jsonl" in caplog.text
    assert "of 4 shards, 4 were made here, 0 by others meanwhile, 0 were there" in caplog.text
    assert f"1 images of split 'val' of {url[:-1]} are in split 'train' too" in caplog.text
    again = f"as split 'test' is the same images as split 'train' of {url[:-1]}: say which part"
    with pytest.raises(UserError, match=re.escape(again)):
        prepare(pets, url, split="test", part="train")
    with pytest.raises(UserError, match=r"made otherwise \(shard_examples differ\)"):
        prepare(pets, url, part="train", shard_examples=4)


@pytest.mark.parametrize("store", STORES[:1], indirect=True)
def test_a_killed_conversion_goes_on(store, pets, tmp_path, monkeypatch):
    """It dies once its second shard is sent, and before that is recorded; the first is cut."""
    url = f"{store}://runs/data/killed"
    text = (
        "import os\n"
        "from vit_jax.__main__ import main\n"
        "from vit_jax.objects import Objects\n"
        "write = Objects.write\n"
        "def write_and_die(self, name, content, generation):\n"
        "    made = write(self, name, content, generation)\n"
        "    if name.startswith('images-') and '-00002-' in name:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return made\n"
        "Objects.write = write_and_die\n"
        f"main(['prepare', {pets!r}, {url!r}, '--shard-examples=3'])\n"
    )
    Command(tmp_path, [], text=text, **servers_of(store)).finish(-SIGKILL)
    there = Objects(url)
    names = [name for name in there.names() if name[0] != "."]
    assert [name[-14:-9] for name in names] == ["00000", "00001", "00002"]  # and no INFO
    there.replace(names[0], there.read(names[0])[0][:-1])
    with pytest.raises(UserError, match=r"made otherwise \(shard_examples differ\)"):
        prepare(pets, url, shard_examples=4)
    made = counted(monkeypatch)
    prepare(pets, url, shard_examples=3)
    assert sorted(made) == ["00000", "00002", "00003"]
    prepare(pets, str(tmp_path / "disk"), shard_examples=3)
    assert kept(url) == on_disk(tmp_path / "disk")


@ON_S3
def test_two_processes_share_a_conversion(store, pets, tmp_path, monkeypatch):
    """Each makes some shards, none is made twice, and both tell the same in the end."""
    url = f"{store}://runs/data/shared"
    monkeypatch.setattr(FAULTS[store], "latency", 0.01)
    (tmp_path / "ready").mkdir()
    text = (
        "import os, pathlib, time\n"
        "from vit_jax.__main__ import main, set_up_screen\n"
        "import vit_jax.data.prepare\n"
        "set_up_screen()\n"
        f"ready = pathlib.Path({str(tmp_path / 'ready')!r})\n"
        "(ready / str(os.getpid())).touch()\n"
        "while len(list(ready.iterdir())) < 2:\n"
        "    time.sleep(0.01)\n"
        f"main(['prepare', {pets!r}, {url!r}, '--shard-examples=1'])\n"
    )
    both = [Command(tmp_path, [], text=text, **servers_of(store)) for _ in range(2)]
    told = [command.finish() for command in both]
    assert told[0][0] == told[1][0] and json.loads(told[0][0])["examples"] == 10
    found = [re.search(r"of 11 shards, (\d+) were made here, (\d+) by", err) for _, err in told]
    assert [int(each[1]) for each in found] == [int(each[2]) for each in reversed(found)]
    assert sum(int(each[1]) for each in found) == 11 and all(int(each[1]) for each in found)
    prepare(pets, str(tmp_path / "disk"), shard_examples=1)
    assert kept(url) == on_disk(tmp_path / "disk") and hidden(url) == [".lease"]


@ON_S3
def test_a_shard_taken_over_meanwhile_is_left_to_its_owner(
    store,
    pets,
    tmp_path,
    monkeypatch,
    caplog,
):
    """Who then is silent, as a machine that is gone, and loses it."""
    caplog.set_level("INFO", "vit_jax")
    monkeypatch.setattr(destinations, "STALE", 0.6)
    url = f"{store}://runs/data/taken"
    other = json.dumps({**Lease(url)._me, "machine": "another", "host": "gone"}).encode()
    made, write = counted(monkeypatch), shards.write_shard

    def write_and_lose(path, *args):
        shard = write(path, *args)
        if made == ["00000"]:
            Objects(url).replace(f".unfinished_train/{shard['file']}.lease", other)
        return shard

    monkeypatch.setattr(shards, "write_shard", write_and_lose)
    prepare(pets, url, shard_examples=4)
    assert made == ["00000", "00001", "00002", "00000"]
    last = re.sub(r"process \d+", "process 1", caplog.text)
    assert ".array_record-00000-of-00003.lease was taken over by process 1 on gone" in last
    assert "waiting for the last shards, 1, made by process 1 on gone since" in last
    assert "is silent and loses it" in last
    monkeypatch.setattr(shards, "write_shard", write)
    prepare(pets, str(tmp_path / "disk"), shard_examples=4)
    assert kept(url) == on_disk(tmp_path / "disk")


@ON_S3
def test_who_does_not_write_the_end_tells_the_same(store, pets, monkeypatch):
    """Of a second split; another process was quicker with the metadata."""
    url = f"{store}://runs/data/second"
    prepare(pets, url, split="val", part="val")
    finish, told = destinations.Bucket.finish, []

    def finish_later(self, write):
        monkeypatch.setattr(destinations.Bucket, "finish", finish)
        told.append(prepare(pets, url))
        return finish(self, write)

    monkeypatch.setattr(destinations.Bucket, "finish", finish_later)
    assert prepare(pets, url) == told[0]
    splits = json.loads(Objects(url).read("dataset_info.json")[0])["splits"]
    assert sorted(split["name"] for split in splits) == ["train", "val"]


@ON_S3
def test_who_slept_through_another_conversion_does_no_harm(store, pets, tmp_path, monkeypatch):
    """The folder was emptied, and filled with other settings."""
    url, write = f"{store}://runs/data/slept", shards.write_shard

    def write_late(path, *args):
        monkeypatch.setattr(shards, "write_shard", write)
        shard = write(path, *args)
        for name in {name[:1] for name in Objects(url).names()}:
            Objects(url).delete(name)
        prepare(pets, url, conversion=Conversion(short_side=4))
        return shard

    monkeypatch.setattr(shards, "write_shard", write_late)
    with pytest.raises(UserError, match="was deleted, or is made with other settings by now"):
        prepare(pets, url)
    prepare(pets, str(tmp_path / "disk"), conversion=Conversion(short_side=4))
    assert kept(url) == on_disk(tmp_path / "disk")


@ON_S3
def test_splits_in_a_bucket_agree(store, pets, tmp_path, caplog):
    """On classes, also with a split that is only begun; what has no hashes is not compared."""
    url = f"{store}://runs/data/splits"
    tree(tmp_path / "birds", {"gull/1.jpg": jpeg(1), "robin/2.jpg": jpeg(2)})
    place = destinations.Bucket(url, "val", str(tmp_path))
    place.begin({"label_names": ["cat", "dog"], "source": "elsewhere"})
    with pytest.raises(UserError, match=r"has 2 classes, of which .* knows no 'gull'"):
        prepare(str(tmp_path / "birds"), url)
    place.clean()
    prepare(pets, url)
    Objects(url).delete("content_train.npy")
    prepare(pets, url, split="val")
    assert "were not compared: records:s3://runs/data/splits train has no hashes" in caplog.text


@pytest.mark.parametrize("store", STORES, indirect=True)
def test_a_destination_that_cannot_be_is_a_sentence(
    store,
    pets,
    capsys,
    monkeypatch,
):
    FAULTS[store].share = 1.0
    monkeypatch.setattr(FAULTS[store], "kinds", (403,))
    monkeypatch.setattr(objects, "RETRIES", {**objects.RETRIES, "max_retries": 1})
    told = fails(capsys, "prepare", pets, f"{store}://runs/data/mine")
    assert "access is refused" in told and "Log in with" in told
    FAULTS[store].share = 0.0
    assert "no such bucket" in fails(capsys, "prepare", pets, f"{store}://nobody/data")
    Objects(f"{store}://runs/data/foreign").replace("a/notes.txt", b"mine")
    told = fails(capsys, "prepare", pets, f"{store}://runs/data/foreign")
    assert "/foreign holds a, which is not part of prepared data" in told


@ON_S3
def test_a_full_disk_of_temporary_files_is_a_sentence(store, pets, capsys, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    told = fails(capsys, "prepare", pets, f"{store}://runs/data/full")
    assert "nearly full, where each shard is written before it is sent" in told
    assert "TMPDIR" in told


def test_names_of_a_lease_are_apart(tmp_path):
    """Of one folder, the shards' and that of what is written last."""
    folder = f"file://{tmp_path}"
    with Lease(folder, name="a.lease") as first, Lease(folder) as second:
        assert first.id != second.id
        with Lease(folder, name="a.lease").if_free() as mine:
            assert not mine
    with Lease(folder, name="a.lease").if_free() as mine:
        assert mine
    assert np.all(
        [json.loads((tmp_path / n).read_text())["released"] for n in ("a.lease", ".lease")]
    )

"""What is written: with its parent folders, as a whole, and never among what others wrote."""

import errno
import os
import pathlib
import resource

import numpy as np
import PIL.Image
import pytest
from conftest import DIGITS, TINY, fails

import vit_jax
from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.writing import replacing, write_atomically

SWEEP = f"config = {DIGITS!r}\ndef sweep(scale=''):\n    yield {{'seed': 1}}\n"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What the commands read: a small model, images in memory, a sweep."""
    folder = tmp_path_factory.mktemp("given")
    model = vit_jax.create("mu/8", image_size=16, num_classes=3)
    vit_jax.save(model, folder / "model.safetensors")
    images = np.arange(6 * 16 * 16 * 3, dtype=np.uint8).reshape(6, 16, 16, 3)
    np.savez(folder / "a.npz", train_images=images, train_labels=np.arange(6) % 3)
    (folder / "sweep.py").write_text(SWEEP)
    return {"MODEL": folder / "model.safetensors", "NPZ": folder / "a.npz", "SWEEP": folder}


# Command -> what it writes below DST.
WRITES = {
    "convert MODEL DST/x.npz --format=google": "x.npz",
    "convert MODEL DST/x.safetensors --format=timm": "x.safetensors",
    "convert MODEL DST --format=hf": "model.safetensors",
    "inspect MODEL --pictures=DST": "filters.png",
    "data arrays:NPZ --pictures=DST": "train_stored.png",
    "prepare arrays:NPZ DST": "vit_jax_train.json",
    "report RUN --out=DST/x.html": "x.md",
}
# Among files of others -> what it says.
AMONG = {
    "convert MODEL DST --format=hf": "holds mine.jpg, which is not part of a model",
    "prepare arrays:NPZ DST": "holds mine.jpg and 1 more, which is not part of prepared data",
    f"train --config={DIGITS} --workdir=DST": "holds mine.jpg, which is not part of a run",
    "sweep SWEEP/sweep.py --workdir=DST": "holds mine.jpg, which is not part of this sweep",
    "report RUN --out=DST/mine.html": "mine.md, which would be written beside",
}
# A file in place of a folder.
BELOW_A_FILE = [
    *WRITES,
    f"train --config={DIGITS} --workdir=DST",
    "sweep SWEEP/sweep.py --workdir=DST",
]


def command(line, given, dst, run="RUN"):
    for name, value in {**given, "DST": dst, "RUN": run}.items():
        line = line.replace(name, str(value))
    return [*line.split(), *(TINY if line.startswith("train") else ())]


@pytest.mark.parametrize("line", WRITES)
def test_missing_parents_are_made(line, given, tiny_run, tmp_path):
    umask = os.umask(0o027)
    try:
        argv = command(line, given, tmp_path / "a" / "b", tiny_run[0])
        assert main(argv) == 0
        assert main(argv) == 0  # what is there is its own
    finally:
        os.umask(umask)
    assert (tmp_path / "a" / "b" / WRITES[line]).is_file()
    files = [file for file in (tmp_path / "a").rglob("*") if file.is_file()]
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o640"}
    assert not [file for file in files if file.suffix == ".tmp"]


@pytest.mark.parametrize("line", AMONG)
def test_nothing_is_written_among_foreign_files(line, given, tiny_run, tmp_path, capsys):
    name = {"report": "mine.md", "convert": "README.md"}.get(line.split()[0], "run.log")
    for each in ("mine.jpg", name):
        (tmp_path / each).write_text("mine")
    assert AMONG[line] in fails(capsys, *command(line, given, tmp_path, tiny_run[0]))
    assert {path.name for path in tmp_path.iterdir()} == {"mine.jpg", name}


@pytest.mark.parametrize("line", BELOW_A_FILE)
def test_a_file_is_no_folder(line, given, tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    main(command(line, given, tmp_path / "file" / "b", tiny_run[0]))
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith(f"error: {tmp_path / 'file'} is a file; ") and "folder" in err, err
    assert (tmp_path / "file").read_text() == "mine"


def test_names_that_are_no_text_are_refused_where_libraries_need_text(given, tmp_path, capsys):
    dst = f"{tmp_path}/r\udce9"
    for line in [*BELOW_A_FILE[-2:], "prepare arrays:NPZ DST"]:
        assert r"r\udce9 is not UTF-8 text: rename it" in fails(capsys, *command(line, given, dst))
    assert not list(tmp_path.iterdir())


def test_what_fails_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomically(path, "old")
    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (full, ValueError("?")):
        with pytest.raises(type(error)) as raised, replacing(path) as temporary:
            pathlib.Path(temporary).write_text("half")
            raise error
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
        assert error is not full or raised.value.filename == str(path)
    with pytest.raises(UserError, match="is a folder; expected the name of a file"):
        write_atomically(tmp_path, "new")
    with pytest.raises(OSError, match=r"'/sys/no'|'/sys'") as raised:  # nobody may write there
        write_atomically("/sys/no", "new")


def test_what_may_not_be_read_is_not_called_damaged(given, tmp_path, monkeypatch, capsys):
    """Rights and limits say nothing about what is in a file."""
    image = tmp_path / "a.png"
    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(image)
    table = tmp_path / "a.csv"
    table.write_text("image,label\na.png,cat\n")
    opened = open
    lines = [f"predict --model=MODEL {image}", f"data table:{table}", "inspect MODEL"]
    for line, path in zip(lines, (image, table, given["MODEL"]), strict=True):

        def refuse(file, *args, path=path, **kwargs):
            if str(file) == str(path):
                raise PermissionError(errno.EACCES, "Permission denied", file)
            return opened(file, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", refuse)
            # An image that may not be read is one of many that are.
            assert main(command(line, given, tmp_path)) == (3 if line.startswith("predict") else 2)
        told = "".join(capsys.readouterr())
        assert f"{path}: Permission denied: change who may read" in told, told


def test_a_full_disk_is_said_of_weights(given, tmp_path, capsys):
    """safetensors raises an error of its own, which this process's limit makes real."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        code = main(command("convert MODEL DST/x.safetensors --format=timm", given, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert code == 2 and err.endswith(
        "x.safetensors: File too large: make room or choose another place\n"
    )
    assert not list(tmp_path.iterdir())

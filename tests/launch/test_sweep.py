"""Sweep files: what they say, how points are named and ordered, and what is refused."""

import dataclasses
import shlex

import pytest
from conftest import DIGITS, ROOT

from vit_jax.errors import UserError
from vit_jax.launch.sweep import load_sweep, point_config, product, together

HEAD = f"from vit_jax.launch.sweep import product, together\nconfig = {DIGITS!r}\n"


@pytest.fixture
def write(tmp_path):
    """Writes a sweep file whose function yields what the text says."""

    def write(points, head=HEAD):
        path = tmp_path / "sweep.py"
        path.write_text(f"{head}\ndef sweep(scale='laptop'):\n    yield from {points}\n")
        return str(path)

    return write


def names(spec):
    return [point.name for point in load_sweep(spec).points]


def test_axes_are_combined():
    assert product({"a": [1, 2], "b": "xy"}) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    assert together({"a": [1, 2], "b": "xy"}) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    with pytest.raises(ValueError):
        together({"a": [1, 2], "b": "xyz"})


def test_a_point_is_named_by_what_differs(write):
    spec = write(
        "[{'optim.weight_decay': 0.1} | a | b for a in together({'optim.lr': [1e-3, 3e-5], "
        "'seed': [0, 1]}) for b in product({'model.image_size': [(8, 8), (16, 16)]})]"
    )
    assert names(spec) == [
        "optim.lr=0.001,seed=0,model.image_size=8x8",
        "optim.lr=0.001,seed=0,model.image_size=16x16",
        "optim.lr=3e-05,seed=1,model.image_size=8x8",
        "optim.lr=3e-05,seed=1,model.image_size=16x16",
    ]


@pytest.mark.parametrize(
    "points, expected",
    [
        ("[{}]", ["point"]),
        (
            "[{}, {'optim.ema': 0.9}, {'optim.ema': None}]",
            ["point", "optim.ema=0.9", "optim.ema=None"],
        ),
        ("[{'name': 'mine', 'seed': 1}, {'seed': 2}]", ["mine", "point"]),
        ("[{'seed': 1}, {'config': config + ':finetune'}]", None),
        (
            "[{'init_from': 'a/b (c).npz'}, {'init_from': '@x'}, {'name': 'x'}]",
            ["init_from=a_b_c_.npz", "x", "init_from=x"],
        ),
    ],
)
def test_names_of_odd_points(write, points, expected):
    if expected is None:
        path = DIGITS.strip("/").replace("/", "_")
        expected = [f"config={path},seed=1", f"config={path}_finetune"]
    assert names(write(points)) == expected


def test_long_names_are_cut_and_stay_different(write):
    spec = write("[{'init_from': '/' + 'x' * 300 + str(i)} for i in range(3)]")
    found = names(spec)
    assert len(set(found)) == 3 and all(len(name) == 150 for name in found)
    assert found == names(spec)


def test_configs_of_their_own_and_numpys_numbers(write, monkeypatch, tmp_path):
    spec = write(
        "[{'optim.lr': np.float32(0.5), 'seed': np.arange(3)[1], 'model.image_size': [8, 8],"
        "'optim.ema': None, 'objective': 'sigmoid'}, {'config': config + ':finetune'}]",
        head=f"import numpy as np\n{HEAD}",
    )
    one, two = load_sweep(spec).points
    config = point_config(one, str)
    assert (config.optim.lr, config.seed, config.objective) == (0.5, 1, "sigmoid")
    assert config.model["image_size"] == (8, 8) and config.optim.ema is None
    assert shlex.join(one.flags(str)) == (
        "--config.optim.lr=0.5 --config.seed=1 '--config.model.image_size=(8, 8)' "
        "--config.optim.ema=None --config.objective=sigmoid"
    )
    assert two.config == f"{DIGITS}:finetune" and point_config(two, str).optim.lr == 5e-4

    monkeypatch.chdir(tmp_path)  # where there is no configs/
    spec = f"{ROOT}/experiments/recipes/finetune_sweep.py"
    points = load_sweep(spec).points
    assert [point.name for point in points] == ["pets_0.003", "pets_0.01"]
    assert points[0].config == f"{ROOT}/configs/finetune.py:B/16,pets,dev"
    assert len(load_sweep(f"{spec}:pod").points) == 20


def test_points_come_after_what_they_wait_for(write):
    spec = write(
        "[{'name': 'd', 'after': ('b', 'c')}, {'name': 'c', 'init_from': '@a', 'after': 'b'},"
        "{'name': 'b'}, {'name': 'a'}, {'name': 'e', 'init_from': '@a', 'after': ['a']}]"
    )
    points = load_sweep(spec).points
    assert [point.name for point in points] == ["b", "a", "c", "d", "e"]
    assert {point.name: point.after for point in points} == {
        "a": (),
        "b": (),
        "c": ("b", "a"),
        "d": ("b", "c"),
        "e": ("a",),
    }
    (flag,) = points[2].flags(lambda name: f"/runs/{name}")
    assert flag == "--config.init_from=/runs/a"


MISTAKES = {
    "misspelt key": ("[{'optim.lrr': 1}]", r"point point: unknown config key .* 'optim.lr'"),
    "wrong type": ("[{}, {'batch_size': 'many'}]", r"point batch_size=many: .*batch_size"),
    "wrong value": ("[{'objective': 'softmaks'}]", "did you mean 'softmax'"),
    "section": ("[{'optim': {'lr': 1}}]", "a key of a section is written section.key"),
    "cannot train": ("[{'optim': None}]", "optim is not set"),
    "no config": ("[{'config': 'configs/digit.py'}]", "there is no config file"),
    "no recipe": ("[{'config': 'digit'}]", "did you mean 'digits'"),
    "argument": (f"[{{'config': '{DIGITS}:finetun'}}]", "argument 'finetun'"),
    "no dict": ("[('seed', 1)]", r"yields \('seed', 1\); expected a dict"),
    "one name": ("[{'name': 'a'}, {'name': 'a', 'seed': 1}]", "2 points .* 'a' .different"),
    "one point": ("[{'seed': 1}, {'seed': 1}]", "2 points .* 'point' .the same point"),
    "one text": ("[{'init_from': 'a/b'}, {'init_from': 'a b'}]", "give each a `name`"),
    "path": ("[{'name': '../a'}]", r"a point is named '\.\./a'; a name is a folder's"),
    "hidden": ("[{'name': '.lock'}]", "begins with"),
    "empty name": ("[{'name': ''}]", "a point is named ''"),
    "record": ("[{'name': 'sweep.json'}]", "cannot be named 'sweep.json'"),
    "log": ("[{'name': 'a'}, {'name': 'a.log'}]", "cannot be named 'a'"),
    "after": ("[{'name': 'base'}, {'after': 'bass'}]", "'bass', which is no point.* 'base'"),
    "reference": ("[{'name': 'base'}, {'init_from': '@bas'}]", "did you mean 'base'"),
    "type of after": ("[{'after': 3}]", "`after` is 3; expected the name"),
    "itself": ("[{'name': 'a', 'init_from': '@a'}]", "wait for one another: a after a"),
    "circle": (
        "[{'name': 'a', 'after': 'b'}, {'name': 'b', 'after': 'c'}, {'name': 'c', 'after': 'b'}]",
        "wait for one another: b after c after b",
    ),
    "no points": ("[]", "yields no points"),
    "scale": ("int('laptpo')", "laptpo"),
    "key of its own": ("[{'seed': {}['one']}]", r"sweep fails .KeyError: 'one'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name, write):
    points, message = MISTAKES[name]
    spec = write(points)
    with pytest.raises(UserError, match=message) as raised:
        load_sweep(spec)
    assert spec in str(raised.value)


def test_mistakes_about_the_file(tmp_path, write):
    with pytest.raises(UserError, match=r"there is no sweep file 'nowhere\.py'"):
        load_sweep("nowhere.py:pod")
    path = tmp_path / "file.py"
    for text, message in {
        "config = 'a.py'": "no function sweep",
        "def sweep(:": r"cannot be read \(SyntaxError",
        "import nothing_of_that_name": "No module named 'nothing_of_that_name'",
        "def sweep(): yield {}": "the config of a point is None; expected the path",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_sweep(str(path))
    path.write_text(f"{HEAD}def sweep(): yield {{}}")
    with pytest.raises(UserError, match="takes 0 positional arguments"):
        load_sweep(f"{path}:pod")
    path.write_text(f"{HEAD}def sweep(scale=''):\n  raise ValueError('laptop or pod, please')")
    with pytest.raises(UserError, match=f"{path}:pad: laptop or pod, please"):
        load_sweep(f"{path}:pad")


def test_points_are_values(write):
    (point,) = load_sweep(write("[{'seed': 1}]")).points
    with pytest.raises(dataclasses.FrozenInstanceError):
        point.name = "other"

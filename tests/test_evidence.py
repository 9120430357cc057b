"""The paper's claims: each experiment runs from its points to its page; what it says of numbers."""

import json
import re
import sys
import types

import pytest
from conftest import ROOT

from vit_jax.launch.sweep import load_sweep, point_config
from vit_jax.training.loop import train

sys.path.insert(0, str(ROOT / "experiments"))
import evidence
from telling import Mean, Point, means, table


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    """A folder to work in that has the images of configs/evidence.py, very few of them."""
    folder = tmp_path_factory.mktemp("evidence")
    evidence.make_data(folder / "runs" / "evidence", shrink=100)
    return folder


@pytest.mark.parametrize("name", evidence.EXPERIMENTS)
def test_an_experiment_runs_from_its_points_to_its_page(name, few_images, monkeypatch, tmp_path):
    monkeypatch.chdir(few_images)
    points = load_sweep(f"{ROOT}/experiments/{name}/sweep.py:smoke").points
    runs = few_images / "out"
    for point in points:
        config = point_config(point, lambda each: str(runs / name / each))
        train(config, runs / name / point.name)
    if name == "segmentation":
        module = evidence.report(name)
        monkeypatch.setattr(module, "SIZES", (24,))
        monkeypatch.setattr(module, "SCENES", "scenes:digits,size=24,examples=8")
        monkeypatch.setattr(module, "STEPS", 2)
        monkeypatch.setattr(evidence, "report", lambda name: module)
    evidence.collect(name, runs, points, tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert [each["name"] for each in found["points"]] == [point.name for point in points]
    assert all(each["metrics"]["step"] == 2 for each in found["points"])
    assert all(each["metrics"]["gflops"] > 0 for each in found["points"])
    evidence.tell(name, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.count("\n| ") >= 3 and "2 images/s" not in page
    for picture in re.findall(r"\]\((\w+\.png)\)", page):
        assert (tmp_path / picture).exists(), picture


@pytest.mark.parametrize("name", evidence.EXPERIMENTS)
def test_the_sweep_is_whole_at_every_scale(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    counts = [
        len(load_sweep(f"experiments/{name}/sweep.py:{scale}").points)
        for scale in ("smoke", "laptop", "paper")
    ]
    assert counts[0] <= 2 and counts[1] >= counts[0] and counts[2] >= 1
    with pytest.raises(Exception, match="scale 'huge': expected"):
        load_sweep(f"experiments/{name}/sweep.py:huge")


@pytest.mark.parametrize("name", evidence.EXPERIMENTS)
def test_the_page_is_what_results_json_says(name, tmp_path):
    folder = ROOT / "experiments" / name
    (tmp_path / "results.json").write_text((folder / "results.json").read_text())
    for picture in folder.glob("*.png"):
        (tmp_path / picture.name).write_bytes(b"")
    evidence.tell(name, tmp_path)
    assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()


def test_means_and_what_counts_as_a_difference():
    points = [Point(str(i), {"seed": i}, {"x": x}) for i, x in enumerate((0.1, 0.2, 0.6))]
    grouped = means(points, lambda point: point.overrides["seed"] < 2, "x")
    assert str(grouped[True]) == "15.0% ± 7.1%" and str(grouped[False]) == "60.0%"
    # (0.45 apart, standard error 0.0707 / sqrt(2) = 0.05)
    assert grouped[False].beats(grouped[True]) and not grouped[True].beats(grouped[False])
    near = Mean((0.2, 0.3))
    assert near.minus(grouped[True]) == pytest.approx((0.1, (0.005 / 2 + 0.005 / 2) ** 0.5))
    assert not near.beats(grouped[True])
    assert table(("a", "b"), [(1, "x")]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def told(name, values, overrides=lambda key: {}, metric="others/5shot", measured=None):
    """What a report says of made-up results: {name of a point: value}."""
    points = [
        Point(key, overrides(key), {metric: x, "val/accuracy": x}) for key, x in values.items()
    ]
    module = evidence.report(name)
    return module.tell(points) if measured is None else module.tell(points, measured)


@pytest.mark.parametrize(
    "none, sincos, agrees", [(0.1, 0.2, "yes"), (0.2, 0.2, "no"), (0.1, 0.9, "the first half")]
)
def test_positions_agree_if_all_are_better_than_none_and_alike(none, sincos, agrees):
    values = {"none_input": none, "learned_input": 0.2, "sincos2d_input": sincos}
    values = {f"{k}_{seed}": v + seed / 1000 for k, v in values.items() for seed in (0, 1)}

    def overrides(key):
        what, where, _ = key.split("_")
        return {"model.position": what, "model.position_at": where}

    assert told("positions", values, overrides).agrees.startswith(agrees)


@pytest.mark.parametrize(
    "gap, agrees", [((0.3, 0.2), "yes"), ((0.1, 0.3), "as good"), ((0.1, 0.1), "no")]
)
def test_token_and_mean_agree_if_they_are_alike_at_rates_of_their_own(gap, agrees):
    best = {"token": (0.1, 0.3), "gap": gap}
    values = {
        f"{pool},{rate},{seed}": best[pool][i] + seed / 1000
        for pool in best
        for i, rate in enumerate((1e-3, 2e-3))
        for seed in (0, 1)
    }

    def overrides(key):
        pool, rate, _ = key.split(",")
        return {"model.pool": pool, "optim.lr": float(rate)}

    assert told("token_or_mean", values, overrides).agrees.startswith(agrees)


def test_compute_finds_how_much_cheaper_a_family_is():
    cheaper = evidence.report("compute").cheaper
    vit = {10.0: Mean((0.1,)), 1000.0: Mean((0.3,))}
    resnet = {30.0: Mean((0.1,)), 3000.0: Mean((0.3,))}
    ratio, at = cheaper(vit, resnet)
    assert ratio == pytest.approx(3) and at == pytest.approx(0.2)
    assert cheaper(vit, {1.0: Mean((0.5,)), 9.0: Mean((0.6,))}) == (None, None)


def test_compute_says_of_both_claims_whether_they_are_seen():
    module = evidence.report("compute")
    # The ViT has the ResNet's accuracy for a third; the hybrid is best where compute is smallest.
    accuracy = {"vit": (0.1, 0.2, 0.3), "resnet": (0.05, 0.15, 0.25), "hybrid": (0.15, 0.2, 0.28)}
    flops = {"vit": (10, 100, 1000), "resnet": (10, 100, 1000), "hybrid": (10, 100, 1000)}
    points = [
        Point(
            f"{family}_{i}_0",
            {},
            {"others/5shot": accuracy[family][i], "gflops": flops[family][i], "parameters": 1.0}
            | {"val/accuracy": 0.5},
        )
        for family in accuracy
        for i in range(3)
    ]
    found = module.tell(points)
    assert found.agrees == "yes"
    assert "a ResNet takes 3.2 times the compute of a ViT" in found.verdict  # 10 ** 0.5
    assert "at 10 GFLOP" in found.short


def test_masked_patches_agree_if_between_scratch_and_labels():
    tests = dict(scratch=0.5, pixels=0.6, small=0.65, colour=0.7, labels=0.8)
    values = {f"{k}_{seed}_digits": v + seed / 1000 for k, v in tests.items() for seed in (0, 1)}
    found = told("masked_patches", values, metric="test/accuracy")
    assert found.agrees == "yes" and "+20.0% against scratch" in found.verdict
    values |= {f"colour_{seed}_digits": 0.9 + seed / 1000 for seed in (0, 1)}
    assert told("masked_patches", values, metric="test/accuracy").agrees == "the first half"


def test_the_command_refuses_an_experiment_that_does_not_exist(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evidence.py", "position"])
    with pytest.raises(SystemExit) as stopped:
        evidence.main()
    assert stopped.value.code == 2 and "no experiment position" in capsys.readouterr().err


def test_a_failed_point_ends_with_a_sentence(monkeypatch, tmp_path):
    from vit_jax.errors import UserError
    from vit_jax.launch import run

    result = types.SimpleNamespace(name="a", state="failed", exit_code=2)
    monkeypatch.setattr(run, "run_sweep", lambda *_, **__: [result])
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"positions: 1 of 1 points failed: a with exit code 2"):
        evidence.run("positions", tmp_path, 1)

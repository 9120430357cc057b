"""Reports: known numbers of hand-made folders, what is broken in them, and a page that is safe."""

import base64
import hashlib
import html
import html.parser
import itertools
import json
import re
import shutil
import subprocess

import pytest
from conftest import DIGITS, fails

from vit_jax.__main__ import main
from vit_jax.errors import UserError
from vit_jax.launch.comparison import device_hours, read_runs
from vit_jax.launch.page import html_page, thinned, ticks, write_report
from vit_jax.launch.report import compare, escape, group_table, run_table
from vit_jax.training.config import to_json
from vit_jax.training.config_file import load_config


def config_json(*flags):
    flags = [f"--config.{flag}" for flag in flags]
    return to_json(load_config(DIGITS, ["--config.total_steps=20", *flags]))


def make_run(folder, *flags, lines=(), starts=()):
    """A run folder as training leaves it, without its weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_json(*flags))
    for name, kept in (("metrics", lines), ("starts", starts)):
        if kept:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in kept))
    return folder


def lines_of(halfway, last, test=None):
    """Twenty steps in 100 s, measured at 10 and 20."""
    lines = [
        {"step": 10, "train/loss": 2.0, "images_per_second": 100.0, "seconds": 40.0},
        {"step": 10, "val/accuracy": halfway, "val/loss": 1.0, "val/corrupt": 0},
        {"step": 20, "train/loss": 1.0, "images_per_second": 300.0, "seconds": 100.0},
        {"step": 20, "val/accuracy": last, "val/loss": 0.5, "val/corrupt": 0},
    ]
    return lines if test is None else [*lines, {"step": 20, "test/accuracy": test}]


def make_sweep(root, points, states=None):
    """A sweep's folder; `points` are (name, overrides, lines)."""
    root.mkdir()
    told = []
    for i, (name, overrides, lines) in enumerate(points):
        state = states[i] if states else "finished"
        point = {"name": name, "config": "configs/digits.py", "overrides": overrides, "after": []}
        told.append({**point, "state": state, "exit_code": None, "metrics": {}})
        if lines:
            make_run(root / name, lines=lines)
    (root / "sweep.json").write_text(json.dumps({"sweep": "a.py", "points": told}))
    return root


def seeds_of(root, **rest):
    """Two learning rates, three seeds each."""
    last = {1e-3: (0.90, 0.92, 0.97), 3e-3: (0.95, 0.95, 0.95)}
    points = [
        (f"lr{lr}_{i}", {"optim.lr": lr, "seed": i}, lines_of(0.99 if i == 1 else 0.5, value, 0.9))
        for lr, values in last.items()
        for i, value in enumerate(values)
    ]
    return make_sweep(root, points, **rest)


def report_of(*folders):
    return compare(read_runs([str(folder) for folder in folders]), "a title")


VOID = ("meta", "path", "circle", "polyline", "wbr")


class Page(html.parser.HTMLParser):
    """What is in a page: tags with their attributes, in order; all must close."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_seeds_are_grouped_and_the_best_is_named(tmp_path):
    sweep = seeds_of(tmp_path / "sweep")
    report = report_of(sweep, sweep / "lr0.001_0")  # which is one of them
    # By its last value; 0.99 was measured halfway, of weights that are gone.
    assert report.best.name == "lr0.001_2" and report.metric == "val/accuracy"
    assert report.best.last(report.test) == 0.9
    assert [group.label for group in report.groups] == ["lr=0.003", "lr=0.001"]
    # By hand: deviations of -0.03, -0.01 and 0.04, so the variance is 0.0026 / 2.
    assert group_table(report).rows == [
        ["lr=0.003", "0.9500", "0.0000", "0.9000", "0.0000", "3"],
        ["lr=0.001", "0.9300", "0.0361", "0.9000", "0.0000", "3"],
    ]
    table = run_table(report)
    heads = ["run", "state", "val/accuracy", "test/accuracy", "best, at step", "steps"]
    assert table.headers == [*heads, "lr", "seed", "images/s", "seconds"]
    row = ["lr0.001_1", "finished", "0.9200", "0.9000", "0.9900 at 10", "20/20"]
    assert table.rows[1] == [*row, "0.001", "1", "200", "100"]


def test_what_is_not_finished_counts_only_where_nothing_is(tmp_path):
    states = ["finished", "finished", "stopped", "finished", "waiting", "failed"]
    report = report_of(seeds_of(tmp_path / "sweep", states=states))
    assert report.best.name == "lr0.003_0"
    assert [row[-1] for row in group_table(report).rows] == ["1 of 3", "2 of 3"]
    assert group_table(report).rows[0][2] == "–"  # noqa: RUF001
    one = report_of(seeds_of(tmp_path / "one", states=["finished", "failed", "failed"] * 2))
    assert "std" not in group_table(one).headers  # there is none
    report = report_of(seeds_of(tmp_path / "other", states=["stopped"] * 6))
    assert report.best.name == "lr0.001_2"


def test_run_folders_differ_where_their_configs_do(tmp_path):
    folders = []
    for seed in (0, 1):
        first = make_run(
            tmp_path / f"pre_{seed}", f"seed={seed}", "log.every=7", lines=lines_of(0, 0.5)
        )
        flags = [f"seed={seed}", "optim.lr=0.25", f"init_from={first}", f"mesh.data={seed + 1}"]
        folders += [first, make_run(tmp_path / f"fine_{seed}", *flags, lines=lines_of(0, 0.7))]
    report = report_of(*folders)
    assert report.varied == ["optim.lr", "seed", "init_from", "mesh.data"]
    # A fine-tuned run is told from another seed's by what it starts from, but of the same point.
    assert [[run.name for run in group.runs] for group in report.groups] == [
        ["fine_0", "fine_1"],
        ["pre_0", "pre_1"],
    ]
    assert report.groups[0].label == "lr=0.25"
    assert report.common == {} and report.test is None


def test_students_of_the_seeds_of_a_teacher_are_of_one_point(tmp_path):
    folders = []
    for seed in (0, 1):
        teacher = make_run(tmp_path / f"teacher_{seed}", f"seed={seed}", lines=lines_of(0, 0.5))
        flags = [f"seed={seed}", "objective=distill", f"distill.teacher={teacher}"]
        flags += ["optim.probe.steps=2", "optim.probe.lr=0.5"]
        folders += [teacher, make_run(tmp_path / f"student_{seed}", *flags, lines=lines_of(0, 0.7))]
    groups = report_of(*folders).groups
    assert [[run.name[:-2] for run in group.runs] for group in groups] == [
        ["student"] * 2,
        ["teacher"] * 2,
    ]
    assert "probe.lr=0.5" in groups[0].label


def test_loss_is_best_where_it_is_lowest(tmp_path):
    runs = [
        make_run(tmp_path / name, f"optim.lr={lr}", lines=[{"step": 20, "val/loss": loss}])
        for name, lr, loss in (("a", 0.1, 0.5), ("b", 0.2, 0.25), ("c", 0.3, 0.75))
    ]
    report = report_of(*runs)
    assert report.best.name == "b" and report.groups == []


def test_device_hours_are_of_the_devices_at_the_time(tmp_path):
    lines = [
        {"step": 10, "seconds": 1800.0},
        {"step": 10, "val/loss": 1.0},
        {"step": 20, "seconds": 5400.0},
    ]
    starts = [{"step": 0, "devices": 4}, {"step": 10, "devices": 2, "kind": "TPU v5p"}]
    assert device_hours(lines, starts) == 0.5 * 4 + 1.0 * 2
    assert device_hours(lines, starts[1:]) is None and device_hours(lines, []) is None
    new = make_run(tmp_path / "new", lines=lines, starts=starts)
    old = make_run(tmp_path / "old", "seed=1", lines=lines)
    table = run_table(report_of(new, old))
    rows = [dict(zip(table.headers, row, strict=True)) for row in table.rows]
    assert [row["device-hours"] for row in rows] == ["4", "–"]  # noqa: RUF001
    assert [row["devices"] for row in rows] == ["2 TPU v5p", "–"]  # noqa: RUF001


def test_training_says_what_it_runs_on(tiny_run):
    # Other tests may have started it again, once it had finished.
    start = json.loads((tiny_run[0] / "starts.jsonl").read_text().splitlines()[0])
    kind = {"kind": "cpu", "processes": 1}
    assert start == {"step": 0, "total_steps": 24, "devices": 8, **kind}
    (run,) = read_runs([str(tiny_run[0])])
    assert run.state == "finished" and (run.steps, run.total) == (24, 24)
    assert run.device_hours == pytest.approx(run.seconds * 8 / 3600)
    assert run.last("test/accuracy") == tiny_run[1]["test/accuracy"]


def test_damage_is_told_and_the_rest_is_read(tmp_path):
    good = make_run(tmp_path / "good", lines=lines_of(0.1, 0.2))
    torn = make_run(tmp_path / "torn", "seed=1", lines=lines_of(0.1, 0.2))
    path = torn / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # as by a kill: the step is measured again
    split = make_run(tmp_path / "split", "seed=2", lines=lines_of(0.1, 0.2))
    path = split / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"step": 10, "val', b'{"step\xff 10, "val'))
    odd = make_run(tmp_path / "odd", "seed=3")
    (odd / "config.json").write_text('{"batch_size": 3, "colour": 1}')
    (odd / "metrics.jsonl").write_text("[1]\n3\n")
    young = make_run(tmp_path / "young", "seed=4")
    notes = {run.name: run.note for run in read_runs([str(p) for p in tmp_path.iterdir()])}
    assert notes["good"] == notes["torn"] == notes["young"] == ""
    assert notes["split"] == "metrics.jsonl is damaged in line 2 of 4; it ends there"
    assert "config key colour" in notes["odd"] and "line 1 of 2" in notes["odd"]
    table = run_table(report_of(good, torn, split, odd, young))
    assert "note" in table.headers and len(table.rows) == 5
    with pytest.raises(UserError, match=r"^nothing could be read: .*config key colour"):
        report_of(odd)
    assert report_of(young).best is None and "Nothing" in html_page(report_of(young))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p / "none", "is no folder, and neither a run .* nor a sweep"),
        (lambda p: p, "is neither a run .config.json. nor a sweep .sweep.json.: name a run"),
        (lambda p: make_sweep(p / "s", []), "a sweep without points"),
        (lambda p: make_run(p / "a").parent, "is neither .*: name the folders in it, .*/\\*"),
        (lambda p: (make_sweep(p / "s", []) / "sweep.json").write_text("{") and p / "s", "damaged"),
    ],
)
def test_a_folder_that_is_neither_is_refused(tmp_path, make, message, capsys):
    assert re.search(message, fails(capsys, "report", make(tmp_path)))


def test_the_command_writes_a_page_and_a_table(tmp_path, capsys):
    sweep = seeds_of(tmp_path / "sweep")
    assert main(["report", str(sweep)]) == 0
    told = capsys.readouterr().out
    assert told == (sweep / "report.md").read_text() and (sweep / "report.html").exists()
    assert "Best by val/accuracy: **lr0.001_2**, 0.9700; test/accuracy 0.9000." in told
    assert "| lr=0.001 | 0.9300 | 0.0361 | 0.9000 | 0.0000 | 3 |" in told
    assert main(["report", str(sweep), f"--out={tmp_path}/new/page.html"]) == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"page.html", "page.md"}
    assert main(["report", str(sweep), f"--out={tmp_path}/page.txt"]) == 2
    (tmp_path / "taken.html").mkdir()
    assert main(["report", str(sweep), f"--out={tmp_path}/taken.html"]) == 2


EVIL = "<script>alert('&')<|_b_`*[x](y)\x1b[31m"


def test_what_files_say_is_shown_and_never_obeyed(tmp_path):
    lines = [*lines_of(0.1, 0.2), {"step": 20, 'val/<b>"x"': 1}, {"step": 21, 'val/<b>"x"': 2}]
    evil = make_run(tmp_path / EVIL, "init_from=</script>|<i>", lines=lines)
    other = make_run(tmp_path / "other", "seed=1", lines=lines_of(0.1, 0.1))
    told = write_report([str(evil), str(other)])
    page = Page((evil / "report.html").read_text())
    assert [tag for tag, _ in page.tags if tag in ("script", "b", "i")].count("script") == 1
    shown = "".join(page.texts)
    assert EVIL.replace("\x1b", " ") in shown and "</script>|<i>" in shown
    assert 'val/<b>"x"' in shown
    assert "\x1b" not in told and "<script" not in told
    rows = [line for line in told.splitlines() if line.startswith("| ")]
    bars = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert len(rows) == 4 and len(bars) == 1
    assert escape("a_b |_c_| <d> `e` [f]") == r"a_b \|\_c\_\| &lt;d&gt; \`e\` \[f\]"


def test_the_page_needs_nothing_else_and_has_every_point(tmp_path):
    sweep = seeds_of(tmp_path / "sweep")
    text = html_page(report_of(sweep))
    page = Page(text)
    assert not re.search(r"https?:|\burl\(|@import|\bsrc=", text)
    assert not any({"src", "href"} & set(attrs) for _, attrs in page.tags)
    script = re.search(r"<script>(.*)</script>", text, re.S)[1]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policies = [meta.get("content", "") for meta in page.all("meta")]
    assert any(f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'" in p
               for p in policies)  # fmt: skip
    titles = [attrs["aria-label"] for attrs in page.all("svg") if attrs.get("role") == "img"]
    assert [title.split(" by ")[0] for title in titles] == [
        "val/accuracy",
        "val/loss",
        "train/loss",
    ]
    lines = page.all("polyline")
    assert len(lines) == 3 * 6 and all(len(line["points"].split()) == 2 for line in lines)
    assert lines[-1]["data-p"] == "10:2 20:1"
    # The pictures' scale, by hand: steps 10 and 20 at the two ends; losses 1 and 2 with 5% room.
    (x0, y0), (x1, y1) = (map(float, each.split(",")) for each in lines[-1]["points"].split())
    assert (x0, x1) == (46, 350)
    assert y1 - y0 == pytest.approx((190 - 8) / 1.1, abs=0.2) and y1 + y0 == pytest.approx(198)


def test_curves_are_thinned_and_ticks_are_round():
    points = [(i, float(i)) for i in range(1000)]
    kept = thinned(points)
    assert len(kept) == 200 and (kept[0], kept[-1]) == (points[0], points[-1])
    gaps = {b[0] - a[0] for a, b in itertools.pairwise(kept)}
    assert gaps <= {5, 6} and thinned(points[:200]) == points[:200]
    assert ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(50.0, 1250.0, 5) == [500, 1000] and ticks(3.0, 3.0, 5) == [3]
    assert ticks(-0.011, 0.013, 5) == pytest.approx([-0.01, -0.005, 0, 0.005, 0.01])


def chromium(page, folder, *flags):
    """What the browser answers to flags, of a page, with nothing of ours beside it."""
    quiet = "no-first-run disable-background-networking disable-component-update disable-sync"
    flags = [*flags, *(f"--{flag}" for flag in quiet.split()), f"--user-data-dir={folder}"]
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *flags]
    done = subprocess.run([*command, f"file://{page}"], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium on the PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_a_desk(tmp_path, width):
    import numpy as np
    from PIL import Image

    sweep = seeds_of(tmp_path / "sweep")
    write_report([str(sweep)])
    page = sweep / "report.html"
    size = f"--window-size={width},1200"
    chromium(page, tmp_path / "a", size, f"--screenshot={tmp_path}/shot.png", "--hide-scrollbars")
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    assert pixels.shape == (1200, width, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    # A window cannot be as narrow as a phone, but a frame can; the page's own policy holds in it.
    probe = (
        "const page = frame.contentDocument, root = page.documentElement; document.title = "
        "[frame.clientWidth, root.scrollWidth - root.clientWidth, page.body.className, "
        "page.querySelectorAll('polyline').length]"
    )
    around = tmp_path / "around.html"
    around.write_text(
        f'<!doctype html><title></title><iframe id="frame" style="border:0" width="{width}" '
        f'height="900" onload="{html.escape(probe)}" srcdoc="{html.escape(page.read_text())}">'
    )
    told = chromium(around, tmp_path / "b", "--window-size=1400,1000", "--dump-dom")
    assert re.search(r"<title>(.*?)</title>", told)[1] == f"{width},0,js,18"

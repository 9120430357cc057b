"""What is logged where: Weights & Biases by a fake of it, and what a run was started on."""

import json
import shutil
import sys
import types

import pytest
from conftest import DIGITS, TINY
from etils import epath

from vit_jax import distributed
from vit_jax.errors import UserError
from vit_jax.training.config import differences, from_json, to_json
from vit_jax.training.config_file import load_config
from vit_jax.training.loop import train
from vit_jax.training.metrics import Recorder, read_metrics, read_starts, record_start

ON = ("--config.log.wandb=True", "--config.log.wandb_project=vits")


def config_of(*flags):
    return load_config(DIGITS, [*TINY, "--config.log.tensorboard=False", *flags])


@pytest.fixture
def wandb(monkeypatch):
    """A module that records what it is asked for; `error` is what init raises."""
    module = types.ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.inits, module.logged, module.ended, module.error = [], [], [], None

    class Run:
        def log(self, data, *, step):
            module.logged.append((step, dict(data)))

        def finish(self, *, exit_code):
            module.ended.append(exit_code)

    def init(**options):
        if module.error:
            raise module.Error(module.error)
        module.inits.append(options)
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_resumed_run_goes_on_in_the_same_run(tmp_path, wandb):
    workdir = epath.Path(tmp_path)
    recorder = Recorder(workdir, 0, 24, config_of(*ON))
    recorder.write(3, {"train/loss": 2.0, "seconds": 1.0})
    recorder.write(8, {"val/accuracy": 0.5})
    recorder.close(failed=True)
    recorder = Recorder(workdir, 3, 24, config_of(*ON, "--config.mesh.data=2"))
    recorder.write(8, {"val/accuracy": 0.5})
    recorder.close()
    first, second = wandb.inits
    assert first["id"] == second["id"] and first["id"].isalnum()
    assert first["resume"] == second["resume"] == "allow" and first["project"] == "vits"
    assert first["name"] == tmp_path.name and first["dir"] == str(tmp_path)
    assert first["config"] == json.loads(to_json(config_of(*ON)))
    assert second["config"]["mesh"]["data"] == 2 and second["allow_val_change"]
    line = (8, {"val/accuracy": 0.5})
    assert wandb.logged == [(3, {"train/loss": 2.0, "seconds": 1.0}), line, line]
    assert wandb.ended == [1, 0]
    assert [x["step"] for x in read_metrics(workdir)] == [3, 8]
    # A run that begins anew, in the same folder, is another.
    Recorder(workdir, 0, 24, config_of(*ON)).close()
    assert wandb.inits[2]["id"] != first["id"]


def test_one_that_begins_late_has_what_was_before(tmp_path, wandb):
    recorder = Recorder(epath.Path(tmp_path), 0, 24, config_of())
    for step in (3, 6, 9):
        recorder.write(step, {"train/loss": 9.0 - step})
    recorder.close()
    assert wandb.inits == []
    Recorder(epath.Path(tmp_path), 6, 24, config_of(*ON)).close()
    assert wandb.logged == [(3, {"train/loss": 6.0}), (6, {"train/loss": 3.0})]
    assert wandb.inits[0]["id"] == (tmp_path / "wandb_id").read_text()


def test_training_logs_only_where_it_is_asked_to(tiny_run, tmp_path, wandb):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[0], workdir)
    config = load_config(DIGITS, [*TINY, *ON])
    assert differences(load_config(DIGITS, TINY), config) == []  # log may differ
    train(config, workdir)
    assert wandb.ended == [0] and len(wandb.inits) == 1
    # Everything that metrics.jsonl has, in its order.
    lines = [{"step": step, **values} for step, values in wandb.logged]
    assert lines == read_metrics(tiny_run[0])


def test_only_process_0_logs(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(distributed, "is_lead", lambda: False)
    recorder = Recorder(epath.Path(tmp_path), 0, 24, config_of(*ON))
    recorder.write(3, {"train/loss": 2.0})
    recorder.close()
    assert wandb.inits == wandb.logged == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")])  # none, or a mere folder
def test_without_wandb_nothing_starts(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"install -e '.*\[wandb\]'"):
        train(config_of(*ON), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_it_cannot_reach_is_a_sentence(tmp_path, wandb):
    wandb.error = "no key"
    with pytest.raises(UserError, match=r"cannot be reached \(no key\): run `wandb login`"):
        Recorder(epath.Path(tmp_path), 0, 24, config_of(*ON))


def test_configs_from_before_are_read(tmp_path):
    fields = json.loads(to_json(config_of()))
    del fields["log"]["wandb"], fields["log"]["wandb_project"]
    assert from_json(json.dumps(fields)) == config_of()


def test_starts_keep_those_whose_steps_count(tmp_path):
    workdir = epath.Path(tmp_path)
    assert read_starts(workdir) == []
    for step, devices in ((0, 8), (4, 4), (8, 2), (4, 1)):
        record_start(workdir, step, 24, devices)
    assert [(x["step"], x["devices"]) for x in read_starts(workdir)] == [(0, 8), (4, 1)]
    record_start(workdir, 0, 30, 8)
    (start,) = read_starts(workdir)
    assert (start["total_steps"], start["kind"]) == (30, "cpu")

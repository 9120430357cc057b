"""Between two steps the loop hands work out and waits for nothing: it fetches where it logs."""

import collections
import contextlib
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DIGITS, TINY

from vit_jax.training import loop
from vit_jax.training.config_file import load_config
from vit_jax.training.metrics import Recorder

STEPS = 23
QUIET = ["--config.eval.every=0", "--config.checkpoint.every=0", "--config.data.threads=1"]


class Watched:
    """Stands for a metric on its device, and notes when its value is asked for."""

    def __init__(self, value, step, events):
        self.value, self.step, self.events = value, step, events

    def __array__(self, *args, **kwargs):
        before = len(self.events)
        value = np.asarray(self.value)
        self.events[before:] = [("fetch", self.step)]  # and not what this class has just done
        return value

    def __float__(self):
        return float(self.__array__())

    def copy_to_host_async(self):
        """Asks for it and does not wait."""

    def __getattr__(self, name):
        if not name.startswith("__"):
            raise AssertionError(f"the loop looked at .{name} of a metric")
        raise AttributeError(name)


@pytest.fixture
def events(monkeypatch, untrained):
    """What a run does, in order: ("step", number), ("fetch", of which step), ("save", number)."""
    seen, make_program = [], loop.make_program
    # Checked types would not let Watched through.
    monkeypatch.setattr(Recorder, "step", getattr(Recorder.step, "__wrapped__", Recorder.step))

    def watched_program(*args, **kwargs):
        program = make_program(*args, **kwargs)

        def step(state, batch):
            number = sum(kind == "step" for kind, _ in seen) + 1
            state, metrics = program.step(state, batch)
            seen.append(("step", number))
            return state, {name: Watched(x, number, seen) for name, x in metrics.items()}

        return dataclasses.replace(program, step=step)

    def save(store, step, saved):
        seen.append(("save", step))

    monkeypatch.setattr(loop, "make_program", watched_program)
    monkeypatch.setattr(loop.Store, "save", save)
    array = type(jnp.zeros(1))
    value, wait = array._value, array.block_until_ready

    def watched_value(self):
        seen.append(("value", self.shape))
        return value.fget(self)

    def watched_wait(self):
        seen.append(("wait", self.shape))
        return wait(self)

    monkeypatch.setattr(array, "_value", property(watched_value))
    monkeypatch.setattr(array, "block_until_ready", watched_wait)
    return seen


def run(tmp_path, *flags, steps=STEPS):
    flags = [*TINY, *QUIET, f"--config.total_steps={steps}", *flags]
    return loop.train(load_config(DIGITS, flags), tmp_path / "run")


def between_steps(events):
    """Of each step: what happened after it was handed out and before the next one was."""
    after = {}
    for kind, what in events:
        if kind == "step":
            after[what] = []
        elif after:
            after[max(after)].append((kind, what))
    return after


@pytest.mark.parametrize("every", [1, 5])
def test_values_are_fetched_where_they_are_logged_and_one_step_later(every, events, tmp_path):
    run(tmp_path, f"--config.log.every={every}")
    after = between_steps(events)
    assert list(after) == [*range(1, STEPS + 1)]
    fetched = []
    for step in range(1, STEPS):
        # Of a step that is to be logged, once the next one is on its way: never of that one.
        if (step - 1) % every == 0 and step > 1:
            assert {kind for kind, _ in after[step]} == {"fetch"}
            assert {of for _, of in after[step]} == {*range(step - every, step)}
        else:
            assert after[step] == [], step
        fetched += after[step]
    # At the last step the run has come to its end: what is left, then what evaluation reads.
    fetched += [event for event in after[STEPS] if event[0] == "fetch"]
    assert len(fetched) == 5 * len(set(fetched))  # five metrics a step, each once
    assert {of for _, of in fetched} == {*range(1, STEPS + 1)}


def test_a_run_that_logs_nothing_looks_now_and_then(events, tmp_path):
    """So that it stops where it diverged: every hundred steps, and before it saves."""
    run(tmp_path, "--config.log.every=0", "--config.checkpoint.every=105", steps=110)
    after = between_steps(events)
    assert [step for step, happened in after.items() if happened] == [101, 105, 110]
    assert {of for _, of in after[101]} == {*range(1, 101)}
    assert after[105][-1] == ("save", 105)
    assert {event for event in after[105][:-1]} == {("fetch", of) for of in range(101, 106)}


@contextlib.contextmanager
def traced():
    """Counts what Python traces and compiles; not calls of what is compiled already."""
    found = collections.Counter()

    def note(frame, event, _):
        name, place = frame.f_code.co_name, frame.f_code.co_filename
        if event == "call" and name in ("bind", "backend_compile") and "/jax/_src/" in place:
            found[name] += 1

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


def test_nothing_is_traced_after_the_first_step(tmp_path, monkeypatch):
    with traced() as control:
        jax.jit(lambda x: x - 3)(2)
    assert control

    counts, make_program = [], loop.make_program

    def counted_program(*args, **kwargs):
        program = make_program(*args, **kwargs)

        def step(state, batch):
            counts.append(sum(found.values()))
            return program.step(state, batch)

        return dataclasses.replace(program, step=step)

    monkeypatch.setattr(loop, "make_program", counted_program)
    with traced() as found:
        run(tmp_path, "--config.log.every=4", steps=12)
    assert len(counts) == 12
    assert counts[0] < counts[1] and len(set(counts[1:])) == 1, counts

"""Checkpoints: what is damaged is named, what is half-written does not count, the rest is exact."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vit_jax.checkpoints.store import Store, lock, verify
from vit_jax.errors import UserError


def tree(value):
    key = jax.random.key(value)
    return {
        "step": jnp.asarray(value, jnp.int32),
        "params": {"a": {"kernel": jax.random.normal(key, (16, 24))}, "b": jnp.ones(3) * value},
        "opt_state": {"1/0/mu/a/kernel": jnp.full((16, 24), value, jnp.bfloat16)},
    }


def shapes(value=0):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(value))


def saved(directory, *steps, keep=5):
    store = Store(directory, keep=keep)
    for step in steps:
        store.save(step, tree(step))
    store.wait()
    return store


def test_restores_bit_for_bit_into_numpy_and_into_any_mesh(tmp_path):
    store = saved(tmp_path, 7)
    for ours, theirs in zip(
        jax.tree.leaves(store.restore(7, shapes())), jax.tree.leaves(tree(7)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs, strict=True)
    for devices in (1, 2, 8):
        mesh = jax.make_mesh((devices,), ("x",), (AxisType.Auto,), devices=jax.devices()[:devices])
        places = {
            2: NamedSharding(mesh, PartitionSpec("x")),
            1: NamedSharding(mesh, PartitionSpec()),
        }
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=places[2 if x.ndim == 2 else 1],  # noqa: B023
            ),
            shapes(),
        )
        restored = store.restore(7, target)
        assert restored["params"]["a"]["kernel"].sharding.num_devices == devices
        jax.tree.map(np.testing.assert_array_equal, restored, tree(7))
    assert store.restore(7, {"step": shapes()["step"]}) == {"step": 7}
    assert store.names(7) == {"step", "params", "opt_state"}


def test_keeps_the_newest(tmp_path):
    assert saved(tmp_path, 1, 2, 3, 10, keep=2).steps() == [3, 10]
    assert not (tmp_path / "checkpoints" / "1").exists()


def test_a_damaged_newer_one_pushes_nothing_out(tmp_path):
    saved(tmp_path, 200, 400)
    damage(tmp_path / "checkpoints" / "400", "flipped")
    store = saved(tmp_path, 250, keep=1)
    assert store.newest() == 250
    assert not (tmp_path / "checkpoints" / "200").exists()


def test_a_saved_tree_may_be_overwritten_at_once(tmp_path):
    store = Store(tmp_path)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    live = tree(3)
    store.save(3, live)
    live = double(double(live))
    store.close()
    jax.tree.map(np.testing.assert_array_equal, store.restore(3, shapes()), tree(3))


def files(path):
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name != "checksums.json")


def test_every_flipped_bit_is_found(tmp_path):
    store = saved(tmp_path, 4, 8)
    newest = tmp_path / "checkpoints" / "8"
    draw = random.Random(0)
    for path in files(newest):
        whole = path.read_bytes()
        for _ in range(3 if whole else 0):
            bit = draw.randrange(8 * len(whole))
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            assert path.name in verify(store.directory / "8")
        path.write_bytes(whole)
    assert verify(store.directory / "8") is None


def damage(path, how):
    victim = max(files(path), key=lambda p: p.stat().st_size)
    if how == "flipped":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif how == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif how == "missing":
        victim.unlink()
    elif how == "empty checksums":
        (path / "checksums.json").write_text("")
    else:
        (path / "checksums.json").unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "empty checksums", "uncommitted"])
def test_a_damaged_newest_one_is_named_and_the_one_before_is_used(tmp_path, caplog, how):
    store = saved(tmp_path, 4, 8)
    damage(tmp_path / "checkpoints" / "8", how)
    assert store.newest() == 4
    assert "checkpoints/8" in caplog.text
    store.save(8, tree(8))  # the run comes by again
    store.wait()
    assert store.newest() == 8
    jax.tree.map(np.testing.assert_array_equal, store.restore(8, shapes()), tree(8))


def test_no_checkpoint_is_a_start_and_only_damaged_ones_an_error(tmp_path):
    assert Store(tmp_path).newest() is None
    store = saved(tmp_path, 4)
    damage(tmp_path / "checkpoints" / "4", "flipped")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        store.newest()
    damage(tmp_path / "checkpoints" / "4", "uncommitted")
    assert store.newest() is None


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    with lock(tmp_path):
        with pytest.raises(UserError, match=r"in use by process \d+"), lock(tmp_path):
            pass
    with lock(tmp_path):
        pass

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
    kernel = np.random.default_rng(value).normal(size=(16, 24)).astype(np.float32)
    return {
        "step": jnp.asarray(value, jnp.int32),
        "params": {
            "a": {"kernel": jnp.asarray(kernel)},
            "b": jnp.asarray([value] * 3, jnp.float32),
        },
        "opt_state": {"1/0/mu/a/kernel": jnp.full((16, 24), value, jnp.bfloat16)},
    }


def shapes():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree(0))


def same(restored, value):
    jax.tree.map(np.testing.assert_array_equal, restored, tree(value))


def saved(directory, *steps, keep=5):
    store = Store(directory, keep=keep)
    for step in steps:
        store.save(step, tree(step))
    store.wait()
    return store


def test_restores_bit_for_bit_into_numpy_and_into_any_mesh(tmp_path):
    store = saved(tmp_path, 7)
    restored = store.restore(7, shapes())
    jax.tree.map(lambda *each: np.testing.assert_array_equal(*each, strict=True), restored, tree(7))
    for devices in (1, 2, 8):
        mesh = jax.make_mesh((devices,), ("x",), (AxisType.Auto,), devices=jax.devices()[:devices])

        def placed(x, mesh=mesh):
            spec = PartitionSpec("x") if x.ndim == 2 else PartitionSpec()
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        restored = store.restore(7, jax.tree.map(placed, shapes()))
        assert restored["params"]["a"]["kernel"].sharding.num_devices == devices
        same(restored, 7)
    assert store.restore(7, {"step": shapes()["step"]}) == {"step": 7}
    assert store.names(7) == {"step", "params", "opt_state"}


def test_keeps_the_newest_and_nothing_damaged_pushes_one_out(tmp_path):
    assert saved(tmp_path / "a", 1, 2, 3, 10, keep=2).steps() == [3, 10]
    assert not (tmp_path / "a" / "checkpoints" / "1").exists()
    saved(tmp_path / "b", 200, 400)
    damage(tmp_path / "b" / "checkpoints" / "400", "flipped")
    assert saved(tmp_path / "b", 250, keep=1).newest() == 250
    assert not (tmp_path / "b" / "checkpoints" / "200").exists()


def test_a_saved_tree_may_be_overwritten_at_once(tmp_path):
    store = Store(tmp_path)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)
    live = tree(3)
    store.save(3, live)
    double(double(live))
    store.close()
    same(store.restore(3, shapes()), 3)


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
    content = victim.read_bytes()
    middle = len(content) // 2
    if how == "flipped":
        victim.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "cut":
        victim.write_bytes(content[:-1])
    elif how == "empty checksums":
        (path / "checksums.json").write_text("")
    else:
        (victim if how == "missing" else path / "checksums.json").unlink()


def test_a_damaged_newest_one_is_named_and_the_one_before_is_used(tmp_path, caplog):
    for how in ("flipped", "cut", "missing", "empty checksums", "uncommitted"):
        store = saved(tmp_path / how, 4, 8)
        caplog.clear()
        damage(tmp_path / how / "checkpoints" / "8", how)
        assert store.newest() == 4, how
        assert f"{how}/checkpoints/8" in caplog.text
        store.save(8, tree(8))  # the run comes by again
        store.close()
        assert store.newest() == 8
        same(store.restore(8, shapes()), 8)


def test_no_checkpoint_is_a_start_and_only_damaged_ones_an_error(tmp_path):
    assert Store(tmp_path).newest() is None
    store = saved(tmp_path, 4)
    damage(tmp_path / "checkpoints" / "4", "flipped")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        store.newest()
    damage(tmp_path / "checkpoints" / "4", "uncommitted")
    assert store.newest() is None


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    for _ in range(2):
        with lock(tmp_path):
            with pytest.raises(UserError, match=r"in use by process \d+"), lock(tmp_path):
                pass

"""What programs move, read from their HLO: known programs, and what XLA writes for TPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_jax.analysis.collectives import Collective, by_kind, read_collectives

X = jax.ShapeDtypeStruct((8, 64, 16), jnp.float32)
ONE = 64 * 16 * 4  # bytes of a device's part of it


def compiled(function, axes=(8,), names=("x",)):
    mesh = jax.make_mesh(axes, names, (jax.sharding.AxisType.Auto,) * len(axes))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=P(names), out_specs=P("x"), check_vma=False
    )
    return jax.jit(mapped).lower(X).compile().as_text()


@pytest.mark.parametrize(
    "function, kind, sent",
    [
        (lambda x: jax.lax.psum(x, "x"), "all-reduce", 2 * ONE * 7 / 8),
        (lambda x: jax.lax.all_gather(x, "x", tiled=True), "all-gather", 8 * ONE * 7 / 8),
        (
            lambda x: jax.lax.psum_scatter(x, "x", scatter_dimension=1, tiled=True),
            "reduce-scatter",
            ONE * 7 / 8,
        ),
        (
            lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)]),
            "collective-permute",
            float(ONE),
        ),
        (lambda x: jax.lax.all_to_all(x, "x", 1, 1, tiled=True), "all-to-all", ONE * 7 / 8),
    ],
)
def test_each_kind_in_a_loop_of_five(function, kind, sent):
    def loop(x):
        def body(total, _):
            return total + function(x * total.mean()).sum(), None

        return jax.lax.scan(body, jnp.float32(1), None, length=5)[0][None]

    collectives = read_collectives(compiled(loop))
    (found,) = [each for each in collectives if each.bytes > 8]
    group = 2 if kind == "collective-permute" else 8
    assert found == Collective(kind, group, 5, sent)


def test_groups_are_those_of_the_axis():
    text = compiled(lambda x: jax.lax.psum(x, "y"), (2, 4), ("x", "y"))
    (found,) = read_collectives(text)
    assert (found.group, found.times) == (4, 1)


def test_a_program_without_any_has_none():
    assert read_collectives(jax.jit(lambda x: x + 1).lower(X).compile().as_text()) == []


# In the forms that the TPU's compiler writes, cut down to what is read.
TPU = """HloModule jit_step, is_scheduled=true

%all-reduce-scatter (input: bf16[64,32]) -> bf16[8,32] {
  %input = bf16[64,32]{1,0} parameter(0)
  %all-reduce.1 = bf16[64,32]{1,0} all-reduce(%input), channel_id=7, replica_groups=[2,8]<=[16], \
use_global_device_ids=true, to_apply=%add
  ROOT %slice = bf16[8,32]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={8,32}
}

%async_collective_fusion.1 (param_0: bf16[8,32]) -> bf16[64,32] {
  %param_0 = bf16[8,32]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=3, \
replica_groups=mesh['a'=2,'b'=8] {'b'}, dimensions={0}
}

%async_collective_fusion.2 (param_0: bf16[8,32]) -> bf16[64,32] {
  %param_0 = bf16[8,32]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=3, \
replica_groups=mesh['a'=2,'b'=8] {'b'}, dimensions={0}
}

%body (state: (bf16[8,32], u32[])) -> (bf16[8,32], u32[]) {
  %state = (bf16[8,32]{1,0}, u32[]) parameter(0)
  %part = bf16[8,32]{1,0} get-tuple-element(%state), index=0
  %count = u32[] get-tuple-element(%state), index=1
  %two = u32[]{:T(128)} constant(2)
  %collective-permute-start.1 = (bf16[8,32]{1,0}, bf16[8,32]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%part), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %done = bf16[8,32]{1,0} collective-permute-done(%collective-permute-start.1)
  %collective-permute-start.2 = (bf16[8,32]{1,0}, bf16[8,32]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%done), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %done.2 = bf16[8,32]{1,0} collective-permute-done(%collective-permute-start.2)
  %next = u32[] add(%count, %two)
  ROOT %tuple = (bf16[8,32]{1,0}, u32[]) tuple(%done.2, %next)
}

%condition (state.1: (bf16[8,32], u32[])) -> pred[] {
  %state.1 = (bf16[8,32]{1,0}, u32[]) parameter(0)
  %bound = u32[]{:T(128)} constant(8)
  %count.1 = u32[] get-tuple-element(%state.1), index=1
  ROOT %compare = pred[] compare(%count.1, %bound), direction=LT
}

ENTRY %main (x: bf16[8,32], y: bf16[64,32]) -> bf16[8,32] {
  %x = bf16[8,32]{1,0} parameter(0)
  %y = bf16[64,32]{1,0} parameter(1)
  %zero = u32[] constant(0)
  %fusion.1 = bf16[64,32]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.2 = bf16[64,32]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %start = (bf16[8,32]{1,0}, u32[]) tuple(%x, %zero)
  %while.1 = (bf16[8,32]{1,0}, u32[]) while(%start), condition=%condition, body=%body
  %all-gather-start = (bf16[8,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%x), channel_id=9, \
replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}, dimensions={0}
  ROOT %fusion.3 = bf16[8,32]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_what_hides_a_collective_is_looked_through():
    whole, part = 64 * 32 * 2, 8 * 32 * 2.0
    gathered = Collective("all-gather", 8, 1, whole * 7 / 8)
    assert sorted(read_collectives(TPU), key=str) == sorted(
        [
            gathered,  # two fusions, one channel
            Collective("collective-permute", 2, 4, part),  # 8 in steps of 2
            Collective("collective-permute", 2, 4, part),
            gathered,
            Collective("reduce-scatter", 8, 1, whole * 7 / 8),
        ],
        key=str,
    )
    assert by_kind(read_collectives(TPU))["collective-permute"] == (8, 8 * part)


def test_groups_that_are_not_understood_are_no_guess():
    with pytest.raises(ValueError, match="no replica groups"):
        read_collectives(TPU.replace("replica_groups=[2,8]<=[16]", "replica_groups=new"))


def test_what_a_mesh_gathers_is_named_by_its_arrays():
    mesh = Mesh(jax.devices(), ("x",))
    split, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
    text = jax.jit(lambda x: x * 2, in_shardings=split, out_shardings=whole).lower(X).compile()
    (found,) = read_collectives(text.as_text())
    assert found == Collective("all-gather", 8, 1, 8 * ONE * 7 / 8)

"""Kernels of programs written by hand, whose bytes and FLOPs are known; and of a real one."""

import jax
import jax.numpy as jnp
import pytest

from vit_jax.analysis.chips import Chip
from vit_jax.analysis.hlo import bytes_of
from vit_jax.analysis.roofline import PARTS, Roofline, read_kernels

CHIP = Chip(memory=2**30, peak=2e9, bandwidth=1e9, products=1e9, copies=1e8, launch=1e-3)


def program(entry, *computations):
    """Each text a computation without its frame; `entry` is the one that runs."""
    others = "\n\n".join(
        f"%{name} (p: f32[]) -> f32[] {{\n{body}\n}}" for name, body in computations
    )
    return f"HloModule m\n\n{others}\n\nENTRY %main (p: f32[]) -> f32[] {{\n{entry}\n}}\n"


def only(entry, *computations):
    (kernel,) = read_kernels(program(entry, *computations))
    return kernel


X = "  %x = f32[64,32]{1,0} parameter(0)\n"


def test_a_kernel_reads_each_array_once_and_writes_its_results():
    kernel = only(
        X + "  ROOT %f = (f32[64,32]{1,0}, bf16[64]{0}) fusion(%x, %x), kind=kLoop, calls=%fused",
        (
            "fused",
            "  %a = f32[64,32]{1,0} parameter(0)\n  %b = f32[64,32]{1,0} parameter(1)\n"
            "  %s = f32[64,32]{1,0} add(%a, %b)\n  %r = bf16[64]{0} reduce(%s)\n"
            "  ROOT %t = (f32[64,32]{1,0}, bf16[64]{0}) tuple(%s, %r)",
        ),
    )
    assert (kernel.read, kernel.written, kernel.flops) == (64 * 32 * 4, 64 * 32 * 4 + 64 * 2, 0)


@pytest.mark.parametrize(
    "uses, read",
    [
        ("  ROOT %o = f32[4,32]{1,0} slice(%a), slice={[0:4], [0:32]}", 4 * 32),
        (
            "  %c = bf16[64,32]{1,0} convert(%a)\n  %d = bf16[32,64]{1,0} transpose(%c)\n"
            "  ROOT %o = bf16[32,8]{1,0} slice(%d), slice={[0:32], [0:8]}",
            8 * 32,
        ),
        (
            "  %c = f32[8,32]{1,0} slice(%a), slice={[0:8], [0:32]}\n"
            "  %d = f32[16,32]{1,0} slice(%a), slice={[8:24], [0:32]}\n"
            "  ROOT %o = (f32[8,32]{1,0}, f32[16,32]{1,0}) tuple(%c, %d)",
            24 * 32,
        ),
        ("  ROOT %o = f32[64]{0} reduce(%a)", 64 * 32),
        ("  ROOT %o = f32[9,64,32]{2,1,0} broadcast(%a)", 64 * 32),
        ("  %i = s32[] constant(3)\n  ROOT %o = f32[2,32]{1,0} dynamic-slice(%a, %i, %i)", 2 * 32),
    ],
)
def test_of_what_is_sliced_a_kernel_reads_the_slice(uses, read):
    kernel = only(
        X + "  ROOT %f = f32[1]{0} fusion(%x), kind=kLoop, calls=%fused",
        ("fused", "  %a = f32[64,32]{1,0} parameter(0)\n" + uses),
    )
    assert kernel.read == 4 * read


def test_what_is_updated_in_place_costs_the_update():
    kernel = only(
        X
        + "  %y = f32[1,32]{1,0} parameter(1)\n"
        + "  ROOT %f = f32[64,32]{1,0} fusion(%x, %y), kind=kLoop, calls=%fused",
        (
            "fused",
            "  %a = f32[64,32]{1,0} parameter(0)\n  %b = f32[1,32]{1,0} parameter(1)\n"
            "  %i = s32[] constant(0)\n"
            "  ROOT %u = f32[64,32]{1,0} dynamic-update-slice(%a, %b, %i, %i)",
        ),
    )
    assert (kernel.read, kernel.written) == (32 * 4, 32 * 4)


def test_a_loop_is_counted_as_often_as_it_runs():
    body = (
        "  %p = (s32[], f32[8]{0}) parameter(0)\n  %i = s32[] get-tuple-element(%p), index=0\n"
        "  %v = f32[8]{0} get-tuple-element(%p), index=1\n  %one = s32[] constant(1)\n"
        "  %n = s32[] add(%i, %one)\n  %w = f32[8]{0} copy(%v)\n"
        "  ROOT %t = (s32[], f32[8]{0}) tuple(%n, %w)"
    )
    condition = (
        "  %p = (s32[], f32[8]{0}) parameter(0)\n  %i = s32[] get-tuple-element(%p), index=0\n"
        "  %n = s32[] constant(7)\n  ROOT %c = pred[] compare(%i, %n), direction=LT"
    )
    start = "  %s = (s32[], f32[8]{0}) parameter(0)\n"
    loop = "  ROOT %l = (s32[], f32[8]{0}) while(%s), condition=%cond, body=%body"
    kernels = read_kernels(program(start + loop, ("body", body), ("cond", condition)))
    assert {(kernel.name, kernel.times) for kernel in kernels} == {("n", 7), ("w", 7)}
    told = loop + ', backend_config={"known_trip_count":{"n":"11"}}'
    kernels = read_kernels(program(start + told, ("body", body), ("cond", condition)))
    assert {kernel.times for kernel in kernels} == {11}


@pytest.mark.parametrize(
    "condition",
    [
        "  %n = f32[] constant(0.5)\n  ROOT %c = pred[] compare(%i, %n), direction=LT",
        "  %n = s32[] constant(7)\n  ROOT %c = pred[] compare(%i, %n), direction=GT",
        "  ROOT %c = pred[] and(%i, %i)",
    ],
)
def test_a_loop_of_unknown_length_is_counted_once_and_said_so(condition):
    start = "  %p = (s32[], f32[8]{0}) parameter(0)\n  %i = s32[] get-tuple-element(%p), index=0\n"
    body = start + "  %w = f32[8]{0} copy(%i)\n  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %w)"
    loop = "  %s = (s32[], f32[8]{0}) parameter(0)\n"
    loop += "  ROOT %l = (s32[], f32[8]{0}) while(%s), condition=%cond, body=%body"
    kernels = read_kernels(program(loop, ("body", body), ("cond", start + condition)))
    assert [(kernel.times, kernel.known) for kernel in kernels] == [(1, False)]
    assert Roofline(tuple(kernels), CHIP).unknown == 1


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%one, %two}", "true_computation=%one, false_computation=%two"],
)
def test_all_branches_are_counted_and_said_so(branches):
    entry = X + f"  ROOT %c = f32[64,32]{{1,0}} conditional(%x, %x, %x), {branches}"
    branch = "  %a = f32[64,32]{1,0} parameter(0)\n  ROOT %b = f32[64,32]{1,0} copy(%a)"
    kernels = read_kernels(program(entry, ("one", branch), ("two", branch)))
    assert [kernel.known for kernel in kernels] == [False, False]


def test_what_a_custom_call_computes_is_not_known():
    kernel = only(X + '  ROOT %c = f32[64,32]{1,0} custom-call(%x), custom_call_target="mine"')
    assert not kernel.known and kernel.bytes == 2 * 64 * 32 * 4


@pytest.mark.parametrize("dtype, size", [("f8e8m0fnu", 1), ("f4e2m1fn", 0.5), ("c64", 8)])
def test_element_types(dtype, size):
    entry = f"  %x = {dtype}[64]{{0}} parameter(0)\n  ROOT %c = {dtype}[64]{{0}} copy(%x)"
    assert only(entry).read == 64 * size
    with pytest.raises(ValueError, match="no element type 'q7'"):
        bytes_of("q7")


DOT = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
QKV = "%q = bf16[2,9,3,8]{3,2,1,0} parameter(0)\n  %k = bf16[2,7,3,8]{3,2,1,0} parameter(1)\n"


@pytest.mark.parametrize(
    "entry, fused, flops",
    [
        (
            X + "  %w = f32[32,5]{1,0} parameter(1)\n"
            f"  ROOT %d = f32[64,5]{{1,0}} dot(%x, %w), {DOT}",
            "",
            2 * 64 * 32 * 5,
        ),
        (
            X + "  %w = f32[32,5]{1,0} parameter(1)\n"
            "  ROOT %d = f32[64,5]{1,0} fusion(%x, %w), kind=kCustom, calls=%fused",
            "  %x = f32[64,32]{1,0} parameter(0)\n  %w = f32[32,5]{1,0} parameter(1)\n"
            f"  %d = f32[64,5]{{1,0}} dot(%x, %w), {DOT}\n"
            "  ROOT %m = f32[64,5]{1,0} multiply(%d, %d)",
            2 * 64 * 32 * 5,
        ),
        (
            X + "  %w = f32[32,5]{1,0} parameter(1)\n"
            "  ROOT %d = (f32[64,5]{1,0}, s8[100]{0}) custom-call(%x, %w), custom_call_target="
            '"__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
            '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}',
            "",
            2 * 64 * 32 * 5,
        ),
        (
            "  " + QKV + "  ROOT %a = (bf16[2,3,9,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), "
            'custom_call_target="__cudnn$fmhaSoftmax"',
            "",
            2 * 2 * (2 * 9 * 3 * 8 * 7),
        ),
        (
            "  " + QKV + "  ROOT %a = (bf16[2,3,9,8]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), "
            'custom_call_target="__cudnn$fmhaSoftmaxBackward"',
            "",
            5 * 2 * (2 * 9 * 3 * 8 * 7),
        ),
        (
            "  %x = f32[2,8,8,3]{3,2,1,0} parameter(0)\n"
            "  %k = f32[3,3,3,16]{3,2,1,0} parameter(1)\n"
            "  ROOT %c = f32[2,4,4,16]{3,2,1,0} convolution(%x, %k), "
            "window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_01io->b01f",
            "",
            2 * (2 * 16 * 3) * (4 * 3 - 1) ** 2,  # the last of the places meets the padding
        ),
        (  # what a TPU makes of a product [12 heads] x [64 x 64]
            "  %x = f32[12,64,9,8]{3,2,1,0} parameter(0)\n"
            "  %k = f32[12,64,8,5]{3,2,1,0} parameter(1)\n"
            "  ROOT %c = f32[12,64,9,5]{3,2,1,0} convolution(%x, %k), "
            "window={size=12x64 stride=11x63 lhs_dilate=12x64}, dim_labels=01bf_01io->01bf",
            "",
            2 * 12 * 64 * 9 * 8 * 5,
        ),
    ],
    ids=["dot", "fused", "cublas", "attention", "attention back", "convolution", "on a TPU"],
)
def test_flops_of_products(entry, fused, flops):
    kernel = only(entry, *([("fused", fused)] if fused else []))
    assert kernel.flops == flops


def test_a_workspace_is_not_written():
    entry = (
        X + "  ROOT %d = (f32[64,5]{1,0}, s8[100]{0}) custom-call(%x), "
        'custom_call_target="__cublas$lt$matmul", '
        'backend_config={"lhs_contracting_dimensions":["1"]}'
    )
    assert only(entry).written == 64 * 5 * 4


def test_what_is_in_a_tpus_fast_memory_is_free():
    kernel = only(
        "  %x = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} parameter(0)\n"
        "  ROOT %c = bf16[64,128]{1,0:T(8,128)(2,1)} copy(%x)"
    )
    assert (kernel.read, kernel.written) == (0, 64 * 128 * 2)


def test_what_starts_beside_other_work_is_counted_where_it_starts():
    kernel = only(
        X + "  %s = (f32[64,32]{1,0:T(8,128)S(1)}, f32[64,32]{1,0}, u32[]{:S(2)}) copy-start(%x)\n"
        "  ROOT %d = f32[64,32]{1,0:S(1)} copy-done(%s)"
    )
    assert (kernel.name, kernel.read, kernel.written) == ("s", 64 * 32 * 4, 0)
    asynchronous = (
        X + "  %f = ((f32[64,32]{1,0}), f32[1,32]{1,0}, u32[]) fusion-start(%x), kind=kLoop, "
        "calls=%fused\n  ROOT %d = f32[1,32]{1,0} fusion-done(%f)"
    )
    inside = (
        "  %a = f32[64,32]{1,0} parameter(0)\n  %i = s32[] constant(0)\n"
        "  ROOT %o = f32[1,32]{1,0} dynamic-slice(%a, %i, %i)"
    )
    kernel = only(asynchronous, ("fused", inside))
    assert (kernel.name, kernel.read, kernel.written) == ("f", 32 * 4, 32 * 4)


def test_what_moves_between_devices_is_left_out():
    entry = X + "  ROOT %r = f32[64,32]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add"
    assert read_kernels(program(entry, ("add", "  ROOT %a = f32[] parameter(0)"))) == []


@pytest.mark.parametrize(
    "op_name, part, direction",
    [
        ("jit(train_step)/jvp(mlp)/dot_general", "MLP", "forward"),
        ("jit(train_step)/transpose(jvp(qkv))/transpose(jvp())/add_any", "QKV", "back"),
        ("jit(train_step)/jvp()/while/body/checkpoint/attend/exp", "attention", "forward"),
        ("jit(train_step)/optimizer/mul", "optimiser", "update"),
        ("jit(train_step)/jit(_where)/select_n", "other", "update"),
    ],
)
def test_where_a_kernel_comes_from(op_name, part, direction):
    kernel = only(X + f'  ROOT %c = f32[64,32]{{1,0}} copy(%x), metadata={{op_name="{op_name}"}}')
    assert (kernel.part, kernel.direction) == (part, direction)


def test_a_fusion_without_a_name_has_that_of_what_is_in_it():
    kernel = only(
        X + "  ROOT %f = f32[64,32]{1,0} fusion(%x), kind=kLoop, calls=%fused",
        (
            "fused",
            "  %a = f32[64,32]{1,0} parameter(0)\n  ROOT %n = f32[64,32]{1,0} negate(%a), "
            'metadata={op_name="jit(train_step)/jvp(norm)/neg"}',
        ),
    )
    assert kernel.part == "norms"


def test_a_kernel_takes_as_long_as_the_slower_of_the_two_and_its_launch():
    x = "  %x = bf16[1000,1000]{1,0} parameter(0)\n"
    product = f"  %d = bf16[1000,1000]{{1,0}} dot(%x, %x), {DOT}\n"
    copy = "  ROOT %c = bf16[1000,1000]{1,0} copy(%d)"
    roofline = Roofline(tuple(read_kernels(program(x + product + copy))), CHIP)
    product, copy = (kernel.seconds(CHIP) for kernel in roofline.kernels)
    assert product == pytest.approx(2e9 / 1e9 + 1e-3) and copy == pytest.approx(4e6 / 1e8 + 1e-3)
    assert roofline.seconds == pytest.approx(product + copy)
    assert (roofline.launches, roofline.flops, roofline.bytes) == (2, 2e9, 8e6)
    (dearest, count, seconds), _ = roofline.dearest()
    assert (dearest.name, count, seconds) == ("d", 1, product)
    assert roofline.by(lambda kernel: kernel.part) == {"other": pytest.approx(product + copy)}


def test_kernels_that_do_the_same_are_told_as_one():
    copies = "".join(f"  %c{i} = f32[512,512]{{1,0}} copy(%x)\n" for i in range(3))
    text = program("  %x = f32[512,512]{1,0} parameter(0)\n" + copies + "  ROOT %t = () tuple()")
    ((_, count, seconds),) = Roofline(tuple(read_kernels(text)), CHIP).dearest()
    assert count == 3 and seconds == pytest.approx(3 * (2 * 2**20 / 1e8 + 1e-3))


def test_every_scope_is_set_somewhere():
    """Of a real step, on this machine: every part of it is told by name, in both directions."""
    from conftest import DIGITS, TINY

    from vit_jax.analysis import preflight
    from vit_jax.training.config_file import load_config
    from vit_jax.training.program import make_program
    from vit_jax.training.sharding import make_mesh

    config = load_config(DIGITS, [*TINY, "--config.augment.mixup=0.2"])
    plan, _, _ = preflight.open_plan(config)
    program = make_program(plan, make_mesh(config.mesh))
    text = program.step.lower(program.state, program.batch).as_text(debug_info=True)
    found = {scope for scope in PARTS if f"{scope}/" in text or f"({scope})" in text}
    assert found == set(PARTS) - {"resnet", "teacher"}


def test_flops_of_a_program_are_those_that_xla_counts():
    def loss(w, x):
        y = jnp.tanh(x @ w["a"]) @ w["b"]
        return jnp.sum(jnp.square(y))

    w = {"a": jnp.ones((64, 256)), "b": jnp.ones((256, 32))}
    compiled = jax.jit(jax.grad(loss)).lower(w, jnp.ones((512, 64))).compile()
    flops = sum(kernel.times * kernel.flops for kernel in read_kernels(compiled.as_text()))
    assert flops == 2 * 512 * (2 * 64 * 256 + 3 * 256 * 32)

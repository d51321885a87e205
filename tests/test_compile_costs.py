"""What is read from a compiled program: turns of loops, FLOPs of products, bytes of collectives by axis."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import toy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slm_jax.compile import costs
from slm_jax.compile.costs import Work
from slm_jax.compile.hlo import Program
from slm_jax.compile.programs import Run, train_steps
from slm_jax.mesh import MeshConfig, make_mesh
from slm_jax.train.phases import Phase

SIZE = 16


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=4))


def compiled(function, *shapes) -> Program:
    return Program(jax.jit(function).lower(*shapes).compile().as_text())


def sent(program: Program, mesh) -> dict[tuple[str, str], tuple[float, int]]:
    return {(x.kind, x.axes): (x.bytes, x.count) for x in costs.traffic(program, mesh)}


def work(model=toy.MODEL, mesh=None, **changes) -> Work:
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return dataclasses.replace(Work("train", model, mesh, 8, toy.SEQUENCE_LENGTH, 1, training=True), **changes)


@pytest.mark.parametrize("axes", [("fsdp",), ("data",), ("data", "fsdp")])
def test_a_reduction_over_named_axes(mesh, axes):
    """A ring of n chips sends 2 (n - 1) / n of the 64 bytes that each holds."""
    summed = jax.shard_map(lambda x: jax.lax.psum(x, axes), mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    program = compiled(summed, jax.ShapeDtypeStruct((SIZE,), jnp.float32))
    chips = 1
    for axis in axes:
        chips *= mesh.shape[axis]
    assert sent(program, mesh) == {("all-reduce", " and ".join(axes)): (2 * 4 * SIZE * (chips - 1) / chips, 1)}


def test_collectives_in_a_scanned_body_count_as_often_as_it_runs(mesh):
    def body(x, _):
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)  # each sends its 16 floats to 3 others
        ring = [(i, (i + 1) % 2) for i in range(2)]
        return jax.lax.ppermute(x + whole[:SIZE], "data", ring), None

    scanned = jax.shard_map(
        lambda x: jax.lax.scan(body, x, length=5)[0],
        mesh=mesh,
        in_specs=P("fsdp"),
        out_specs=P("fsdp"),
        check_vma=False,
    )
    found = sent(compiled(scanned, jax.ShapeDtypeStruct((4 * SIZE,), jnp.float32)), mesh)
    assert found[("all-gather", "fsdp")] == (5 * 3 * 4 * SIZE, 5)
    assert found[("collective-permute", "data")] == (5 * 4 * SIZE, 5)


def test_products_count_as_often_as_their_loops_turn():
    def scanned(x):
        inner = lambda x, _: (jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0], None)  # noqa: E731
        return jax.lax.scan(inner, x, length=7)[0]

    square = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
    found = costs.products(compiled(scanned, square), work())
    assert (found.counted, found.attention, found.head) == (3 * 7 * 2 * SIZE**3, 0, 0)


def test_a_split_product_counts_the_part_of_one_chip(mesh):
    rows = jax.ShapeDtypeStruct((8, SIZE), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    program = compiled(lambda x, y: x @ y, rows, jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32))
    assert costs.products(program, work()).counted == 2 * SIZE**2


def test_a_loop_whose_length_depends_on_the_data_is_taken_for_the_heads():
    def looped(x, turns):
        return jax.lax.fori_loop(0, turns, lambda _, x: x @ x, x)

    arguments = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    found = costs.products(compiled(looped, *arguments), work())
    tokens = 8 * toy.SEQUENCE_LENGTH
    assert found.counted == 0 and found.head == 6 * toy.MODEL.embed_dim * toy.MODEL.padded_vocab_size * tokens


# As the TPU compiler writes them: every product is a convolution, groups are named by a mesh, trip counts are left to
# the reader, and a gather that runs beside a product is in pieces that share a channel.
TPU_TEXT = """HloModule step, is_scheduled=true

%fused.1 (p.1: bf16[2,128], p.2: f32[4,128]) -> bf16[8,128] {
  %p.1 = bf16[2,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = f32[4,128]{1,0:T(8,128)} parameter(1)
  ROOT %gather.1 = bf16[8,128]{1,0} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}
}

%fused.2 (p.3: bf16[2,128]) -> bf16[8,128] {
  %p.3 = bf16[2,128]{1,0} parameter(0)
  ROOT %gather.2 = bf16[8,128]{1,0} all-gather(%p.3), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}
}

%body (carried: (s32[], bf16[2,128])) -> (s32[], bf16[2,128]) {
  %carried = (s32[]{:T(128)}, bf16[2,128]{1,0}) parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %i = s32[]{:T(128)} get-tuple-element(%carried), index=0
  %x = bf16[2,128]{1,0} get-tuple-element(%carried), index=1
  %copied = s32[]{:T(128)} copy(%i)
  %next = s32[]{:T(128)} add(%copied, %two), metadata={op_name="jit(step)/while/add"}
  %y = f32[4,128]{1,0} convert(%x)
  %first = bf16[8,128]{1,0} fusion(%x, %y), kind=kCustom, calls=%fused.1
  %second = bf16[8,128]{1,0} fusion(%x), kind=kCustom, calls=%fused.2
  ROOT %out = (s32[]{:T(128)}, bf16[2,128]{1,0}) tuple(%next, %x)
}

%condition (carried.1: (s32[], bf16[2,128])) -> pred[] {
  %carried.1 = (s32[]{:T(128)}, bf16[2,128]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(9)
  %i.1 = s32[]{:T(128)} get-tuple-element(%carried.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x.1: bf16[2,128]) -> bf16[2,128] {
  %x.1 = bf16[2,128]{1,0} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(%one)
  %tuple.1 = (s32[]{:T(128)}, bf16[2,128]{1,0}) tuple(%start, %x.1)
  %loop = (s32[]{:T(128)}, bf16[2,128]{1,0}) while(%tuple.1), condition=%condition, body=%body
  ROOT %result = bf16[2,128]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_what_the_tpu_compiler_writes(mesh):
    """The loop runs for i = 1, 3, 5, 7; its gather is one, of 3 x 512 bytes a turn."""
    program = Program(TPU_TEXT)
    [loop] = [run for run in program.executions() if run.instruction.opcode == "while"]
    assert program.trip_count(loop.instruction, loop.home) == 4
    assert sent(program, mesh) == {("all-gather", "fsdp"): (4 * 3 * 512, 4)}


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "fsdp"),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("replica_groups=[2,4]<=[8]", "fsdp"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "data"),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", "data"),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", "data and fsdp"),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", "fsdp"),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", "data"),
        ("replica_groups={}", "data and fsdp"),
    ],
)
def test_groups_of_chips_are_axes_of_the_mesh(groups, axes, mesh):
    text = f"""ENTRY %main (x: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} parameter(0)
  ROOT %sum = f32[4]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add
}}
"""
    [found] = costs.traffic(Program(text), mesh)
    assert found.axes == axes and found.kind == "all-reduce"


@pytest.mark.parametrize(
    "left, right, out, attributes, flops",
    [
        ("f32[8,16]", "f32[16,32]", "f32[8,32]", "dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
        ("f32[8,2,16]", "f32[2,16,32]", "f32[8,1,32]", "window={size=2}, dim_labels=b0f_0io->b0f", 2 * 8 * 32 * 32),
        # a product per head (4 of them) written as one whose kernel slides over holes
        (
            *("f32[4,8,16]", "f32[4,32,16]", "f32[4,8,32]"),
            *("window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf", 2 * 4 * 8 * 16 * 32),
        ),
        # a kernel that slides from padding to padding meets each of the 4 parts once
        (
            *("f32[8,1,16]", "f32[4,16,32]", "f32[8,4,32]"),
            *("window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=b0f_0io->b0f", 2 * 4 * 8 * 16 * 32),
        ),
    ],
)
def test_products_written_as_convolutions(left, right, out, attributes, flops):
    text = f"""ENTRY %main (x: f32[1]) -> f32[1] {{
  %left = {left}{{}} parameter(0)
  %right = {right}{{}} parameter(1)
  ROOT %product = {out}{{}} convolution(%left, %right), {attributes}
}}
"""
    assert costs.products(Program(text), work()).counted == flops


def test_a_product_that_cublas_computes():
    """Three of 8 x 16 by 16 x 32; as XLA writes it for GPUs."""
    text = """ENTRY %main (x: f32[1]) -> f32[1] {
  %left = f32[3,8,16]{2,1,0} parameter(0)
  %right = f32[3,16,32]{2,1,0} parameter(1)
  ROOT %x = (f32[3,8,32]{2,1,0}, s8[64]{0}) custom-call(%left, %right), custom_call_target="__cublas$lt$matmul", """
    text += """backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"""
    text += """"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
}
"""
    assert costs.products(Program(text), work()).counted == 3 * 2 * 8 * 16 * 32


@pytest.mark.parametrize(
    "target, name, products",
    [
        ("tpu_custom_call", "splash_mha_fwd_segmented_residuals.2", 2),
        ("tpu_custom_call", "splash_mha_dq_segmented", 3),
        ("tpu_custom_call", "splash_mha_dkv_segmented", 4),
        ("__cudnn$fmhaScaleBiasSoftmax", "dot_product_attention_fwd", 2),
        ("__cudnn$fmhaScaleBiasSoftmaxBackward", "dot_product_attention_bwd", 5),
    ],
)
@pytest.mark.parametrize("window, pairs", [(None, 16 * 16 / 2), (4, 4 * 16 - 8)])
def test_attention_kernels_count_what_they_must_compute(target, name, products, window, pairs):
    text = f"""ENTRY %main (x: f32[1]) -> f32[1] {{
  ROOT %x = f32[1]{{0}} custom-call(), custom_call_target="{target}", metadata={{op_name="s/{name}"}}
}}
"""
    found = costs.products(Program(text), work(dataclasses.replace(toy.MODEL, sliding_window=window)))
    assert found.attention == products * 2 * pairs * 8 * 2 * 16  # rows, heads, features of a head


def test_a_causal_step_counts_what_the_models_formula_says():
    """Without recomputation. Rows this short compute the whole square of attention, of which the formula has half."""
    model = dataclasses.replace(toy.MODEL, embed_dim=64, mlp_dim=128, remat="none", attention="xla")
    mesh, phase = make_mesh(devices=jax.devices()[:1]), Phase(1, mixture=[toy.MixtureComponent("nowhere")])
    [step] = train_steps(Run(model, [phase], mesh, 64, {}, {}))
    program = Program(step.compile().as_text())
    found = costs.products(program, step.work)
    assert found.head > 0 and found.total == pytest.approx(16 * 64 * model.flops_per_token(2 * 64), rel=0.02)

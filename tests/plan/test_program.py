"""Counting what a program does: exchanges and traffic in HLO text, products in jaxprs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxgpt.plan import flops, program

# A TPU's program, shortened: 3 micro-batches of 5 layers. The gather of a weight is asynchronous
# and shows in two pieces; the gradients of two weights are reduced and scattered in one kernel.
TPU = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%piece.1 (p: bf16[1,2,8]) -> bf16[1,8,8] {
  %p = bf16[1,2,8]{2,1,0} parameter(0)
  ROOT %all-gather.1 = bf16[1,8,8]{2,1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}, metadata={op_name="jit(step)/jvp(GPT)/up"}
}

%piece.2 (p: bf16[1,2,8]) -> bf16[1,8,8] {
  %p = bf16[1,2,8]{2,1,0} parameter(0)
  ROOT %all-gather.2 = bf16[1,8,8]{2,1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}, metadata={op_name="jit(step)/jvp(GPT)/up"}
}

%all-reduce-scatter.9 (x: f32[8,8], y: f32[8,4]) -> (f32[2,8], f32[2,4]) {
  %x = f32[8,8]{1,0} parameter(0)
  %y = f32[8,4]{1,0} parameter(1)
  %all-reduce.3 = (f32[8,8]{1,0}, f32[8,4]{1,0}) all-reduce(%x, %y), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %out = (f32[2,8], f32[2,4]) custom-call(%all-reduce.3), custom_call_target="slice"
}

%all-reduce-scatter.10 (z: f32[8,16]) -> f32[2,16] {
  %z = f32[8,16]{1,0} parameter(0)
  %all-reduce.4 = f32[8,16]{1,0} all-reduce(%z), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %out.2 = f32[2,16] custom-call(%all-reduce.4), custom_call_target="slice"
}

%layer (carry: (s32[], bf16[5,2,8])) -> (s32[], bf16[5,2,8]) {
  %carry = (s32[], bf16[5,2,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %kernel = (f32[8]{0}) custom-call(%i), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/splash"}
  %w = bf16[1,2,8]{2,1,0} custom-call(%i), custom_call_target="x"
  %start = bf16[1,8,8]{2,1,0} fusion(%w), kind=kCustom, calls=%piece.1
  %end = bf16[1,8,8]{2,1,0} fusion(%w), kind=kOutput, calls=%piece.2
  %g = f32[8,8]{1,0} custom-call(%i), custom_call_target="x"
  %h = f32[8,4]{1,0} custom-call(%i), custom_call_target="x"
  %scattered = (f32[2,8], f32[2,4]) fusion(%g, %h), kind=kCustom, calls=%all-reduce-scatter.9, metadata={op_name="jit(step)/transpose(jvp(GPT))/up"}
  %k = f32[8,16]{1,0} custom-call(%i), custom_call_target="x"
  %scattered.2 = f32[2,16] fusion(%k), kind=kCustom, calls=%all-reduce-scatter.10, metadata={op_name="jit(step)/transpose(jvp(GPT))/down"}
  ROOT %next = (s32[], bf16[5,2,8]{2,1,0}) tuple(%i, %w)
}

%five (carry: (s32[], bf16[5,2,8])) -> pred[] {
  %carry = (s32[], bf16[5,2,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %more = pred[] compare(%i, %n), direction=LT
}

%part (carry: (s32[], bf16[5,2,8])) -> (s32[], bf16[5,2,8]) {
  %carry = (s32[], bf16[5,2,8]{2,1,0}) parameter(0)
  ROOT %layers = (s32[], bf16[5,2,8]{2,1,0}) while(%carry), condition=%five, body=%layer
}

ENTRY %main (w: bf16[5,2,8]) -> f32[] {
  %w = bf16[5,2,8]{2,1,0} parameter(0)
  %start = (s32[], bf16[5,2,8]{2,1,0}) tuple(%w)
  %parts = (s32[], bf16[5,2,8]{2,1,0}) while(%start), condition=%five, body=%part, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %norm = f32[] all-reduce(%w), channel_id=9, replica_groups=[1,8]<=[8], to_apply=%add, metadata={op_name="norm"}
}
"""  # noqa: E501


def test_exchanges_are_multiplied_by_their_loops_and_pieces_are_one():
    norm, gather, scatter, other = program.read(TPU).collectives
    assert gather == program.Collective(
        "all-gather", "jit(step)/jvp(GPT)/up", 1, 8 * 8 * 2 * 3 / 4, 4, (3, 5)
    )
    assert scatter == program.Collective(
        "reduce-scatter", "jit(step)/transpose(jvp(GPT))/up", 2, (64 + 32) * 4 * 3 / 4, 4, (3, 5)
    )
    assert other[1:3] == ("jit(step)/transpose(jvp(GPT))/down", 1), "the same channel, not a piece"
    assert gather.times == 15 and not gather.backward and scatter.backward
    assert norm[:1] + norm[2:] == ("all-reduce", 1, 2 * 4 * 7 / 8, 8, ())


def compiled_traffic(function, *arrays) -> float:
    return program.read(jax.jit(function).lower(*arrays).compile().as_text()).memory_bytes


def test_traffic_reads_the_slices_of_a_stack_not_the_stack():
    stack_LD = jnp.ones((50, 1000))

    def add_layers(stack_LD, start_D):
        return jax.lax.scan(lambda x, y: (jnp.sin(x + y), None), start_D, stack_LD)[0]

    moved = compiled_traffic(add_layers, stack_LD, stack_LD[0])
    layer = 4000
    assert 3 * 50 * layer <= moved < 10 * 50 * layer, "a layer's read, its state's read and write"


PREFETCH = """HloModule jit_decode, is_scheduled=true

ENTRY %main (w: bf16[768,3072]) -> bf16[192,3072] {
  %w = bf16[768,3072]{1,0:T(8,128)(2,1)} parameter(0)
  %slice-start.8 = ((bf16[768,3072]{1,0:T(8,128)(2,1)}), bf16[192,3072]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:192], [0:3072]}
  ROOT %slice-done.8 = bf16[192,3072]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start.8)
}, execution_thread="sparsecore"
"""  # noqa: E501


def test_a_prefetch_into_on_chip_memory_reads_its_piece_once():
    assert program.read(PREFETCH).memory_bytes == pytest.approx(192 * 3072 * 2, abs=8)


@pytest.mark.parametrize(("groups", "size"), [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
    ("replica_groups=[2,8]<=[16]", 8),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 4),
    ("replica_groups=mesh['a'=1,'b'=4,'c'=1,'d'=8], device_ids=([8,4]T(1,0)) {'d'}", 8),
    ("source_target_pairs={{0,1},{1,0}}", 2),
])  # fmt: skip
def test_a_group_is_as_large_as_it_is_written(groups, size):
    assert program._group(f", channel_id=1, {groups}, dimensions={{1}}") == size


IN_PLACE = """HloModule jit_step, is_scheduled=true

%slice (s: bf16[30,8], n: s32[]) -> bf16[1,8] {
  %s = bf16[30,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = bf16[1,8]{1,0} dynamic-slice(%s, %n, %zero), dynamic_slice_sizes={1,8}
}

%fused (read: bf16[30,8], written: bf16[30,8], handed: f32[5], i: s32[]) -> (bf16[30,8], f32[5]) {
  %read = bf16[30,8]{1,0} parameter(0)
  %written = bf16[30,8]{1,0} parameter(1)
  %handed = f32[5]{0} parameter(2)
  %i = s32[]{:T(128)S(6)} parameter(3)
  %zero = s32[] constant(0)
  %layer = bf16[1,8]{1,0} fusion(%read, %i), kind=kLoop, calls=%slice
  %update = bf16[30,8]{1,0} dynamic-update-slice(%written, %layer, %i, %zero)
  ROOT %both = (bf16[30,8]{1,0}, f32[5]{0}) tuple(%update, %handed)
}

ENTRY %main (read: bf16[30,8], written: bf16[30,8], handed: f32[5], i: s32[]) -> (bf16[30,8], f32[5]) {
  %read = bf16[30,8]{1,0} parameter(0)
  %written = bf16[30,8]{1,0} parameter(1)
  %handed = f32[5]{0} parameter(2)
  %i = s32[] parameter(3)
  ROOT %step = (bf16[30,8]{1,0}, f32[5]{0}) fusion(%read, %written, %handed, %i), kind=kOutput, calls=%fused
}
"""  # noqa: E501


def test_a_fusion_reads_and_writes_one_layer_of_the_stacks_that_it_is_given():
    layer, index = 8 * 2, 4
    assert program.read(IN_PLACE).memory_bytes == pytest.approx(2 * layer, abs=index)


def test_exchanges_of_a_real_program_on_virtual_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    add = lambda x, _: (jax.lax.psum(jnp.sin(x), "data"), None)
    sum_up = jax.shard_map(
        lambda x: jax.lax.scan(add, x, None, 3)[0],
        mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False,
    )  # fmt: skip
    text = jax.jit(sum_up).lower(jnp.ones((8, 16))).compile().as_text()
    assert [(c.kind, c.bytes, c.loops) for c in program.read(text).collectives] == [
        ("all-reduce", 2 * 16 * 4 * 7 / 8, (3,))
    ]


def test_products_in_loops_count_every_time():
    a, b = np.ones((8, 16)), np.ones((16, 16))

    def loop(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a, None, length=7)[0]

    assert flops.count(jax.make_jaxpr(loop)(a, b)) == 7 * 2 * 8 * 16 * 16
    recomputed = jax.make_jaxpr(jax.grad(lambda a: jax.checkpoint(loop)(a, b).sum()))(a)
    assert flops.count(recomputed) == 2 * 7 * 2 * 8 * 16 * 16, "a product's input alone is no FLOP"


def test_products_agree_with_the_compilers_count():
    rngs = jax.random.split(jax.random.key(0), 2)
    a_BDF, b_BFD = (jax.random.normal(rng, (3, 32, 64)) for rng in rngs)
    product = jax.jit(lambda a, b: jnp.einsum("bdf,bef->bde", a, b))
    cost = product.lower(a_BDF, b_BFD).compile().cost_analysis()
    assert flops.count(product.trace(a_BDF, b_BFD).jaxpr) == pytest.approx(cost["flops"], rel=0.02)


def test_a_body_per_device_counts_on_every_device_that_has_its_own():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    product = jax.shard_map(
        lambda x: x @ x.T, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}
    )
    assert flops.count(jax.make_jaxpr(product)(np.ones((8, 5)))) == 4 * 2 * 2 * 2 * 5


CACHE = """HloModule jit_decode, is_scheduled=true

%turned (p: bf16[8,64]) -> bf16[64,8] {
  %p = bf16[8,64]{1,0} parameter(0)
  ROOT %bitcast.1 = bf16[64,8]{0,1} bitcast(%p)
}

%scores (cache: bf16[8,64], q: bf16[8]) -> bf16[64] {
  %cache = bf16[8,64]{1,0} parameter(0)
  %q = bf16[8]{0} parameter(1)
  %keys = bf16[64,8]{0,1} fusion(%cache), kind=kLoop, calls=%turned
  ROOT %dot = bf16[64]{0} dot(%keys, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (cache: bf16[8,64], q: bf16[8]) -> bf16[64] {
  %cache = bf16[8,64]{1,0} parameter(0)
  %q = bf16[8]{0} parameter(1)
  ROOT %scored = bf16[64]{0} fusion(%cache, %q), kind=kOutput, calls=%scores
}
"""


def test_what_is_read_through_another_shape_is_read():
    """A TPU's decoder reads its whole cache through fusions of a bitcast."""
    assert program.read(CACHE).memory_bytes == 2 * (8 * 64 + 8 + 64)

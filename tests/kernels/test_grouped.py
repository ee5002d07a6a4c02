"""The dropless mixture against running every expert on every token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.kernels import grouped

D, F = 16, 24


def inputs(rng, N, J, E):
    """Tokens, two kernels per expert, gates and choices; the last expert gets no token."""
    rngs = jax.random.split(rng, 5)
    arrays = (
        jax.random.normal(rngs[0], (N, D)),
        jax.random.normal(rngs[1], (E, D, F)) / 4,
        jax.random.normal(rngs[2], (E, F, D)) / 4,
        jax.random.uniform(rngs[3], (N, J)),
    )
    scores_NE = jax.random.normal(rngs[4], (N, E)).at[:, -1].set(-10)
    return arrays, jax.lax.top_k(scores_NE, J)[1]


def dropless(x_ND, up_EDF, down_EFD, gate_NJ, expert_NJ):
    layout = grouped.group_rows(expert_NJ, len(up_EDF))
    hidden_RF = grouped.grouped_matmul(grouped.gather(x_ND, layout), up_EDF, layout)
    hidden_RF = jnp.cos(hidden_RF).astype(x_ND.dtype)  # cos(0) = 1: filling rows are not zero
    return grouped.combine(grouped.grouped_matmul(hidden_RF, down_EFD, layout), gate_NJ, layout)


def every_expert(x_ND, up_EDF, down_EFD, gate_NJ, expert_NJ):
    hidden_ENF = jnp.cos(jnp.einsum("ND,EDF->ENF", x_ND, up_EDF))
    out_END = jnp.einsum("ENF,EFD->END", hidden_ENF, down_EFD)
    gate_NE = (jax.nn.one_hot(expert_NJ, len(up_EDF)) * gate_NJ[..., None]).sum(1)
    return jnp.einsum("END,NE->ND", out_END, gate_NE)


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, arrays, expert_NJ):
    out, pull = jax.vjp(lambda *a: function(*a, expert_NJ), *arrays)
    return out, *pull(jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


def assert_close(got, want, tolerance=1e-5):
    for x, y in zip(got, want, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, atol=tolerance * max(1, np.abs(y).max()))


# many tokens, uneven counts, one decoded token with fewer choices than experts, one choice
@pytest.mark.parametrize(("N", "J", "E"), [(300, 2, 4), (37, 2, 5), (1, 2, 8), (64, 1, 3)])
def test_dropless_matches_every_expert(rng, N, J, E):
    arrays, expert_NJ = inputs(rng, N, J, E)
    got = value_and_gradients(dropless, arrays, expert_NJ)
    assert_close(got, value_and_gradients(every_expert, arrays, expert_NJ))


def test_bf16_dropless_matches_every_expert(rng):
    (x, *rest), expert_NJ = inputs(rng, 64, 2, 4)
    got = value_and_gradients(dropless, (x.astype(jnp.bfloat16), *rest), expert_NJ)
    assert [y.dtype for y in got[:3]] == [jnp.float32, jnp.bfloat16, jnp.float32]
    assert_close(got, value_and_gradients(every_expert, (x, *rest), expert_NJ), 2e-2)


def test_all_tokens_may_choose_one_expert(rng):
    arrays, _ = inputs(rng, 50, 1, 6)
    expert_NJ = jnp.full((50, 1), 2)
    assert_close(
        value_and_gradients(dropless, arrays, expert_NJ),
        value_and_gradients(every_expert, arrays, expert_NJ),
    )


def test_each_block_holds_one_expert(rng):
    _, expert_NJ = inputs(rng, 37, 2, 5)
    layout = grouped.group_rows(expert_NJ, 5)
    np.testing.assert_array_equal(layout.expert_R[layout.row_AJ], expert_NJ)
    np.testing.assert_array_equal(
        layout.choice_R[layout.row_AJ], jnp.arange(expert_NJ.size).reshape(expert_NJ.shape)
    )
    assert len(set(layout.row_AJ.ravel().tolist())) == expert_NJ.size


def deep(arrays, expert_NJ, remat):
    """Three layers under a scan, as in the model."""

    def layer(x_ND, kernels):
        return x_ND + dropless(x_ND, *kernels, arrays[3], expert_NJ), None

    stack = tuple(jnp.stack([k, 2 * k, -k]) for k in arrays[1:3])
    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, arrays[0], stack)[0].sum()


def test_dropless_under_scan_is_the_same_with_remat_and_on_eight_devices(rng):
    arrays, expert_NJ = inputs(rng, 64, 2, 4)
    step = lambda remat: jax.jit(jax.value_and_grad(lambda a, e: deep(a, e, remat)))
    value, gradients = step(False)(arrays, expert_NJ)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = (P("data"), P(None, None, "tensor"), P(None, "tensor"), P("data"))
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    placed = tuple(place(x, s) for x, s in zip(arrays, specs, strict=True))
    with jax.set_mesh(mesh):
        sharded = step(True)(placed, place(expert_NJ, P("data")))
    for got in (step(True)(arrays, expert_NJ), sharded):
        assert_close((got[0], *got[1]), (value, *gradients))


@pytest.mark.parametrize(("N", "most"), [(200, grouped.MOST_COPIED), (200, 0), (37, 0)])
def test_what_a_gpu_runs_matches_every_expert(rng, monkeypatch, N, most):
    """Blocks all at once, or one by one where copies of the kernels would be too large, and the
    ragged product of few rows; on this CPU.
    """
    monkeypatch.setattr(grouped, "platform", lambda: "gpu")
    monkeypatch.setattr(grouped, "MOST_COPIED", most)
    arrays, expert_NJ = inputs(rng, N, 2, 5)
    own = lambda *a: dropless(*a)  # another function: not the one compiled for CPU
    assert_close(
        value_and_gradients(own, arrays, expert_NJ),
        value_and_gradients(every_expert, arrays, expert_NJ),
    )


@pytest.mark.parametrize("N", [37, 640])  # filled up to a tile; 1,280 rows, tiles of 256
def test_a_tpus_gradient_of_the_kernels_matches_every_expert(rng, monkeypatch, N):
    """Its kernel as interpreted; the last expert has no rows, and a gradient of zero."""
    kernel = grouped.ragged_matmul
    monkeypatch.setattr(grouped, "platform", lambda: "tpu")
    monkeypatch.setattr(grouped, "ragged_matmul", lambda *a: kernel(*a, True))
    arrays, expert_NJ = inputs(rng, N, 2, 5)
    own = lambda *a: dropless(*a)
    assert_close(
        value_and_gradients(own, arrays, expert_NJ),
        value_and_gradients(every_expert, arrays, expert_NJ),
    )


def test_rows_behind_the_last_group_have_no_part_in_a_gradient(rng):
    rows_RD, kernel_EDF, sizes_E = jnp.ones((256, D)), jnp.ones((3, D, F)), jnp.array([100, 0, 30])
    matmul = lambda kernel_EDF: grouped.ragged_matmul(rows_RD, kernel_EDF, sizes_E, True)
    (gradient_EDF,) = jax.vjp(matmul, kernel_EDF)[1](jnp.ones((256, F)))  # of all rows
    np.testing.assert_array_equal(gradient_EDF[:, 0, 0], sizes_E)


@pytest.mark.slow
def test_on_a_tpu_a_gradient_costs_as_much_as_the_product():
    """Autodiff's would take every expert's product with every row: 8 times as many."""
    pytest.importorskip("libtpu")
    from jaxgpt.plan import devices

    placed = SingleDeviceSharding(devices.topology("v5e:2x2")[0])
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype, sharding=placed)
    arrays = (
        shape("bfloat16", 2048, 256), shape("bfloat16", 8, 256, 512), shape("int32", 8),
        shape("bfloat16", 2048, 512),
    )  # fmt: skip
    product = 2 * 2048 * 256 * 512

    def gradients(matmul, rows_RD, kernel_EDF, sizes_E, g_RF):
        return jax.vjp(lambda x, y: matmul(x, y, sizes_E), rows_RD, kernel_EDF)[1](g_RF)

    cost = lambda matmul: (
        jax.jit(partial(gradients, matmul))
        .trace(*arrays)
        .lower()
        .compile()
        .cost_analysis()["flops"]
    )
    assert cost(grouped.ragged_matmul) < 2.2 * product
    assert cost(jax.lax.ragged_dot) > 8 * product

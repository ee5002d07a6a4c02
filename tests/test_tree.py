"""Names, rules and partitions of pytrees."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgpt import tree


class Pair(NamedTuple):
    left: dict
    right: list


NESTED = Pair({"b": {"kernel": jnp.arange(3)}, "a": jnp.ones((2, 2))}, [jnp.zeros(4)])


def test_names_are_key_paths_of_dicts_tuples_and_lists():
    assert list(tree.flatten(NESTED)) == ["left/a", "left/b/kernel", "right/0"]


def test_unflatten_inverts_flatten():
    renumbered = {name: leaf + 1 for name, leaf in tree.flatten(NESTED).items()}
    rebuilt = tree.unflatten(NESTED, renumbered)
    assert jax.tree.structure(rebuilt) == jax.tree.structure(NESTED)
    np.testing.assert_array_equal(rebuilt.left["b"]["kernel"], [1, 2, 3])


def test_map_named_gives_names_and_all_trees():
    sizes = tree.map_named(lambda name, a, b: (name, a.size + b.size), NESTED, NESTED)
    assert sizes.right == [("right/0", 8)]


def test_the_first_rule_that_is_found_wins():
    rules = [("kernel$", 1), ("b/", 2), ("", 3)]
    found = [tree.first_match(rules, name) for name in ("b/kernel", "b/bias", "a")]
    assert found == [1, 2, 3]
    assert tree.first_match([("x", 1)], "b/kernel") is None


def test_combine_inverts_partition():
    chosen, rest = tree.partition(NESTED, "kernel$")
    assert list(tree.flatten(chosen)) == ["left/b/kernel"]
    assert list(tree.flatten(rest)) == ["left/a", "right/0"]
    both = tree.combine(chosen, rest)
    assert jax.tree.structure(both) == jax.tree.structure(NESTED)
    np.testing.assert_array_equal(both.left["b"]["kernel"], NESTED.left["b"]["kernel"])
    np.testing.assert_array_equal(both.right[0], NESTED.right[0])


def test_either_half_passes_through_grad_and_an_optimizer():
    params = {"trained": jnp.array([1.0, 2.0]), "frozen": jnp.array([3.0, 4.0])}
    chosen, rest = tree.partition(params, "^trained")
    product = lambda part: jnp.prod(jnp.concatenate(jax.tree.leaves(tree.combine(part, rest))))
    grads = jax.grad(product)(chosen)
    np.testing.assert_allclose(grads["trained"], [24, 12])
    assert grads["frozen"] is None
    assert tree.count(optax.adam(1.0).init(chosen)) == 2 * 2 + 1  # two moments and a counter


def test_count_adds_up_all_numbers():
    assert tree.count(NESTED) == 3 + 4 + 4

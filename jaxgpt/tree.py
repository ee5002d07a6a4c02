"""Pytrees by name: path names, first-match rules, partition and combine."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def name_of(path: tuple[Any, ...]) -> str:
    """A key path as a slash-separated name: `policy/blocks/attention/query/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def flatten(tree: Any) -> dict[str, Any]:
    """Every leaf by its name, in the tree's own order."""
    return {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def unflatten(like: Any, leaves: dict[str, Any]) -> Any:
    """The tree shaped as `like` whose leaves are taken from `leaves` by name."""
    return map_named(lambda name, _: leaves[name], like)


def nest(leaves: Mapping[str, Any]) -> Any:
    """{"a/b": x} -> {"a": {"b": x}}."""
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function sees the leaf's name first."""
    return jax.tree.map_with_path(lambda path, *leaves: fn(name_of(path), *leaves), tree, *rest)


def first_match(rules: Iterable[tuple[str, T]], name: str) -> T | None:
    """The value of the first rule whose regular expression is found in `name`."""
    return next((value for pattern, value in rules if re.search(pattern, name)), None)


def partition(tree: Any, pattern: str) -> tuple[Any, Any]:
    """Splits into (matching, rest): two trees of the same shape with None where the other has it.

    JAX sees None as an empty subtree, so either half goes through `jit`, `grad` and optax as it is.
    """
    found = re.compile(pattern).search
    chosen = map_named(lambda name, leaf: leaf if found(name) else None, tree)
    rest = map_named(lambda name, leaf: None if found(name) else leaf, tree)
    return chosen, rest


def combine(first: Any, second: Any) -> Any:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None
    )


def count(tree: Any) -> int:
    """How many numbers the tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

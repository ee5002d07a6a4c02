"""Devices to plan for that need not be here."""

import os
from typing import Any


def topology(name: str) -> list[Any]:
    """The devices of a TPU slice, such as v5e:4x4, known to the TPU's own compiler.

    Raises:
        ValueError: libtpu is not installed, or does not know the slice.
    """
    # The compiler must not look for the machine that it is to compile for.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it only compiles
    }.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    # A v4's two cores are one device of JAX, but to the compiler only if told so.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except Exception as error:  # of whatever type the plugin raises
        reason = " ".join(str(error).split())
        signs = ("libtpu", "not installed", "not found", "No such")
        hint = (
            'pip install "jaxgpt[tpu]"'
            if any(sign in reason for sign in signs)
            else "such as v5e:4x4 or v5p:4x4x8"
        )
        raise ValueError(f"topology={name}: {reason:.160}; {hint}") from None

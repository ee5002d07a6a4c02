"""OLMo 2 and 3, EXAONE 4: norms after attention and MLP, and over queries and keys."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxgpt.convert import table
from jaxgpt.convert.family import changed
from jaxgpt.convert.llama import (
    ENDS,
    FIXED,
    GATED_MLP,
    KV_HEADS,
    LAYER,
    PROJECTIONS,
    QK_NORM,
    SETTINGS,
    UNBIASED,
    every,
)
from jaxgpt.convert.rope import refuse

NORMS = table.rows("""
    attention_norm/scale        post_attention_layernorm.weight    dim
    mlp_norm/scale              post_feedforward_layernorm.weight  dim
""", LAYER)  # fmt: skip
WIDE_QK_NORM = table.rows("""
    attention/query_norm/scale  self_attn.q_norm.weight            (heads width)
    attention/key_norm/scale    self_attn.k_norm.weight            (kv_heads width)
""", LAYER)  # fmt: skip

OLMO2 = replace(
    UNBIASED,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    fixed=FIXED | {"norm_place": "after", "qk_norm": True, "qk_norm_over": "width"},
    settings=changed(SETTINGS, norm_eps=("rms_norm_eps", 1e-5)),
    table=ENDS + PROJECTIONS + GATED_MLP + NORMS + WIDE_QK_NORM,
    neutral={"attention_bias": False},
)
# OLMo 2 with windows in three layers of four, which no RoPE scaling stretches.
OLMO3 = replace(
    OLMO2,
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    settings=changed(OLMO2.settings, sliding_window=("sliding_window", 4096)),
    rope_base=5e5,
    rope_local=("", 5e5),
    layers=lambda theirs, count: every("", theirs, 4),
)


def _windows(theirs: Mapping[str, Any], count: int) -> str:
    if theirs.get("sliding_window", 4096) is None:
        return "G"
    return every("sliding_window_pattern", theirs, 4)


def _exaone(theirs: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Layers without a window have no positions, where others have one."""
    pattern = ours["layer_pattern"]
    if theirs.get("sliding_window", 4096) is None or (ours["sliding_window"] and not pattern):
        return {}
    if pattern and pattern.index("G") == len(pattern) - 1:
        return {"rope_skip": len(pattern)}
    kinds = theirs.get("layer_types")
    refuse("layer_types", kinds, "must have full_attention in every n-th layer alone, or "
           "everywhere with sliding_window=null")  # fmt: skip


EXAONE4 = replace(
    OLMO2,
    model_type="exaone4",
    architecture="Exaone4ForCausalLM",
    fixed=FIXED | {"norm_place": "after", "qk_norm": True},
    settings=changed(
        OLMO2.settings, num_kv_heads=(KV_HEADS, 32), sliding_window=("sliding_window", 4096)
    ),
    table=ENDS + PROJECTIONS + GATED_MLP + NORMS + QK_NORM,
    layers=_windows,
    inert=("sliding_window_pattern",),
    derived=_exaone,
)

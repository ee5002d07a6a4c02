"""An Inspection as the JSON that page.html draws, and the page as one file that needs no server.

Axes of this file: A places between blocks, J a token's experts, C the likeliest tokens, U stretches
of a text.
"""

import base64
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt import inspect
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.inspect import Comparison, Inspection

PAGE = Path(__file__).with_name("page.html")
SLOT = "<!-- data of a page without a server -->"
NUM_TOP = 12  # likeliest tokens that are shown of a distribution
NUM_LENS = 5  # likeliest tokens of a layer


def view(found: Inspection, tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    """Tokens, their probabilities before and after truncation, what else was likely, experts.

    `p` and `q` are a token's probability before and after truncation, null for the first; `top`
    holds [id, p, q] of the likeliest tokens after each one; `words` the texts of all ids.
    """
    cfg, tokens_T = found.config, found.tokens_T
    p_TV, q_TV = np.exp(found.logprobs_TV), np.exp(found.truncated_TV)
    places_T = np.arange(len(tokens_T) - 1)
    of_token = lambda x_TV: [None, *_rounded(x_TV[places_T, tokens_T[1:]])]
    ids_TC = np.argsort(-found.logprobs_TV, axis=-1, kind="stable")[:, :NUM_TOP]
    top = [
        [[int(i), *_rounded((p_TV[t, i], q_TV[t, i]))] for i in ids_C]
        for t, ids_C in enumerate(ids_TC)
    ]
    entropy_T = -(p_TV * np.where(p_TV > 0, found.logprobs_TV, 0)).sum(-1)
    drawn = {
        "model": name, "layers": cfg.num_layers, "heads": cfg.num_heads, "experts": cfg.num_experts,
        "start": found.start, "tokens": tokens_T.tolist(), "texts": found.texts,
        "bytes": [len(piece) for piece in found.pieces], "p": of_token(p_TV), "q": of_token(q_TV),
        "entropy": _rounded(entropy_T), "top": top, "words": words(tokenizer, ids_TC),
    }  # fmt: skip
    if found.expert_LTJ is not None and found.gate_LTJ is not None:
        gates = [[_rounded(gate_J) for gate_J in layer_TJ] for layer_TJ in found.gate_LTJ]
        drawn |= {"expert": found.expert_LTJ.tolist(), "gate": gates}
    return drawn


def lens(found: Inspection, tokenizer: Tokenizer) -> dict[str, Any]:
    """The likeliest next tokens by each place between blocks: ids and p, each [A][T][C]."""
    ids_ATC, logprobs_ATC = found.lens_top(min(NUM_LENS, found.config.vocab_size))
    shares_ATC = np.exp(logprobs_ATC).round(4)
    return {"ids": ids_ATC.tolist(), "p": shares_ATC.tolist(), "words": words(tokenizer, ids_ATC)}


def attention(found: Inspection, layer: int) -> str:
    """What the heads of a layer read: of each head the rows t = 0, 1, … with their t + 1 weights.

    A byte is 255 times the weight's square root; all are zipped and written in base 64.
    """
    weights_NTS = found.attention(layer)
    rows, columns = np.tril_indices(weights_NTS.shape[-1])
    codes = np.sqrt(weights_NTS[:, rows, columns]).clip(0, 1) * 255
    zipped = gzip.compress(codes.round().astype(np.uint8).tobytes(), mtime=0)
    return base64.b64encode(zipped).decode()


def heads(scores_LN: np.ndarray) -> list[list[float]]:
    """Induction scores; zero where a text repeats nothing."""
    return np.nan_to_num(scores_LN).round(3).tolist()


def comparison(found: Comparison) -> dict[str, Any]:
    """Stretches with their log p by both models, null where nothing predicts them."""
    plain = lambda x_U: [None if np.isnan(x) else round(float(x), 4) for x in x_U]
    divergence = None if found.divergence_T is None else plain(found.divergence_T)
    return {
        "texts": found.texts, "first": plain(found.first_U), "second": plain(found.second_U),
        "divergence": divergence,
    }  # fmt: skip


def words(tokenizer: Tokenizer, ids: np.ndarray) -> dict[int, str]:
    """What ids write when they follow another token."""
    some = [int(i) for i in np.unique(ids)]
    after = {i: [*inspect.pieces(tokenizer, [some[0], i])][1] for i in some}
    return {i: piece.decode(errors="backslashreplace") for i, piece in after.items()}


def document(inspections: Iterable[tuple[str, Inspection, Tokenizer, np.ndarray]]) -> str:
    """The page with all it shows inside: one model's view of a text, or two to compare.

    Args:
        inspections: (name of the model, what it saw, its tokenizer, its induction scores).
    """
    found = list(inspections)
    views = [
        view(seen, tokenizer, name)
        | {
            "lens": lens(seen, tokenizer), "induction": heads(scores_LN),
            "attention": [attention(seen, layer) for layer in range(seen.config.num_layers)],
        }
        for name, seen, tokenizer, scores_LN in found
    ]  # fmt: skip
    data: dict[str, Any] = {"views": views}
    if len(found) == 2:
        data["comparison"] = comparison(inspect.compare(found[0][1], found[1][1]))
    # A text may hold </script>.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(SLOT) == 1
    return page.replace(SLOT, f'<script type="application/json" id="data">{text}</script>')


def _rounded(values: Iterable[float]) -> list[float]:
    """Five significant digits: JSON needs no more."""
    return [float(f"{value:.5g}") for value in values]

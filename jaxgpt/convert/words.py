"""How a text is cut into words before byte-level BPE, by the names of GGUF's tokenizer.ggml.pre.

The expressions and aliases are llama.cpp's (src/llama-vocab.cpp); each cuts what the one before it
has left whole.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxgpt.data import engines

# ByteLevel has it built in.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}"
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LETTERS = [rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}{a}{LOWER}{b}" for a, b in ("*+", "+*")]
SIGNS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}"
TEKKEN = "|".join([*LETTERS, r"\p{N}", SIGNS])
GPT4O = "|".join([*(f"{word}{SHORT}?" for word in LETTERS), r"\p{N}{1,3}", SIGNS])
MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    MARKS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + BLANKS,
)
HAN = "[一-龥ࠀ-一가-\ud7ff]+"
SEED = LLAMA3.replace(r"{1,3}|", "|").replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")


DIGITS = {"type": "Digits", "individual_digits": True}


class Words(NamedTuple):
    """The rules of one kind of tokenizer."""

    cuts: tuple[str, ...]
    whole_words: bool = False  # a word that is a token is not put together from its letters
    begins: bool = False  # texts begin with bos where the file does not say otherwise
    composed: bool = False  # letters and their accents become one character first


_KINDS: dict[str, Words] = {
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe "
    "gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4": Words(
        (GPT2,)
    ),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": Words(
        (r"\p{N}", GPT2)
    ),
    "qwen2 deepseek-r1-qwen": Words((QWEN2,), composed=True),
    "qwen35": Words((QWEN35,), composed=True),
    "stablelm2 kormo f2llmv2 megrez hunyuan grok-2 solar-open": Words((QWEN2,)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": Words(
        (LLAMA3,), whole_words=True, begins=True
    ),
    "dbrx smaug-bpe smollm3 chatglm-bpe": Words((LLAMA3,)),
    "glm4 glm5": Words((LLAMA3,), whole_words=True),
    "tekken": Words((TEKKEN,), whole_words=True, begins=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": Words((GPT4O,)),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": Words(DEEPSEEK3),
    "deepseek-coder": Words((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, r"\p{N}")),
    "seed-coder": Words((SEED,)),
    "falcon": Words((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")),
    "default": Words((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
KINDS = {name: kind for names, kind in _KINDS.items() for name in names.split()}


def pre_tokenizer(kind: Words) -> dict[str, Any]:
    """tokenizer.json's entry: the cuts, and then bytes as letters."""
    own = kind.cuts[-1] == GPT2
    return _sequence([_split(cut) for cut in (kind.cuts[:-1] if own else kind.cuts)], own)


def name_of(definition: Mapping[str, Any]) -> str | None:
    """The first name of the rules by which a tokenizer.json cuts words; None: there is none."""
    whole = definition["model"].get("ignore_merges", False)
    composed = definition.get("normalizer") == {"type": "NFC"}
    cuts = _plain(definition.get("pre_tokenizer"))
    for name, kind in KINDS.items():
        same = cuts in map(_plain, _forms(kind))
        if same and (kind.whole_words, kind.composed) == (whole, composed):
            return name
    return None


def _forms(kind: Words) -> list[dict[str, Any]]:
    """The entries of tokenizer.json that cut so."""
    usual = pre_tokenizer(kind)
    *cuts, last = usual["pretokenizers"]
    digits = [DIGITS if cut == _split(r"\p{N}") else cut for cut in cuts]
    found = [usual, _sequence(digits, last["use_regex"])]
    if last["use_regex"]:  # as our own GPT-2 has it
        found.append(_sequence([*cuts, _split(engines.GPT2_PATTERN)], False))
    return found if cuts else [*found, last]


def _split(cut: str) -> dict[str, Any]:
    return {
        "type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


def _sequence(cuts: list[dict[str, Any]], use_regex: bool) -> dict[str, Any]:
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {"type": "Sequence", "pretokenizers": [*cuts, {**letters, "use_regex": use_regex}]}


def _plain(entry: Any) -> Any:
    """The entry without what changes no id."""
    if isinstance(entry, list):
        return [_plain(item) for item in entry]
    if isinstance(entry, dict):
        return {key: _plain(item) for key, item in entry.items() if key != "trim_offsets"}
    return entry

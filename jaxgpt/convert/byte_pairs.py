"""tekken.json, or vocab.json with merges.txt, as the tokenizer.json that computes the same."""

import base64
from typing import Any

from jaxgpt.convert import tokenizer_files, words
from jaxgpt.data import engines

# Those of a tekken.json that lists none.
TEKKEN = """
    <unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS]
    [/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX]
    [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]
"""
# How the classes of transformers cut words: a name in words.KINDS.
CLASSES = {"GPT2Tokenizer": "gpt-2", "CodeGenTokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}


def complete(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a tokenizer, with a tokenizer.json where others alone have the vocabulary.

    Raises:
        ValueError: a damaged file, or words that are cut in a way that no file here tells.
    """
    if "tokenizer.json" in files:
        return files
    if "tekken.json" in files:
        return _tekken(files)
    return _pairs(files) if files.keys() >= {"vocab.json", "merges.txt"} else files


def _tekken(files: dict[str, bytes]) -> dict[str, bytes]:
    """Mistral's: special tokens come first, then tokens by rank, cut as one expression says."""
    told = engines.parse_json(files["tekken.json"], "tekken.json")
    try:
        settings = told["config"]
        apart, count = settings["default_num_special_tokens"], settings["default_vocab_size"]
        named = told.get("special_tokens") or [
            {"rank": i, "token_str": text} for i, text in enumerate(TEKKEN.split())
        ]
        tokens = [f"<SPECIAL_{i}>" for i in range(apart)]
        for entry in named:
            tokens[entry["rank"]] = entry["token_str"]
        held = [base64.b64decode(entry["token_bytes"]) for entry in told["vocab"][: count - apart]]
        merges = engines.merges_of({token: i for i, token in enumerate(held)})
    except (KeyError, TypeError, IndexError, ValueError, AssertionError) as error:
        raise ValueError(f"tekken.json: is damaged ({type(error).__name__}: {error})") from None
    if settings.get("pattern") != words.TEKKEN:
        raise ValueError("tekken.json: config.pattern: cuts words in another way than is known")
    letters = engines.byte_chars()
    tokens += ["".join(letters[byte] for byte in token) for token in held]
    made = tokenizer_files.byte_level(
        tokens, [" ".join(pair) for pair in merges], range(apart), "tekken"
    )
    kept = {name: content for name, content in files.items() if name != "tekken.json"}
    known = lambda token: token if token in tokens else None
    return tokenizer_files.with_settings(
        {"tokenizer.json": made["tokenizer.json"]} | kept,
        bos_token=known("<s>"), eos_token=known("</s>"), pad_token=known("<pad>"),
        unk_token=known("<unk>"), add_bos_token=True,
    )  # fmt: skip


def _pairs(files: dict[str, bytes]) -> dict[str, bytes]:
    """GPT-2's two files, with the tokens that were added to them; as they are, if that is all."""
    told = engines.parse_json(files.get("tokenizer_config.json", b"{}"), "tokenizer_config.json")
    kind = str(told.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    vocab = engines.parse_json(files["vocab.json"], "vocab.json")
    beside = engines.parse_json(files.get("added_tokens.json", b"{}"), "added_tokens.json")
    named = tokenizer_files.special_tokens(files).values()
    added: dict[str, Any] = {t: {"id": i, "special": t in named} for t, i in beside.items()}
    try:
        for i, entry in told.get("added_tokens_decoder", {}).items():
            added[entry["content"]] = {"id": int(i), "special": entry.get("special", False)}
        ids = vocab | {text: entry["id"] for text, entry in added.items()}
        places = {i: text for text, i in ids.items()}
        tokens = [places.get(i, f"<|unused_{i}|>") for i in range(max(places) + 1)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"vocab.json: does not fit the tokens beside it ({error})") from None
    if kind == "GPT2Tokenizer" and ids == vocab:
        return files
    if kind not in CLASSES:
        raise ValueError(
            f"tokenizer_config.json: tokenizer_class={kind!r:.80}: how it cuts words is not said "
            "by vocab.json and merges.txt; add its tokenizer.json"
        )
    unused = [i for i in range(len(tokens)) if i not in places]
    special = unused + [entry["id"] for entry in added.values() if entry["special"]]
    whole = [entry["id"] for entry in added.values() if not entry["special"]]
    lines = files["merges.txt"].decode("utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    made = tokenizer_files.byte_level(tokens, merges, sorted(special), CLASSES[kind], whole)
    return {"tokenizer.json": made["tokenizer.json"]} | files

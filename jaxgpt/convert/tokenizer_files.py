"""The files of a tokenizer as Hugging Face names them: read, checked, or made from a vocabulary."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt.convert import tensors

NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
SPACE = "▁"  # sentencepiece's visible space

# How a text is cut into words before byte-level BPE, by GGUF's tokenizer.ggml.pre.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|")
WORDS = {
    "gpt-2": None, "default": None, "smollm": None,
    "qwen2": QWEN2_WORDS, "llama-bpe": LLAMA3_WORDS,
}  # fmt: skip


def read(path: str | Path) -> dict[str, bytes]:
    """Every tokenizer file of a directory, whole.

    Raises:
        ValueError: a file that should hold JSON or UTF-8 text does not.
    """
    found = {name: Path(path) / name for name in NAMES if (Path(path) / name).is_file()}
    for name, file in found.items():
        if name.endswith(".json"):
            tensors.read_json(file)
        elif name != "tokenizer.model":
            try:
                file.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: not UTF-8 text ({error})") from None
    return {name: file.read_bytes() for name, file in found.items()}


def chat_template(files: dict[str, bytes]) -> str | None:
    """The Jinja source of the chat template, where one is given."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    found = _content(files, "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several by name
        entries = [entry for entry in found if isinstance(entry, dict)]
        found = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    if found is not None and not isinstance(found, str):
        raise ValueError(f"tokenizer_config.json: chat_template={found!r:.80}: must be text")
    return found


def special_ids(files: dict[str, bytes]) -> dict[str, Any]:
    """bos_token_id, eos_token_id (an id or several) and pad_token_id, as far as they are told."""
    settings, told = (_content(files, f"{n}_config.json") for n in ("tokenizer", "generation"))
    added = _content(files, "tokenizer.json").get("added_tokens", [])
    if not isinstance(added, list) or not all(
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and type(token.get("id")) is int
        for token in added
    ):
        raise ValueError(
            "tokenizer.json: added_tokens must be a list of tokens with id and content"
        )
    id_of = {token["content"]: token["id"] for token in added}
    ids = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        value = told.get(f"{name}_id", id_of.get(text) if isinstance(text, str) else None)
        if value is not None:
            if not all(type(i) is int for i in (value if isinstance(value, list) else [value])):
                raise ValueError(f"generation_config.json: {name}_id={value!r:.80}: must be ids")
            ids[f"{name}_id"] = value
    return ids


def byte_level(
    tokens: Sequence[str], merges: Sequence[str], special: Sequence[int], words: str
) -> dict[str, bytes]:
    """GPT-2's kind of BPE. `words` is a key of WORDS."""
    if words not in WORDS:
        raise ValueError(f"tokenizer.ggml.pre={words!r:.80}: must be one of {', '.join(WORDS)}")
    pattern = WORDS[words]
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cut: list[dict[str, Any]] = []
    if words == "smollm":
        cut = [{"type": "Digits", "individual_digits": True}]
    elif pattern:
        regex = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        cut = [{**regex, "invert": False}]
    return _files(
        tokens,
        special,
        merges=[merge.split(" ") for merge in merges],
        normalizer={"type": "NFC"} if words == "qwen2" else None,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [*cut, {**letters, "use_regex": not pattern}],
        },
        decoder={**letters, "use_regex": True},
        ignore_merges=words == "llama-bpe",
    )


def sentencepiece(
    tokens: Sequence[str], scores: Sequence[float], special: Sequence[int], unknown: int
) -> dict[str, bytes]:
    """sentencepiece's BPE, where the pair whose union has the highest score merges first."""
    id_of = {token: i for i, token in enumerate(tokens)}
    joined = sorted(
        (-scores[i], left + right, left, right)
        for token, i in id_of.items()
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if left in id_of and right in id_of
    )
    replace = lambda old, new: {"type": "Replace", "pattern": {"String": old}, "content": new}
    return _files(
        tokens,
        special,
        merges=[[left, right] for _, _, left, right in joined],
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace(" ", SPACE)],
        },
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                replace(SPACE, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        byte_fallback=True,
        fuse_unk=True,
        unk_token=tokens[unknown],
    )


def with_settings(files: dict[str, bytes], **settings: Any) -> dict[str, bytes]:
    """The files with these settings in tokenizer_config.json."""
    old = _content(files, "tokenizer_config.json")
    new = old | {name: value for name, value in settings.items() if value is not None}
    new.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    return files | {"tokenizer_config.json": json.dumps(new, ensure_ascii=False).encode()}


def _content(files: dict[str, bytes], name: str) -> dict[str, Any]:
    return tensors.parse_json(files.get(name, b"{}"), name)


def _files(
    tokens: Sequence[str],
    special: Sequence[int],
    *,
    merges: list[list[str]],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    **model: Any,
) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json; the library itself says whether they are sound."""
    import tokenizers

    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], **plain, "special": True} for i in sorted(special)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False, **model,
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip
    content = json.dumps(definition, ensure_ascii=False)
    try:
        tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"the tokenizer's vocabulary is not sound ({error})") from None
    return with_settings({"tokenizer.json": content.encode()})

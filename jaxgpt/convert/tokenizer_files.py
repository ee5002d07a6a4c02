"""The files of a tokenizer as Hugging Face names them: read, checked, or made from a vocabulary."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxgpt import files as paths
from jaxgpt.convert import tensors, words
from jaxgpt.data import engines

# A model's tokenizer.json is asked for five times while it is opened.
_parsed = lru_cache(maxsize=4)(engines.parse_json)

NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "tekken.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
# The names by which transformers gives special tokens to a template.
NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
SPACE = "▁"  # sentencepiece's visible space


def read(path: str | Path) -> dict[str, bytes]:
    """Every tokenizer file of a directory, whole.

    Raises:
        ValueError: a file that should hold JSON or UTF-8 text does not.
    """
    path = paths.path(path)
    found = {name: path / name for name in NAMES if (path / name).is_file()}
    if "tokenizer.json" in found:
        found.pop("tekken.json", None)  # many megabytes that say the same
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


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """The special tokens that the tokenizer's own files name, such as bos_token, by their text.

    What generation_config.json lists are tokens that end a text, which a template cannot write.
    """
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        told = _content(files, file)
        for name in NAMED:
            token = told.get(name)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and text:
                found[name] = text
    return found


def special_ids(files: dict[str, bytes]) -> dict[str, Any]:
    """bos_token_id, eos_token_id (an id or several) and pad_token_id, as far as they are told.

    What generation_config.json tells comes first; `own_ids` are the tokenizer's.
    """
    ids, told = own_ids(files), _content(files, "generation_config.json")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = told.get(name)
        if value is not None:
            if not all(type(i) is int for i in (value if isinstance(value, list) else [value])):
                raise ValueError(f"generation_config.json: {name}={value!r:.80}: must be ids")
            ids[name] = value
    return ids


def own_ids(files: dict[str, bytes]) -> dict[str, Any]:
    """The ids of `special_tokens`: bos_token_id, eos_token_id, pad_token_id."""
    definition = _content(files, "tokenizer.json")
    added, model = definition.get("added_tokens", []), definition.get("model")
    if not isinstance(added, list) or not all(
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and type(token.get("id")) is int
        for token in added
    ):
        raise ValueError(
            "tokenizer.json: added_tokens must be a list of tokens with id and content"
        )
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram's, of pieces with scores
        vocab = {entry[0]: i for i, entry in enumerate(vocab) if isinstance(entry, list)}
    id_of = (vocab or {}) | {token["content"]: token["id"] for token in added}
    tokens = special_tokens(files)
    wanted = {
        name: tokens[name] for name in ("bos_token", "eos_token", "pad_token") if name in tokens
    }
    return {f"{name}_id": id_of[text] for name, text in wanted.items() if text in id_of}


def byte_level(
    tokens: Sequence[str],
    merges: Sequence[str],
    special: Sequence[int],
    cut: str,
    whole: Sequence[int] = (),
) -> dict[str, bytes]:
    """GPT-2's kind of BPE.

    Args:
        cut: a name in words.KINDS.
        whole: tokens that are cut out of a text before anything else.
    """
    if cut not in words.KINDS:
        known = ", ".join(words.KINDS)
        raise ValueError(f"tokenizer.ggml.pre={cut!r:.80}: must be one of {known}")
    kind = words.KINDS[cut]
    return _files(
        tokens,
        special,
        engines.bpe_model(
            _numbered(tokens), [merge.split(" ") for merge in merges],
            ignore_merges=kind.whole_words,
        ),
        whole=whole,
        normalizer={"type": "NFC"} if kind.composed else None,
        pre_tokenizer=words.pre_tokenizer(kind),
        decoder={
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
        },
    )  # fmt: skip


def sentencepiece(
    tokens: Sequence[str],
    scores: Sequence[float],
    special: Sequence[int],
    unknown: int,
    *,
    unigram: bool = False,
    whole: Sequence[int] = (),
    space_prefix: bool = True,
    single_spaces: bool = False,
    characters: str = "",
    byte_fallback: bool = True,
) -> dict[str, bytes]:
    """sentencepiece's BPE, where the pair whose union has the highest score merges first.

    Args:
        unigram: the likeliest pieces instead (arXiv:1804.10959).
        whole: tokens that are cut out of a text before anything else.
        space_prefix: a text is read as if a blank stood before it.
        single_spaces: blanks at the ends, and after others, are dropped.
        characters: what stands for which character, in sentencepiece's own form.
    """
    replace = lambda old, new: {"type": "Replace", "pattern": {"String": old}, "content": new}
    normalizers: list[dict[str, Any]] = []
    if characters:
        normalizers += [{"type": "Precompiled", "precompiled_charsmap": characters}]
    if single_spaces:
        several = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
        normalizers += [{"type": "Strip", "strip_left": True, "strip_right": True}, several]
    if space_prefix:
        normalizers += [{"type": "Prepend", "prepend": SPACE}]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if unigram:
        model = {
            "type": "Unigram", "unk_id": unknown, "byte_fallback": byte_fallback,
            "vocab": [list(entry) for entry in zip(tokens, scores, strict=True)],
        }  # fmt: skip
    else:
        merges = _sentencepiece_merges(tokens, scores, {*special, *whole})
        model = engines.bpe_model(
            _numbered(tokens),
            merges,
            byte_fallback=byte_fallback,
            fuse_unk=True,
            unk_token=tokens[unknown],
        )
    return _files(
        tokens,
        special,
        model,
        whole=whole,
        normalizer={"type": "Sequence", "normalizers": [*normalizers, replace(" ", SPACE)]},
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"},
                *([strip] if space_prefix else []),
            ],
        },
    )  # fmt: skip


def _sentencepiece_merges(
    tokens: Sequence[str], scores: Sequence[float], apart: set[int]
) -> list[list[str]]:
    """Every pair of pieces whose union is one, but for those that no text spells."""
    id_of = {token: i for i, token in enumerate(tokens) if i not in apart}
    joined = sorted(
        (-scores[i], left + right, left, right)
        for token, i in id_of.items()
        for left, right in ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        if left in id_of and right in id_of
    )
    return [[left, right] for _, _, left, right in joined]


def with_settings(files: dict[str, bytes], **settings: Any) -> dict[str, bytes]:
    """The files with these settings in tokenizer_config.json.

    With add_bos_token, tokenizer.json too says that texts begin so: transformers looks only there.
    """
    old = _content(files, "tokenizer_config.json")
    new = old | {name: value for name, value in settings.items() if value is not None}
    new.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    files = files | {"tokenizer_config.json": json.dumps(new, ensure_ascii=False).encode()}
    bos, number = settings.get("bos_token"), own_ids(files).get("bos_token_id")
    definition = _content(files, "tokenizer.json")
    if not settings.get("add_bos_token") or number is None or definition.get("post_processor"):
        return files
    text = lambda kind, which: {kind: {"id": which, "type_id": 0}}
    begin = text("SpecialToken", bos)
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text("Sequence", "A")],
        "pair": [begin, text("Sequence", "A"), text("Sequence", "B")],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
    return files | {"tokenizer.json": json.dumps(definition, ensure_ascii=False).encode()}


def _content(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return dict(_parsed(files.get(name, b"{}"), name))  # a copy: callers add to it


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _files(
    tokens: Sequence[str],
    special: Sequence[int],
    model: dict[str, Any],
    *,
    whole: Sequence[int] = (),
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json; the library itself says whether they are sound."""
    import tokenizers

    added = [(i, tokens[i], i in special) for i in sorted({*special, *whole})]
    definition = engines.definition(
        added, model, normalizer=normalizer, pre_tokenizer=pre_tokenizer, decoder=decoder
    )
    content = json.dumps(definition, ensure_ascii=False)
    try:
        tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"the tokenizer's vocabulary is not sound ({error})") from None
    return with_settings({"tokenizer.json": content.encode()})

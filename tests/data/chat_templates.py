# ruff: noqa: E501  # a template's line ends where its text says so
"""Chat templates of the kinds that public models have, and tokenizers of the kinds they use.

The templates were written for these tests; each shows what one family does.
"""

import json
from pathlib import Path

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TOOL_CALL = '{{ \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
TOOL_CALL += "{{ c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}"

CHATML = """\
{%- if messages and messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are Test.<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
GEMMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}{% set loop_messages = messages[1:] %}
{%- else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}
{{- bos_token }}
{%- for m in loop_messages %}
{%- if m.role == 'user' %}{{ '[INST] ' + (system if loop.last else '') + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}
{%- endfor %}"""
ZEPHYR = """\
{%- for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
QWEN3 = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- '# Tools' }}{% for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought = '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{ content }}{% endif %}
{%- for c in m.tool_calls or [] %}{% if content or not loop.first %}{{ '\\n' }}{% endif %}CALL{% endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""".replace(
    "CALL", TOOL_CALL
)
R1 = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + m.content.split('</think>')[-1] + eos_token }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""
SMOLLM3 = """\
{{- '<|im_start|>system\\n## Metadata\\n' }}{% if messages and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}{% endgeneration %}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
HARMONY = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if m.thinking and loop.last %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
XML_CALLS = """\
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}{% if m.content %}{{ m.content }}{% endif %}
{%- for c in m.tool_calls or [] %}{{ '<function=' + c.function.name + '>\\n' }}
{%- for name, value in c.function.arguments.items() %}{{ '<parameter=' + name + '>\\n' ~ value ~ '\\n</parameter>\\n' }}{% endfor %}
{{- '</function>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
JSON_CALLS = """\
{%- if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}{% if m.content %}{{ m.content }}{% endif %}
{%- for c in m.tool_calls or [] %}CALL{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""".replace(
    "CALL", TOOL_CALL
)
LLAMA2 = """\
{%- for m in messages %}
{%- if m.role == 'system' %}{{ bos_token + '[INST] <<SYS>>\\n' + m.content.strip() + '\\n<</SYS>>\\n\\n' }}
{%- elif m.role == 'user' %}{{ ('' if loop.index0 == 1 and messages[0].role == 'system' else bos_token + '[INST] ') + m.content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
PLAIN = """\
{%- for m in messages %}{{ '### ' + m.role.capitalize() + ':\\n' + m.content + eos_token + '\\n\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"""
WHOLE = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m | tojson) + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
QWQ = """\
{%- for m in messages %}
{%- if m.role == 'assistant' and not loop.last %}{{ '<|im_start|>assistant\\n' + m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""
MARKED = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "zephyr": ZEPHYR,
    "qwen3": QWEN3, "r1": R1, "smollm3": SMOLLM3, "harmony": HARMONY, "xml": XML_CALLS,
    "json": JSON_CALLS, "llama2": LLAMA2, "plain": PLAIN, "whole": WHOLE, "qwq": QWQ,
    "marked": MARKED,
}  # fmt: skip
WITH_CALLS = ("qwen3", "xml", "json", "whole")
WITHOUT_SYSTEM = ("gemma",)

SPECIAL = [
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
    "<|user|>", "<|assistant|>", "<|system|>", "<|start|>", "<|end|>", "<|message|>",
    "<|channel|>", "<|return|>",
]  # fmt: skip
WORDS = """system user assistant model tool analysis final How many boats are in the harbour? Seven.
And the waves? Twelve, I count them one by one. {"name": "tide", "arguments": {"port": "Bergen"}}
"role": "content": ### Assistant: User: System: <tool_call> </tool_call> <think> </think> naïve Grüße
The tide is 1.4 m high. Ålesund, Tromsø and Trondheim; 漢字 и немного текста. x = f(y) + 2 * 3
"""


def make(kind: str) -> hf.Tokenizer:
    """A tokenizer of about 500 ids, with SPECIAL among them."""
    options = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": 500}
    if kind == "unigram":
        made = hf.Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        made.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
        made.train_from_iterator([WORDS] * 4, trainer)
        made.add_special_tokens(SPECIAL)
    elif kind in ("sentencepiece", "metaspace"):
        made = hf.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        if kind == "sentencepiece":  # as Llama 2 is written
            made.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        else:  # as Mistral is written
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
             decoders.Strip(" ", 1, 0)]
        )  # fmt: skip
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            **options | {"vocab_size": 700, "special_tokens": [*SPECIAL, *byte_tokens]}
        )
        made.train_from_iterator(WORDS.split("\n"), trainer)
        definition = json.loads(made.to_str())  # bytes are ordinary tokens
        definition["added_tokens"] = definition["added_tokens"][: len(SPECIAL)]
        made = hf.Tokenizer.from_str(json.dumps(definition))
    else:
        made = hf.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(**options, initial_alphabet=alphabet)
        made.train_from_iterator([WORDS] * 4, trainer)
    if kind in ("bytelevel", "metaspace"):  # Qwen's marks of a thought are tokens, not special
        made.add_tokens([hf.AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    return made


KINDS = ("bytelevel", "sentencepiece", "metaspace", "unigram")


def save(tokenizer: hf.Tokenizer, folder: Path) -> None:
    """As transformers writes it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

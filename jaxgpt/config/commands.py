"""The commands that do not train."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxgpt.config.checks import require
from jaxgpt.config.run import RunConfig


@dataclass(frozen=True)
class PlanSettings:
    """For which devices a run is planned."""

    topology: str = ""
    """TPU slice, which need not be here, such as v5e:4x4 or v5p:4x4x8; needs libtpu."""
    devices: int = 0
    """Virtual devices of a CPU; 0: the devices that are here."""
    price: float = 0.0
    """Dollars per device and hour; 0: the list price, where one is known."""

    def __post_init__(self) -> None:
        require(
            not (self.topology and self.devices), "devices", self.devices,
            "excludes topology; drop one",
        )  # fmt: skip
        require(self.devices >= 0, "devices", self.devices, "must be 0 or more")
        require(self.price >= 0, "price", self.price, "must be 0 or more")


def planned(kind: type[RunConfig]) -> type[Any]:
    """The config of a stage together with PlanSettings; settings are searched for by default."""
    search = ("fit", Literal["off", "auto"], field(default="auto"))
    return dataclasses.make_dataclass(
        f"Plan{kind.__name__}", [search], bases=(kind, PlanSettings), frozen=True
    )


@dataclass(frozen=True)
class WriteConfig:
    """Let a model write."""

    checkpoint: str
    """A run directory, a Hugging Face directory, a GGUF file or a llama2.c file."""
    prompt: list[str] = field(default_factory=list)
    """Texts to continue, or with chat messages to answer; none: read from standard input."""
    adapter: list[str] = field(default_factory=list)
    """Runs with --peft.kind lora or qlora on this checkpoint, or PEFT directories: one for all
    prompts, or one for each; none is the checkpoint alone."""
    max_new_tokens: int = 128
    """Tokens to write."""
    temperature: float = 0.8
    """0 is greedy."""
    top_p: float = 0.95
    """Nucleus: the fewest tokens whose probability reaches this."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    min_p: float = 0.0
    """Only tokens at least this times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Makes tokens that were written before less likely; 1: does not."""
    stop: list[str] = field(default_factory=list)
    """Strings before which the text ends."""
    seed: int = 0
    """The same seed writes the same text."""
    chat: bool = False
    """Answer as the assistant, by the model's chat template."""
    tools: list[str] = field(default_factory=list)
    """Tools that the assistant may call, with --chat: calculator."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type; null: the one that the model was trained with."""
    quantize: Literal["int8"] | None = None
    """int8 reads a quarter of float32's bytes per token; null: the weights as they are."""
    kernels: Literal["fast", "plain"] = "fast"
    """plain: compute every operation by its equation in jaxgpt/kernels/__init__.py, slowly."""


@dataclass(frozen=True)
class TokenizerConfig:
    """What to learn a vocabulary from."""

    input: list[str] = field(default_factory=list)
    """Text files, folders, JSONL, JSON or Parquet files, or Hub data sets; none: the source code
    of Python's standard library."""
    vocab_size: int = 4096
    """Ids, of which 256 are the bytes and 4 special."""
    output: str = "tokenizer.json"
    """File to write, in Hugging Face's format."""
    column: str = "text"
    """Column of JSONL, JSON, Parquet and Hub rows."""
    errors: Literal["strict", "replace"] = "strict"
    """Invalid UTF-8 is an error with its place, or becomes U+FFFD."""
    max_characters: int = 1 << 24
    """How much text to read; more hardly changes the vocabulary."""


@dataclass(frozen=True)
class PrepareConfig:
    """Text to turn into token files."""

    output: str
    """Directory to write; a killed run is continued, another data set is never written over."""
    input: list[str] = field(default_factory=list)
    """Text files, folders, JSONL, JSON or Parquet files, or Hub data sets; none: the source code
    of Python's standard library."""
    tokenizer: str = "gpt2"
    """byte, a tiktoken name (gpt2, cl100k_base), a tokenizer.json or a directory that holds one."""
    val_fraction: float = 0.1
    """Share held out for validation: every n-th document, or the end of each of few text files."""
    column: str = "text"
    """Column of JSONL, JSON, Parquet and Hub rows."""
    errors: Literal["strict", "replace"] = "strict"
    """Invalid UTF-8 is an error with its place, or becomes U+FFFD."""
    hub_config: str = ""
    """Configuration of a Hub data set, such as sample-10BT."""
    hub_split: str = "train"
    """Split of a Hub data set."""
    shard_tokens: int = 1 << 25
    """Tokens per file, also what a killed run may lose."""

    def __post_init__(self) -> None:
        require(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "must be in [0, 1)")
        require(self.shard_tokens > 0, "shard_tokens", self.shard_tokens, "must be at least 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and on what."""

    checkpoint: str
    """A run directory, a Hugging Face directory, a GGUF or a llama2.c file."""
    task: Literal[
        "perplexity", "multiple_choice", "hellaswag", "piqa", "arc", "winogrande", "lambada",
        "gsm8k", "arithmetic", "reward",
    ]  # fmt: skip
    """Measure; multiple_choice reads any JSONL of {query, choices, gold}, reward any pairs."""
    data: str
    """Plain text (perplexity), or JSONL as on the Hub or in its local layout, also .gz or .bz2; or
    the held-out part of an embedded task: arithmetic, multi-step, … with task arithmetic and
    --chat, arithmetic-correct or arithmetic-concise with task reward."""
    limit: int = 0
    """Only the first items; 0: all."""
    output: str = ""
    """JSONL of single items' results, from which the same command continues; empty: a file in
    the run directory, and none for other checkpoints."""
    window: int = 1024
    """Tokens of a window of perplexity, at most the model's context."""
    stride: int = 1024
    """Tokens between two windows; fewer than window: only that many are scored in each."""
    samples: int = 1
    """Answers drawn for each question; more than one gives pass@k and a majority vote."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus: the fewest tokens whose probability reaches this."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    max_new_tokens: int = 256
    """Tokens of a generated answer."""
    seed: int = 0
    """Of the samples."""
    chat: bool = False
    """Ask generative questions by the model's chat template."""
    tools: list[str] = field(default_factory=list)
    """Tools that a chatting model may call: calculator."""
    reward_model: str = ""
    """A run of scripts/reward.py, which chooses the best of the samples: gives best@n."""
    batch_tokens: int = 2048
    """Positions computed at a time, padding included."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type; null: the model's own."""
    kernels: Literal["fast", "plain"] = "fast"
    """plain: compute every operation by its equation in jaxgpt/kernels/__init__.py, slowly."""

    def __post_init__(self) -> None:
        for name, least in (
            ("limit", 0), ("window", 2), ("stride", 1), ("samples", 1), ("batch_tokens", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            require(value >= least, name, value, f"must be {least} or more")
        require(
            self.samples == 1 or self.temperature > 0,
            "samples", self.samples, "greedy answers are all the same; set a temperature",
        )  # fmt: skip
        generative = self.task in ("gsm8k", "arithmetic")
        require(
            not self.tools or (self.chat and generative), "tools", self.tools,
            "are for gsm8k and arithmetic with --chat",
        )  # fmt: skip
        require(
            not self.reward_model or (self.samples > 1 and generative), "reward_model",
            self.reward_model, "chooses between several samples of gsm8k or arithmetic",
        )  # fmt: skip


@dataclass(frozen=True)
class ConvertConfig:
    """Which model to write, and how."""

    checkpoint: str
    """A run directory, a Hugging Face directory, a GGUF or a llama2.c file."""
    output: str
    """Directory to write; never over something else's."""
    to: Literal["huggingface", "jaxgpt"] = "huggingface"
    """Hugging Face's layout, or a run directory."""
    merge_lora: bool = False
    """Fold adapters into the weights they adapt."""

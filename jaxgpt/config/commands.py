"""The commands that do not train."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from jaxgpt import files
from jaxgpt.config.checks import (
    Amount,
    BelowOne,
    Count,
    FilePath,
    ModelPath,
    Positive,
    Weight,
    check,
    minimum,
    require,
    within,
)
from jaxgpt.config.run import MeshConfig, RunConfig, Sampling


@dataclass(frozen=True)
class PlanSettings:
    """The devices for which a run is planned."""

    topology: str = ""
    """TPU slice to plan for, such as v5e:4x4 or v5p:4x4x8, which need not be here; needs libtpu."""
    devices: Amount = 0
    """Virtual CPU devices to plan for; 0: the devices that are here."""
    chip: str = ""
    """Chip that the virtual devices stand for, by its data sheet, such as "H100 80GB HBM3"; empty:
    parts of this CPU."""
    price: Weight = 0.0
    """Dollars per device and hour; 0: the list price, where one is known."""

    def __post_init__(self) -> None:
        check("", self)
        require(
            not (self.topology and self.devices), "devices", self.devices,
            "excludes topology; drop one",
        )  # fmt: skip
        require(not self.chip or self.devices > 0, "chip", self.chip, "needs --devices N")


def planned(kind: type[RunConfig]) -> type[Any]:
    """The config of a stage together with PlanSettings; settings are searched for by default."""

    def post_init(self: Any) -> None:
        kind.__post_init__(self)
        PlanSettings.__post_init__(self)

    search = ("fit", Literal["off", "auto"], field(default="auto"))
    return dataclasses.make_dataclass(
        f"Plan{kind.__name__}", [search], bases=(kind, PlanSettings), frozen=True,
        namespace={"__post_init__": post_init},
    )  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Which model is opened, and how its weights are held."""

    checkpoint: ModelPath = "runs/pretrain"
    """Model: a run directory, a Hugging Face directory, a GGUF file, a llama2.c file, or org/name
    on the Hub."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type; null: the one that the model was trained with."""
    quantize: Literal["stored", "int8"] | None = "stored"
    """How weights are held in memory: stored: on a CPU in the quantised blocks of a GGUF file, and
    otherwise as with null; int8: in a quarter of float32's bytes; null: as numbers of dtype. Fewer
    bytes make decoding faster, since every token reads all weights."""


@dataclass(frozen=True)
class WriteConfig(Sampling, Weights):
    """Let a model write."""

    prompt: list[str] = field(default_factory=list)
    """Texts to continue, or with --chat messages to answer; none: one is read from standard
    input."""
    adapter: list[ModelPath] = field(default_factory=list)
    """Adapters: runs with --peft.kind lora or qlora on this checkpoint, or PEFT directories; one
    for all prompts, or one for each; the name none means the checkpoint alone."""
    stop: list[str] = field(default_factory=list)
    """Strings that end the text; the text does not contain them."""
    draft: ModelPath = ""
    """Source of proposed tokens (speculative decoding). The model checks several proposals in one
    pass, and so writes the same text in fewer passes: prompt: what stands earlier in the text; or a
    smaller model with the same vocabulary; empty: no proposals."""
    seed: int = 0
    """Seed of the draws: the same seed writes the same text."""
    chat: bool = False
    """true: answer as the assistant, by the model's chat template."""
    system: str | None = None
    """System prompt, with --chat; null: the template's own, if it has one."""
    tools: list[str] = field(default_factory=list)
    """Tools that the assistant may call, with --chat: calculator."""
    kernels: Literal["fast", "plain"] = "fast"
    """Which kernels compute: fast: this machine's; plain: every operation by its equation in
    jaxgpt/kernels/__init__.py, slowly."""

    def __post_init__(self) -> None:
        check("", self)
        require(not self.tools or self.chat, "tools", ", ".join(self.tools), "are for --chat")
        require(not (self.tools and self.draft), "draft", self.draft, "excludes tools; drop one")
        require(self.system is None or self.chat, "system", self.system, "is for --chat")


@dataclass(frozen=True)
class ServeConfig(Weights):
    """Serve a model by OpenAI's API."""

    adapter: list[str] = field(default_factory=list)
    """Adapters as NAME=PATH: runs with --peft.kind lora or qlora on this checkpoint, or PEFT
    directories; a request names one as its model."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: Annotated[int, within("[0, 65535]")] = 8000
    """Port to listen at; 0: any that is free."""
    slots: Count = 8
    """Largest number of answers that are written at the same time."""
    context: Amount = 0
    """Tokens of a slot, for one prompt and its answer; 0: the model's context, halved until the
    memory holds all slots."""
    queue: Amount = 64
    """Number of answers that may wait for a slot; more are refused with status 429."""
    request_seconds: Positive = 600.0
    """Seconds that an answer may take, with its time in the queue."""
    body_seconds: Positive = 30.0
    """Seconds in which the body of a request must arrive."""
    send_seconds: Positive = 60.0
    """Seconds after which the server leaves a client that reads nothing of its stream."""
    max_body: Count = 8_000_000
    """Largest number of bytes in the body of a request."""
    prefix_cache: Amount = 256
    """MiB of memory for keys and values of beginnings of prompts, which are then read only once; 0:
    none."""
    api_key: list[str] = field(default_factory=list)
    """Keys, of which a request must carry one; none: all requests are answered."""
    cors: list[str] = field(default_factory=list)
    """Web origins whose pages may send requests, such as http://localhost:3000; none: only the
    server's own."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices: data cuts the slots over them, tensor the heads and hidden units."""

    def __post_init__(self) -> None:
        check("", self)
        names = []
        for named in self.adapter:
            name, _, path = named.partition("=")
            require(bool(name and path), "adapter", named, "must be NAME=PATH")
            names.append(name)
        require(len({*names}) == len(names), "adapter", self.adapter, "gives one name twice")
        for axis in ("fsdp", "context", "expert"):
            size = getattr(self.mesh, axis)
            require(
                size == 1, f"mesh.{axis}", size, "a server has data and tensor only; leave it 1"
            )
        require("" not in self.api_key, "api_key", self.api_key, "holds an empty key; drop it")


@dataclass(frozen=True)
class ChatConfig(Sampling, Weights):
    """Talk to a model in the terminal."""

    system: str = ""
    """System prompt; empty: the template's own, if it has one."""
    tools: list[str] = field(default_factory=list)
    """Tools that the assistant may call: calculator."""
    adapter: str = ""
    """Adapter: a run with --peft.kind lora or qlora on this checkpoint, or a PEFT directory."""
    context: Amount = 0
    """Tokens of the longest conversation; 0: the model's context, if the memory holds it."""
    max_new_tokens: Count = 1024
    """Largest number of tokens in an answer."""
    seed: int = 0
    """Seed of the draws: the same seed writes the same answers."""

    def __post_init__(self) -> None:
        check("", self)


@dataclass(frozen=True)
class TokenizerConfig:
    """What to learn a vocabulary from."""

    input: list[FilePath] = field(default_factory=list)
    """Text files, folders, JSONL, JSON or Parquet files, or Hub data sets; none: the source code
    of Python's standard library."""
    vocab_size: Count = 4096
    """Number of ids in the vocabulary; 256 of them are the bytes and 4 are special."""
    output: FilePath = "tokenizer.json"
    """File to write, in Hugging Face's format."""
    column: str = "text"
    """Column of JSONL, JSON, Parquet and Hub rows that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """Invalid UTF-8: strict: it is an error with its place; replace: it becomes U+FFFD."""
    max_characters: Count = 1 << 24
    """Characters of text to read at most; more hardly changes the vocabulary."""

    def __post_init__(self) -> None:
        check("", self)


@dataclass(frozen=True)
class PrepareConfig:
    """Text to turn into token files."""

    output: FilePath
    """Directory to write; the same command continues a killed run and never overwrites another data
    set."""
    input: list[FilePath] = field(default_factory=list)
    """Text files, folders, JSONL, JSON or Parquet files, or Hub data sets; none: the source code
    of Python's standard library."""
    tokenizer: FilePath = "gpt2"
    """Tokenizer: byte, a tiktoken name (gpt2, cl100k_base), a tokenizer.json or a directory that
    holds one."""
    val_fraction: BelowOne = 0.1
    """Share held out for validation: every n-th document, or of few text files the end of each."""
    column: str = "text"
    """Column of JSONL, JSON, Parquet and Hub rows that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """Invalid UTF-8: strict: it is an error with its place; replace: it becomes U+FFFD."""
    hub_config: str = ""
    """Configuration of a Hub data set, such as sample-10BT."""
    hub_split: str = "train"
    """Split of a Hub data set."""
    shard_tokens: Count = 1 << 25
    """Number of tokens in one file; a killed run may lose as many."""

    def __post_init__(self) -> None:
        check("", self)


@dataclass(frozen=True)
class InspectConfig:
    """The model to look into, and the text that it reads."""

    checkpoint: ModelPath
    """Model: a run directory, a Hugging Face directory, a GGUF file, a llama2.c file, or org/name
    on the Hub."""
    text: str
    """What the model reads."""
    against: ModelPath = ""
    """Second model, whose probabilities of the same text the page shows too; empty: none."""
    output: FilePath = "page.html"
    """HTML file to write; it needs no other file and no server."""
    temperature: Weight = 1.0
    """Temperature of the distributions after truncation; 0: only the likeliest token is left."""
    top_p: Annotated[float, within("(0, 1]")] = 0.95
    """Leave the fewest tokens whose probabilities reach this sum (nucleus); 1: all."""
    top_k: Amount = 0
    """Leave this many of the likeliest tokens; 0: all."""
    min_p: BelowOne = 0.0
    """Leave only tokens with at least this share of the likeliest one's probability; 0: all."""

    def __post_init__(self) -> None:
        check("", self)
        require(bool(self.text), "text", "", "is empty; give what the model shall read")


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and on what."""

    checkpoint: ModelPath
    """Model: a run directory, a Hugging Face directory, a GGUF file, a llama2.c file, or org/name
    on the Hub."""
    task: Literal[
        "perplexity", "multiple_choice", "hellaswag", "piqa", "arc", "winogrande", "lambada",
        "gsm8k", "arithmetic", "reward", "core",
    ]  # fmt: skip
    """What to measure: multiple_choice reads any JSONL of {query, choices, gold}, reward any pairs,
    core a folder with the tasks of DCLM's CORE."""
    data: FilePath
    """Plain text (perplexity), or JSONL as on the Hub or in its local layout, also .gz or .bz2; or
    the held-out part of an embedded task: arithmetic, multi-step, … with task arithmetic and
    --chat, arithmetic-correct or arithmetic-concise with task reward."""
    limit: Amount = 0
    """Number of items to measure, from the first on; 0: all."""
    output: FilePath = ""
    """JSONL of single items' results, from which the same command continues; empty: a file in
    the run directory, and none for other checkpoints."""
    window: Annotated[int, minimum(2)] = 1024
    """Tokens of a window of perplexity, at most the model's context."""
    stride: Count = 1024
    """Tokens between the starts of two windows of perplexity. If it is smaller than window, only
    the last stride tokens of each later window are scored."""
    samples: Count = 1
    """Answers drawn for each question; more than one gives pass@k and a majority vote."""
    temperature: Weight = 0.0
    """Temperature: below 1 likely tokens become likelier, above 1 less likely; 0: always the
    likeliest."""
    top_p: Annotated[float, within("(0, 1]")] = 1.0
    """Draw from the fewest tokens whose probabilities reach this sum (nucleus); 1: from all."""
    top_k: Amount = 0
    """Draw from this many of the likeliest tokens; 0: from all."""
    max_new_tokens: Amount = 256
    """Largest number of tokens in a generated answer."""
    seed: int = 0
    """Seed of the draws."""
    chat: bool = False
    """true: ask questions that are answered in words by the model's chat template."""
    tools: list[str] = field(default_factory=list)
    """Tools that a chatting model may call: calculator."""
    reward_model: ModelPath = ""
    """Run of scripts/reward.py that chooses the best of the samples: gives best@n."""
    batch_tokens: Count = 2048
    """Number of positions that are computed at a time, padding included."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type; null: the model's own."""
    kernels: Literal["fast", "plain"] = "fast"
    """Which kernels compute: fast: this machine's; plain: every operation by its equation in
    jaxgpt/kernels/__init__.py, slowly."""

    def __post_init__(self) -> None:
        check("", self)
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

    checkpoint: ModelPath
    """Model: a run directory, a Hugging Face directory, a GGUF file, a llama2.c file, or org/name
    on the Hub."""
    output: FilePath = ""
    """Directory, or .gguf file, to write; only exports of jaxgpt are overwritten; empty: none,
    with push."""
    to: Literal["huggingface", "jaxgpt", "gguf"] = "huggingface"
    """Layout to write: Hugging Face's, a run directory, or a GGUF file (llama.cpp, Ollama)."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "f16"
    """How a GGUF file stores its matrices; norms, biases and routers stay float32."""
    merge_lora: bool = False
    """true: fold adapters into the weights that they adapt."""
    base_name: str = ""
    """Name of the base in an exported adapter's files, such as org/name; empty: its path here."""
    push: str = ""
    """Repository of the Hub, as org/name, to upload the model to, with a model card; needs a token
    (HF_TOKEN, or hf auth login)."""
    public: bool = False
    """true: push makes a repository that everybody sees; false: a private one."""

    def __post_init__(self) -> None:
        check("", self)
        require(bool(self.output or self.push), "output", "", "is empty; give --output or --push")
        require(self.to != "jaxgpt" or not self.push, "push", self.push, "takes no run directory")
        require(bool(self.push) or not self.public, "public", self.public, "is for push")
        require(
            not self.push or files.is_local(self.output), "output", self.output,
            "push needs one on this machine, or none",
        )  # fmt: skip

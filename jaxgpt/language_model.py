"""LanguageModel: a network and its tokenizer, to be used from Python."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxgpt import episodes, files, hub, lineage, peft, rundir, tree
from jaxgpt import inspect as inspection
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import ModelConfig, RunConfig
from jaxgpt.convert import chatting, gguf_write, hf, peft_hf, table, tokenizer_files
from jaxgpt.convert.load import Loaded, load_with_adapters, source_of
from jaxgpt.convert.load import load as load_parts
from jaxgpt.data import chat as conversation
from jaxgpt.data.chat import Format, Message
from jaxgpt.episodes import Episode, Writer
from jaxgpt.inspect import Inspection
from jaxgpt.judge import Judge
from jaxgpt.model import gpt
from jaxgpt.sampling import likelihood, speculate
from jaxgpt.sampling.sample import Completion, Sampling, for_decoding, generate
from jaxgpt.tasks.environment import Environment, Question
from jaxgpt.types import Array, Params


def load(
    path: str | Path,
    dtype: Literal["float32", "bfloat16"] | None = None,
    merged: bool = False,
    adapters: Mapping[str, str | Path] = MappingProxyType({}),
    quantize: Literal["stored", "int8"] | None = None,
) -> "LanguageModel":
    """See `jaxgpt.load`; `merged` folds adapters into the weights they adapt."""
    if quantize not in (None, "stored", "int8"):
        raise ValueError(f"quantize={quantize}: must be stored, int8 or None")
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype={dtype}: must be float32 or bfloat16")
    if quantize == "int8" and adapters:
        raise ValueError(
            f"quantize={quantize}: not beside adapters; merge one (--merge_lora) first"
        )
    networks: list[Params] = []
    path = hub.find("checkpoint", path)
    if adapters:
        parts, networks = load_with_adapters(path, adapters.values(), quantize == "stored")
    else:
        merged, stored = merged or quantize == "int8", quantize == "stored"
        parts = load_parts(path, merged=merged, stored=stored)
    if quantize == "int8":
        whole = jax.tree.map(jnp.asarray, parts.params)
        parts = parts._replace(params=jax.jit(peft.quantize_int8)(whole))
    cfg = replace(parts.config, dtype=dtype or parts.config.dtype)
    lm = LanguageModel(parts._replace(config=cfg), str(path))
    lm.adapters = dict(zip(adapters, networks, strict=True))
    return lm


class LanguageModel:
    """A model that reads and writes text; `jaxgpt.load` makes one."""

    def __init__(self, parts: Loaded, name: str = "") -> None:
        self.loaded = parts._replace(params=jax.tree.map(jnp.asarray, parts.params))
        self.config: ModelConfig = parts.config
        self.params: Params = self.loaded.params
        self.tokenizer = parts.tokenizer
        self.chat_template = parts.chat_template
        self.begin_ids = parts.begin_ids
        self.stop_ids = parts.stop_ids
        self.name = name
        self.adapters: dict[str, Params] = {}  # the network with each of them
        self._judge: Judge | None = None
        self._decoding: dict[tuple[Any, ...], Params] = {}

    def __repr__(self) -> str:
        cfg = self.config
        experts = f", {cfg.num_experts} experts" if cfg.num_experts else ""
        return (
            f"LanguageModel({self.name!r}: {tree.count(self.params) / 1e6:,.1f}M parameters, "
            f"{cfg.num_layers} layers of width {cfg.model_dim}{experts}, context "
            f"{cfg.context_length:,}, vocabulary {cfg.vocab_size:,}, {cfg.dtype})"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text as the model wants it: begin token first, special tokens recognised."""
        return [*self.begin_ids, *self.tokenizer.encode(text, allow_special=True)]

    def logits(self, tokens_BT: ArrayLike) -> Array:
        """float32 scores [B, T, V] of the token that follows each one."""
        checked_BT = np.asarray(tokens_BT)
        if checked_BT.ndim != 2 or not np.issubdtype(checked_BT.dtype, np.integer):
            raise ValueError(
                f"tokens_BT is {checked_BT.dtype}{list(checked_BT.shape)}: must be whole numbers "
                "with two axes, such as [lm.encode(text)]"
            )
        if (
            checked_BT.size
            and not 0 <= checked_BT.min() <= checked_BT.max() < self.config.vocab_size
        ):
            raise ValueError(f"tokens_BT must lie in [0, vocab_size={self.config.vocab_size})")
        if checked_BT.shape[1] > self.config.context_length:
            raise ValueError(
                f"tokens_BT has {checked_BT.shape[1]} positions: the model's context is "
                f"{self.config.context_length}; shorten it"
            )
        return _logits(self.config, self.params, jnp.asarray(checked_BT, jnp.int32))

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        rows: Sequence[int] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        draft: "LanguageModel | str | None" = None,
    ) -> list[str]:
        """What the model writes after each prompt, up to its end token or a stop string.

        Args:
            temperature: 0 is greedy.
            top_p, top_k, min_p, repetition_penalty: as `Sampling` explains them.
            stop: strings before which the text is cut.
            rows: numbers that, with the seed, decide the draws of each prompt; default 0, 1, 2, …
            adapter: which of the loaded adapters answers, for all prompts or for each; None: the
                base.
            draft: proposes tokens, of which the model checks several at a time, so that the same
                text is written faster: a smaller model with this vocabulary, or "prompt", which
                proposes what stands earlier in the text.

        Raises:
            ValueError: a setting out of range, a prompt that leaves no room in the context, or a
                draft with another vocabulary or too short a context.
        """
        settings = Sampling(max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.encode(text) or [self.tokenizer.eos_id] for text in texts]
        return self.complete(ids, settings, seed, stop, rows, adapter=adapter, draft=draft)

    def chat(self, messages: Sequence[Message], tools: Sequence[str] = (), **sampling: Any) -> str:
        """The assistant's next turn, by the model's own chat template.

        Args:
            messages: such as [{"role": "user", "content": "Hello"}].
            sampling: as `generate` takes it.
            tools: names of tools that the model may call before it answers: calculator.

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages.
        """
        if tools:
            return self.play_chat(messages, tools, **sampling)[-1]["content"]
        settings, where = _settings(sampling)
        return self.complete([self.encode_chat(messages)], settings, **where)[0]

    def play_chat(
        self, messages: Sequence[Message], tools: Sequence[str], **sampling: Any
    ) -> list[Message]:
        """`chat`, with all that was said on the way to the answer: calls and what they gave."""
        settings, where = _settings(sampling)
        stop = where.pop("stop", ())
        if where.pop("draft", None) is not None:
            raise ValueError("draft: does not go with tools; leave one of them out")
        (episode,) = self.play([Question(messages, names=tools)], settings, **where)
        *calls, answer = episode.messages[len(messages) :]
        text = _cut(answer["content"], [stop] if isinstance(stop, str) else stop)
        return [*calls, {**answer, "content": text}]

    def play(
        self,
        environments: Sequence[Environment],
        settings: Sampling,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        adapter: str | Sequence[str | None] | None = None,
    ) -> list[Episode]:
        """An episode in every environment, by the loop that reinforcement learning uses too.

        Args:
            rows: numbers that, with the seed, decide the draws of each episode.
            adapter: as `generate` takes it.
        """
        writer = Writer(self.config, self.chat_format, self.stop_ids)
        rng, numbers = jax.random.key(seed), range(len(environments)) if rows is None else rows
        chosen = self._chosen(len(environments), adapter)
        played: dict[int, Episode] = {}
        for name in dict.fromkeys(chosen):  # episodes leave the batch, so it has one adapter
            mine = [n for n, own in enumerate(chosen) if own == name]
            found, _ = episodes.play(
                writer, self._decoding_params(len(mine), name), [environments[n] for n in mine],
                settings, rng, rows=[numbers[n] for n in mine],
            )  # fmt: skip
            played |= dict(zip(mine, found, strict=True))
        return [played[n] for n in range(len(environments))]

    @cached_property
    def chat_format(self) -> Format:
        """The model's chat template with what it reads beside messages.

        Raises:
            ValueError: the model has no chat template.
        """
        if self.chat_template is None:
            raise ValueError(f"{self.name}: has no chat template; use generate, or tune it first")
        return chatting.chat_format(self.loaded)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant answers."""
        return conversation.prompt(self.chat_format, messages)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the text that the model reads."""
        return conversation.render(self.chat_format, messages, add_generation_prompt)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        rows: Sequence[int] | None = None,
        on_text: Callable[[list[str]], None] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        draft: "LanguageModel | str | None" = None,
    ) -> list[str]:
        """`generate` for prompts given as ids.

        Args:
            on_text: sees the texts so far, to stream them. A character that is not whole yet, and
                what may become a stop string, are left out; the last call has the whole texts.
        """
        stop = [stop] if isinstance(stop, str) else stop
        if "" in stop:
            raise ValueError("stop holds an empty string: drop it")
        if not prompts:
            return []

        def watch(completions: list[Completion]) -> bool:
            if not stop and on_text is None:
                return False
            texts = self._texts(prompts, completions)
            if on_text is not None:
                on_text([_ready(text, stop) for text in texts])
            return all(
                done.stopped or any(mark in text for mark in stop)
                for done, text in zip(completions, texts, strict=True)
            )

        write = generate
        if draft is not None:
            write = partial(speculate.generate, draft=self._draft(draft, len(prompts)))
        completions = write(
            self.config, self._decoding_params(len(prompts), adapter), prompts, settings,
            stop_ids=self.stop_ids, rng=jax.random.key(seed), rows=rows, on_tokens=watch,
        )  # fmt: skip
        whole = [_cut(text, stop) for text in self._texts(prompts, completions)]
        if on_text is not None:
            on_text(whole)
        return whole

    def perplexity(self, text: str, window: int = 1024, stride: int = 1024) -> float:
        """exp of the mean negative log-likelihood of the text's tokens.

        Windows begin every `stride` tokens. The first token of a window is not scored; where
        stride < window only its last `stride` tokens are, so that all have much before them.
        Neither is longer than the model's context.

        Raises:
            ValueError: a window without room for a prediction, or a text of fewer than two tokens.
        """
        tokens = [*self.begin_ids, *self.tokenizer.encode(text)]
        windows = likelihood.windows(len(tokens), window, stride, self.config.context_length)
        if not windows:
            raise ValueError(f"the text has {len(tokens)} token(s): nothing is predicted")
        rows = [tokens[w.start : w.stop] for w in windows]
        scores = likelihood.score_rows(self.config, self.params, rows)
        logprobs = [found.logprobs[-windows[n].scored :] for n, found in scores]
        return float(np.exp(-np.concatenate(logprobs).mean(dtype=np.float64)))

    def inspect(
        self,
        text: str | Sequence[Message] | Sequence[int],
        adapter: str | None = None,
        **sampling: Any,
    ) -> Inspection:
        """What the model computes on its way through a text, as named arrays.

        Args:
            text: a text; messages, up to the assistant's answer or with it; or ids of tokens.
            adapter: which of the loaded adapters reads it; None: the base.
            sampling: fields of Sampling, which decide what `Inspection.truncated_TV` excludes.

        Raises:
            ValueError: nothing to read, or more than the context holds.
        """
        start = 0
        if isinstance(text, str):
            tokens, start = self.encode(text), len(self.begin_ids)
        elif text and isinstance(text[0], Mapping):
            messages: Sequence[Message] = text  # type: ignore[assignment]
            if messages[-1].get("role") == "assistant":
                tokens = conversation.encode(self.chat_format, messages)[-1].tokens_T.tolist()
            else:
                tokens = self.encode_chat(messages)
        else:
            tokens = [int(token) for token in text]  # type: ignore[arg-type]
        (name,) = self._chosen(1, adapter)
        params = self.params if name is None else self.adapters[name]
        settings = Sampling(**sampling)
        return inspection.inspect(self.config, params, self.tokenizer, tokens, settings, start)

    def induction_scores(self, adapter: str | None = None) -> np.ndarray:
        """How far each head [L, N] is an induction head: 1 reads only what followed before.

        Measured on random tokens that are repeated once (arXiv:2209.11895).
        """
        length = min(48, self.config.context_length // 2)
        tokens = inspection.repeated_tokens(self.config.vocab_size, length)
        return self.inspect(tokens, adapter).induction_LN

    def score(self, text: str | Sequence[Message]) -> float:
        """What a reward model thinks of a text, or of a conversation that ends in an answer.

        Raises:
            ValueError: the model is no run of scripts/reward.py, or the text is longer than the
                context.
        """
        if self._judge is None:
            self._judge = Judge(self.name, "checkpoint", self.loaded)
        if isinstance(text, str):
            if not (tokens := self.encode(text)):
                raise ValueError("text: is empty; a reward model judges what it has read")
            found = self._judge.score([tokens], batch_tokens=1)
        else:
            found = self._judge.rewards([text], batch_tokens=1)
        ((_, reward, truncated),) = found
        if truncated:
            raise ValueError(f"text: is longer than the context of {self.config.context_length}")
        return reward

    def save(
        self,
        path: str | Path,
        format: Literal["huggingface", "jaxgpt", "gguf"] = "huggingface",
        base_name: str = "",
        type: str = "f16",
    ) -> None:
        """Writes a directory that transformers (or `load`) opens, or a GGUF file.

        Nothing else's directory or file is replaced.

        Low-rank changes beside their base are written as PEFT's, which opens them on that base, or
        as a GGUF adapter.
        A run's lineage goes along, with a model card (README.md).

        Args:
            base_name: what they call their base, such as org/name on the Hub; default: its path.
            type: how GGUF stores matrices: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.

        Raises:
            ValueError: the directory holds other files, or no Hugging Face family has this model.
        """
        if format == "jaxgpt":  # a run directory, which a store holds as it is
            self._write(path, format, base_name, type)
            lineage.carry(self.name, path, repr(self))
            return
        with files.staged(files.path(path), last="config.json") as place:
            self._write(place, format, base_name, type)
            if format != "gguf":
                lineage.carry(self.name, place, repr(self))

    def _write(self, path: str | Path, format: str, base_name: str, type: str) -> None:
        if format not in ("huggingface", "jaxgpt", "gguf"):
            raise ValueError(f"format={format}: must be huggingface, jaxgpt or gguf")
        if format == "huggingface" and peft.has_changes(self.params):
            base = base_name or str(source_of(self.name) or "")
            peft_hf.save(path, self.config, self.params, base)
            return
        if format == "gguf" and peft.has_changes(self.params):
            gguf_write.save_adapter(path, self.config, self.params)
            return
        if base_name:
            raise ValueError(
                f"base_name={base_name}: {self.name} is no adapter beside its base; leave it out"
            )
        if tree.flatten(self.params).keys() != table.parameter_shapes(self.config).keys():
            raise ValueError(
                f"{self.name}: its weights carry an adapter or are quantised, which {format} does "
                "not hold; merge it (--merge_lora), or give plain weights"
            )
        if format == "huggingface":
            hf.save(
                path, self.config, self.params, tokenizer_files=self.loaded.files,
                special_ids=tokenizer_files.special_ids(dict(self.loaded.files)),
            )  # fmt: skip
            return
        if format == "gguf":
            gguf_write.save(path, self.config, self.params, self.loaded.files, type, self.stop_ids)
            return
        run = rundir.enter(RunConfig(run=str(path), model=self.config))
        for name, content in self.loaded.files.items():
            files.write(run / name, content)
        checkpoints = Checkpoints(run / "checkpoints")
        checkpoints.save(0, {"params": {"policy": self.params}}, meta={})
        checkpoints.wait()

    def _chosen(
        self, num_rows: int, adapter: str | Sequence[str | None] | None
    ) -> Sequence[str | None]:
        """The adapter of every row."""
        chosen = [adapter] * num_rows if adapter is None or isinstance(adapter, str) else adapter
        if len(chosen) != num_rows:
            raise ValueError(f"adapter: names {len(chosen)} for {num_rows} prompts; give one each")
        for name in chosen:
            if name is not None and name not in self.adapters:
                known = ", ".join(self.adapters) or "none"
                raise ValueError(f"adapter={name}: is not loaded (loaded: {known})")
        return chosen

    def _decoding_params(self, num_rows: int, adapter: str | Sequence[str | None] | None) -> Params:
        """Kept from call to call; one row alone may want another layout than several."""
        chosen = self._chosen(num_rows, adapter)
        names = list(dict.fromkeys(chosen))  # each once
        key = (num_rows == 1, *(chosen if len(names) > 1 else names))
        if key not in self._decoding:
            networks = [self.params if name is None else self.adapters[name] for name in names]
            params = networks[0]
            if len(networks) > 1:
                params = peft.for_rows(networks, [names.index(name) for name in chosen])
            self._decoding = {key: for_decoding(self.config, params, num_rows)}
        return self._decoding[key]

    def _draft(self, draft: "LanguageModel | str", num_rows: int) -> speculate.Draft | None:
        """A model that proposes; None: the text itself does."""
        if isinstance(draft, str):
            if draft != "prompt":
                raise ValueError(
                    f"draft={draft}: must be prompt, or a model: jaxgpt.load({draft!r})"
                )
            return None
        sizes = draft.config.vocab_size, self.config.vocab_size
        same = draft.tokenizer.fingerprint == self.tokenizer.fingerprint
        if not same or sizes[0] != sizes[1]:
            raise ValueError(
                f"draft: {draft.name} has another vocabulary ({sizes[0]} ids) than {self.name} "
                f"({sizes[1]}); take a smaller model of the same family, or draft=prompt"
            )
        return speculate.Draft(draft.config, draft._decoding_params(num_rows, None))

    def _texts(
        self, prompts: Sequence[Sequence[int]], completions: Iterable[Completion]
    ) -> list[str]:
        """What stands after the prompts. Some decoders treat a text's first token differently,
        so prompt and completion are decoded together; a character may span their border."""
        texts = []
        for prompt, completion in zip(prompts, completions, strict=True):
            before = list(itertools.dropwhile(lambda i: i in self.begin_ids, prompt))
            whole = self.tokenizer.decode_bytes([*before, *completion.tokens])
            start = len(self.tokenizer.decode_bytes(before)) if before else 0
            texts.append(whole[start:].decode(errors="replace"))
        return texts


def streamed(write: Callable[[str], Any]) -> Callable[[list[str]], None]:
    """An `on_text` for one prompt that writes what is new."""
    shown = 0

    def on_text(texts: list[str]) -> None:
        nonlocal shown
        write(texts[0][shown:])
        shown = max(shown, len(texts[0]))

    return on_text


def _settings(asked: Mapping[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    """How a chat draws its tokens, and the other arguments of `complete`."""
    where = {
        name: asked[name] for name in ("seed", "stop", "rows", "adapter", "draft") if name in asked
    }
    rest = {name: value for name, value in asked.items() if name not in where}
    return Sampling(**{"max_new_tokens": 256, "temperature": 0.0, "top_p": 1.0} | rest), where


def _cut(text: str, stop: Sequence[str]) -> str:
    found = [text.index(mark) for mark in stop if mark in text]
    return text[: min(found)] if found else text


def _ready(text: str, stop: Sequence[str]) -> str:
    """What of an unfinished text will stay: no half character, no beginning of a stop string."""
    whole = _cut(text, stop)
    if len(whole) < len(text):
        return whole
    whole = whole.rstrip("\ufffd")
    held = [n for mark in stop for n in range(1, len(mark)) if whole.endswith(mark[:n])]
    return whole[: len(whole) - max(held, default=0)]


@partial(jax.jit, static_argnames="cfg")
def _logits(cfg: ModelConfig, params: Params, tokens_BT: Array) -> Array:
    output = gpt.apply(likelihood.rolled(cfg), params, tokens_BT)
    return gpt.logits(cfg, params, output.hidden_BTD)

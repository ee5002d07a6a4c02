"""A conversation in the terminal: streamed, with commands to look at it, change it and keep it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxgpt import machine
from jaxgpt.config import ChatConfig, ServeConfig
from jaxgpt.data import chat
from jaxgpt.language_model import LanguageModel
from jaxgpt.sampling.sample import Sampling
from jaxgpt.serve import launch
from jaxgpt.serve.answers import Line, TextStream
from jaxgpt.serve.engine import Engine, Job, Token
from jaxgpt.tasks import tools
from jaxgpt.tasks.environment import MAX_CALLS

HELP = """\
/system TEXT  sets the system prompt        /history      shows what was said
/undo         takes the last question back  /edit TEXT    asks TEXT in its place
/retry        answers it once more          /tokens       the last answer, token by token
/save FILE    adds the conversation to a JSONL file that scripts/sft.py reads
/clear        begins anew                   /quit         ends"""


class Terminal:
    """A conversation, and the engine that answers in it."""

    def __init__(
        self, cfg: ChatConfig, lm: LanguageModel, engine: Engine, show: Callable[[str], None]
    ) -> None:
        self.cfg, self.lm, self.engine, self.show = cfg, lm, engine, show
        self.form = lm.chat_format
        self.names = tools.check(cfg.tools)
        self.messages: list[dict[str, Any]] = []
        self.tokens: list[Token] = []  # of the last answer
        self.asked = 0  # questions, which are numbers of draws, too
        self._set_system(cfg.system)

    def take(self, line: str) -> bool:
        """A line that was typed; whether the conversation goes on."""
        command, _, rest = line.strip().partition(" ")
        if not line.strip():
            return True
        if not command.startswith("/"):
            self._ask(line.strip())
            return True
        known = {
            "/help": lambda: self.show(HELP + "\n"), "/history": self._history,
            "/tokens": self._tokens, "/undo": self._undo, "/clear": self._clear,
            "/retry": lambda: self._again(""), "/edit": lambda: self._again(rest),
            "/system": lambda: self._set_system(rest), "/save": lambda: self._save(rest),
        }  # fmt: skip
        if command in ("/quit", "/exit"):
            return False
        if command not in known:
            self.show(f"{command}: is no command; /help lists them\n")
        else:
            known[command]()
        return True

    def _ask(self, text: str) -> None:
        before = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            self._answer()
        except ValueError as error:  # the context is full, or the template refuses
            self.show(f"{error}\n")
            del self.messages[before:]

    def _answer(self) -> None:
        """The assistant's turn, with the calls of tools before it."""
        self.asked += 1
        for _ in range(MAX_CALLS + 1):
            text = self._turn()
            self.messages.append({"role": "assistant", "content": text})
            result = tools.observe(text, self.names)
            if result is None:
                return
            self.show(f"→ {result}\n")
            self.messages.append({"role": "tool", "content": result})

    def _turn(self) -> str:
        """One turn, streamed; Ctrl-C ends it early."""
        cfg, reply = self.cfg, Line()
        prompt = chat.prompt(self.form, self.messages)
        how = Sampling(
            cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.top_k, cfg.min_p,
            cfg.repetition_penalty,
        )  # fmt: skip
        job = Job(
            prompt, how, reply, cfg.seed, self.asked - 1, stop_ids=frozenset(self.lm.stop_ids),
            adapter=int(bool(cfg.adapter)), hasty=True, tops=True,
        )  # fmt: skip
        job.check(self.lm.config, self.engine.capacity)
        self.engine.submit([job])
        stream, said, self.tokens = TextStream(self.lm.tokenizer, prompt), "", []
        while True:
            try:
                found = reply.queue.get()
            except KeyboardInterrupt:
                self.engine.cancel(job)
                continue
            new = stream.rest() if isinstance(found, str) else stream.add(found.id)
            said += new
            self.show(new)
            if isinstance(found, str):
                self.show({"length": " […]\n", "cancelled": " [stopped]\n"}.get(found, "\n"))
                if found == "error":
                    raise RuntimeError("the engine has stopped") from self.engine.failure
                return said
            self.tokens.append(found)

    def _set_system(self, text: str) -> None:
        rest = [m for m in self.messages if m["role"] != "system"]
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    def _last_question(self) -> int | None:
        asked = [n for n, message in enumerate(self.messages) if message["role"] == "user"]
        return asked[-1] if asked else None

    def _undo(self) -> None:
        if (last := self._last_question()) is None:
            self.show("nothing was asked\n")
        else:
            del self.messages[last:]

    def _again(self, text: str) -> None:
        """Asks the last question once more, or `text` in its place."""
        if (last := self._last_question()) is None:
            self.show("nothing was asked\n")
            return
        text = text or self.messages[last]["content"]
        del self.messages[last:]
        self._ask(text)

    def _clear(self) -> None:
        self.messages = [m for m in self.messages if m["role"] == "system"]

    def _history(self) -> None:
        for message in self.messages:
            self.show(f"{message['role']}: {message['content']}\n")
        used = len(chat.prompt(self.form, self.messages)) if self.messages else 0
        self.show(f"[{used:,} of {self.engine.capacity:,} tokens]\n")

    def _tokens(self) -> None:
        """Each token with its probability, and what else was likely."""
        decode = lambda token: repr(self.lm.tokenizer.decode([token]))
        for token in self.tokens:
            others = [
                f"{decode(other)} {math.exp(logprob):.2f}"
                for other, logprob in token.tops[:4] if other != token.id
            ]  # fmt: skip
            shown = f"{token.id:>7}  {decode(token.id):<16} {math.exp(token.logprob):.3f}"
            self.show(f"{shown}   {', '.join(others[:3])}\n")

    def _save(self, name: str) -> None:
        if not name:
            self.show("/save needs a file\n")
            return
        try:
            with Path(name).open("a") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            self.show(f"{name}: {error.strerror}\n")


def talk(
    cfg: ChatConfig,
    ask: Callable[[], str],
    show: Callable[[str], None],
    note: Callable[[str], None],
) -> None:
    """Opens the model and takes lines until there are no more; Ctrl-C leaves an answer.

    Args:
        note: is told what is loaded and compiled.
    """
    machine.use_compilation_cache()
    serving = ServeConfig(
        cfg.checkpoint, adapter=[f"adapter={cfg.adapter}"] if cfg.adapter else [], slots=1,
        context=cfg.context, dtype=cfg.dtype, quantize=cfg.quantize,
    )  # fmt: skip
    lm, engine = launch.open_engine(serving, note)
    terminal = Terminal(cfg, lm, engine, show)
    engine.start()
    note("ready: /help lists the commands, /quit ends")
    try:
        while terminal.take(ask()):
            pass
    except (EOFError, KeyboardInterrupt):
        show("\n")
    finally:
        engine.stop()

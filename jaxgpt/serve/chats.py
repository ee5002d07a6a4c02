"""From a chat's fields to a prompt, a grammar of the answer, and who reads it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from jaxgpt.data import chat, tool_calls
from jaxgpt.data.tool_calls import HERMES, Reader
from jaxgpt.language_model import LanguageModel
from jaxgpt.serve import grammar
from jaxgpt.serve.fields import Refused
from jaxgpt.serve.grammar import Grammars, Matcher

ANY_OBJECT = {"type": "object"}


class Plan(NamedTuple):
    """How one chat is answered."""

    prompt: list[int]
    grammar: Callable[[int], Matcher] | None  # of the number of tokens there is room for
    reader: Callable[[], Reader]


class Chats:
    """A model's form of conversations and of calls."""

    def __init__(self, lm: LanguageModel, name: str) -> None:
        self._lm, self._name = lm, name
        self._form: chat.Format | None = None
        if lm.chat_template is not None:
            self._form = lm.chat_format
        self._style = self._form and tool_calls.style_of(self._form)
        self._lists = self._form is not None and tool_calls.lists_tools(self._form)
        self._grammars = Grammars(lm.tokenizer, lm.config.vocab_size, lm.stop_ids)

    def plan(self, given: Mapping[str, Any]) -> Plan:
        """Raises Refused, or ValueError where the template refuses the messages."""
        form = self._form
        if form is None:
            raise Refused(f"model={self._name}: has no chat template; use /v1/completions", "model")
        tools = given.get("tools", [])
        choice = given.get("tool_choice", "auto" if tools else "none")
        if choice != "none" and not tools:
            raise Refused("tool_choice: needs tools", "tool_choice")
        tools = [] if choice == "none" else tools
        functions = [tool["function"] for tool in tools]
        if isinstance(choice, dict):
            functions = [f for f in functions if f["name"] == choice["name"]]
            if not functions:
                raise Refused(f"tool_choice: no tool is called {choice['name']}", "tool_choice")
        kind = given.get("response_format", {}).get("type", "text")
        if kind != "text" and tools:
            raise Refused(f"response_format: {kind} goes not beside tools", "response_format")
        several = given.get("parallel_tool_calls", True) and not isinstance(choice, dict)
        prompt = self._prompt(form, given["messages"], tools)
        rules = self._rules(given, kind, choice, functions, several)
        names = [function["name"] for function in functions]
        style = (self._style or HERMES) if tools else None
        return Plan(prompt, rules, partial(Reader, style, names, several))

    def _prompt(self, form: chat.Format, messages: Any, tools: Any) -> list[int]:
        if self._style is None and (tools or any("tool_calls" in m for m in messages)):
            messages, tools = tool_calls.as_text(messages, tools), []
        elif tools and not self._lists:
            messages, tools = tool_calls.with_list(messages, tools), []
        return chat.prompt(form, messages, tools)

    def _rules(
        self, given: Mapping[str, Any], kind: str, choice: Any, functions: Any, several: bool
    ) -> Callable[[int], Matcher] | None:
        grammars = self._grammars
        if kind != "text":
            schema = given["response_format"].get("schema", ANY_OBJECT)
            param = "response_format"
            rules = grammars.of_schema(schema, param)
        elif choice not in ("none", "auto"):
            param = "tools"
            rules = grammar.calls(grammars, functions, self._style or HERMES, several)
        else:
            for place, function in enumerate(functions):
                if function.get("strict"):
                    param = f"tools[{place}].function.strict"
                    raise Refused(f"{param}: needs tool_choice required or a name", param)
            return None
        return grammars.matcher(rules, param)

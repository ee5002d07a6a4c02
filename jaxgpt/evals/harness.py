"""EleutherAI's lm-evaluation-harness on our models, with any of its tasks.

    python -m jaxgpt.evals.harness run --model jaxgpt --model_args checkpoint=PATH --tasks piqa

is `python -m lm_eval run …` with one more model, which the harness finds only when it has been
imported. From Python: lm_eval.simple_evaluate(model=harness.JaxGPT(PATH), tasks=[…]).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from jaxgpt import language_model
from jaxgpt.data import chat
from jaxgpt.data.engines import Span
from jaxgpt.evals import queries
from jaxgpt.sampling import likelihood
from jaxgpt.sampling.sample import Sampling

MAX_NEW_TOKENS = 256  # the harness's own default


@register_model("jaxgpt")
class JaxGPT(TemplateLM):
    """A model that the harness can ask.

    Args:
        checkpoint: what `jaxgpt.load` opens; `pretrained` is another name for it.
        batch_tokens: positions computed at a time; the harness's own batch_size is not used.
    """

    def __init__(
        self,
        checkpoint: str = "",
        pretrained: str = "",
        dtype: Any = None,
        batch_tokens: int = likelihood.BATCH_TOKENS,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if not (checkpoint or pretrained):
            raise ValueError("model_args lack checkpoint=PATH")
        self.lm = language_model.load(checkpoint or pretrained, dtype)
        self.batch_tokens = batch_tokens
        # Conversations in which somebody wrote a special token's text, and where: the harness hands
        # them back as text.
        self._literal: dict[str, list[Span]] = {}

    @property
    def eot_token_id(self) -> int:
        return self.lm.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return self.lm.begin_ids[0] if self.lm.begin_ids else self.lm.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return self.lm.name.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        marked = max(
            (text for text in self._literal if string.startswith(text)), key=len, default=""
        )
        ids, _ = self.lm.tokenizer.encode_with_starts(string, self._literal.get(marked, ()))
        begin = list(self.lm.begin_ids)
        if add_special_tokens is None:
            add_special_tokens = ids[: len(begin)] != begin
        return begin + ids if add_special_tokens else ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.lm.chat_template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text, literal = chat.render_marked(self.lm.chat_format, chat_history, add_generation_prompt)
        if literal:
            self._literal[text] = literal
        return text

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        answers = self._score([(context, ending) for _, context, ending in requests], disable_tqdm)
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            mine = get_rolling_token_windows(
                tokens, self.prefix_token_id, self.lm.config.context_length, context_len=1
            )
            windows += map(make_disjoint_window, mine)
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1:]), []).append(number)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as bar:
            for numbers in groups.values():
                prompts = {n: self.tok_encode(requests[n].args[0]) for n in numbers}
                asked: Any = requests[numbers[0]].args
                for number, text in self._write(prompts, asked[1]):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update()
        return [texts[number] for number in range(len(requests))]

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        fitted = {n: queries.fit(self.lm, *pair) for n, pair in enumerate(pairs)}
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="loglikelihood") as bar:
            for number, scored in queries.score(self.lm, fitted, self.batch_tokens):
                answers[number] = queries.total(scored), bool(scored.greedy.all())
                bar.update()
        return [answers[number] for number in range(len(pairs))]

    def _write(self, prompts: Mapping[int, list[int]], asked: Any) -> Iterator[tuple[int, str]]:
        """One group of requests with the same settings."""
        settings: Any = normalize_gen_kwargs(dict(asked), MAX_NEW_TOKENS)
        sampling = Sampling(
            settings["max_gen_toks"],
            settings["temperature"],
            settings.get("top_p") or 1.0,
            settings.get("top_k") or 0,
        )
        return queries.write(self.lm, prompts, sampling, settings["until"], self.batch_tokens)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

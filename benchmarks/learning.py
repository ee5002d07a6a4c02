"""Learning claims, each reproducible from nothing but this repository: one JSON line a claim.

    python benchmarks/learning.py --list
    python benchmarks/learning.py sft-arithmetic --seed 0
    python benchmarks/learning.py sft-arithmetic --seeds 20

What one claim builds on (a base model, a tuned one) is trained once a seed and kept in --folder.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ASKED = 400  # held-out problems
PASSES = 4  # over the sums that the base model reads
Result = dict[str, Any]


def sft_arithmetic(folder: Path, seed: int) -> Result:
    """Exact match on held-out problems, greedy, before and after fine-tuning."""
    after = share(tuned(folder, seed), "is_correct")
    return judge(share(base(folder, seed), "is_correct"), after, 0.9)


def reward_arithmetic(folder: Path, seed: int) -> Result:
    """Accuracy on held-out pairs of a right and a wrong answer."""
    run = train(folder, seed, "reward", "arithmetic", init=tuned(folder, seed))
    first, last = held_out(run, "val/accuracy")
    return judge(first, last, 0.9)


def dpo_arithmetic(folder: Path, seed: int) -> Result:
    """Share of sampled answers to held-out problems that are right and concise."""
    start = wordy(folder, seed)
    run = train(folder, seed, "dpo", "arithmetic", init=start)
    before, after = (share(model, "is_concise", temperature=1.0) for model in (start, run))
    return judge(before, after, before + 0.2)


def distill_tiny(folder: Path, seed: int) -> Result:
    """A small student against the same student on hard labels: validation KL and loss."""
    teacher = train(folder, seed, "pretrain", "teacher-tiny")
    found = {
        name: train(folder, seed, "distill", "tiny", f"distill-{name}", hard=hard, teacher=teacher)
        for name, hard in (("soft", 0.0), ("hard", 1.0))
    }
    (_, soft_kl), (_, hard_kl) = (held_out(run, "val/kl") for run in found.values())
    (_, soft_loss), (_, hard_loss) = (held_out(run, "val/loss") for run in found.values())
    return {
        "before": {"kl": hard_kl, "loss": hard_loss},
        "after": {"kl": soft_kl, "loss": soft_loss},
        "target": "both lower",
        "passed": soft_kl < hard_kl and soft_loss < hard_loss,
    }


def grpo_arithmetic(folder: Path, seed: int) -> Result:
    """Exact match on held-out problems, greedy, of a half-learned policy after GRPO."""
    return practised(folder, seed, "grpo", 0.95)


def ppo_arithmetic(folder: Path, seed: int) -> Result:
    """The same after PPO by the rule."""
    return practised(folder, seed, "ppo", 0.9)


def ppo_reward_model(folder: Path, seed: int) -> Result:
    """PPO by a learnt taste for concise answers: its reward of sampled answers to held-out
    problems, KL, and the rule's opinion of them.
    """
    start = wordy(folder, seed)
    taste = train(folder, seed, "reward", "arithmetic-concise", init=start)
    run = train(folder, seed, "ppo", "reward-model", init=start, reward_model=taste)
    before, after = (share(model, "is_concise", temperature=1.0) for model in (start, run))
    old, new = (pleased(taste, model) for model in (start, run))
    _, kl = held_out(run, "rollout/kl")
    passed = new > old + 0.5 and kl < 20 and after > before + 0.1
    return {
        "before": {"reward": round(old, 3), "concise": round(before, 4)},
        "after": {"reward": round(new, 3), "concise": round(after, 4), "kl": round(kl, 2)},
        "target": "reward + 0.5, concise + 0.1, kl < 20",
        "passed": passed,
    }


def chain_of_thought(folder: Path, seed: int) -> Result:
    """Exact match on held-out chains of terms: answered at one stroke, and step by step.

    Both begin with the same random network and see the same problems for the same steps.
    """
    stroke = {"data.path": "multi-step-answer"}
    at_once = train(folder, seed, "sft", "multi-step", "sft-multi-step-answer", **stroke)
    before = solved(at_once, "multi-step")
    return judge(
        before, solved(train(folder, seed, "sft", "multi-step"), "multi-step"), before + 0.3
    )


def tools_calculator(folder: Path, seed: int) -> Result:
    """Exact match on held-out products of 4 to 6 digits: by itself, and with a calculator."""
    alone = {"data.path": "products", "train.steps": 200}  # more would not help
    own = solved(train(folder, seed, "sft", "products", "sft-products-alone", **alone), "products")
    start = train(folder, seed, "sft", "products")
    run = train(folder, seed, "grpo", "products", init=start)
    tuned, after = (solved(model, "products-calculator") for model in (start, run))
    result = judge(own, after, 0.95) | {"after_sft": round(tuned, 4)}
    return result | {"passed": result["passed"] and own < 0.05}


def lora_arithmetic(folder: Path, seed: int) -> Result:
    """Exact match of LoRA against that of full fine-tuning, at most two points below."""
    return beside_full(folder, seed, "lora", 0.02)


def qlora_arithmetic(folder: Path, seed: int) -> Result:
    """Exact match of QLoRA against that of full fine-tuning, at most three points below."""
    return beside_full(folder, seed, "qlora", 0.03)


CLAIMS: dict[str, Callable[[Path, int], Result]] = {
    "sft-arithmetic": sft_arithmetic,
    "reward-arithmetic": reward_arithmetic,
    "dpo-arithmetic": dpo_arithmetic,
    "distill-tiny": distill_tiny,
    "grpo-arithmetic": grpo_arithmetic,
    "ppo-arithmetic": ppo_arithmetic,
    "ppo-reward-model": ppo_reward_model,
    "chain-of-thought": chain_of_thought,
    "tools-calculator": tools_calculator,
    "lora-arithmetic": lora_arithmetic,
    "qlora-arithmetic": qlora_arithmetic,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_AsWritten)
    parser.add_argument("name", nargs="?", choices=CLAIMS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seeds", type=int, default=0,
        help="so many seeds, from --seed on; the last line counts those that passed",
    )  # fmt: skip
    parser.add_argument("--folder", type=Path, default=Path("runs/learning"))
    parser.add_argument("--list", action="store_true", help="name the claims and end")
    args = parser.parse_args()
    if args.seeds < 0:
        parser.error(f"--seeds={args.seeds}: must be 0 or more; 0: only --seed")
    if args.list or args.name is None:
        for name, claim in CLAIMS.items():
            print(f"{name:20} {claim.__doc__}")
        return
    results = []
    for seed in range(args.seed, args.seed + max(1, args.seeds)):
        start = time.perf_counter()
        result = CLAIMS[args.name](args.folder / f"seed{seed}", seed)
        seconds = round(time.perf_counter() - start)
        about = {"name": args.name, "seed": seed}
        print(json.dumps(about | result | {"seconds": seconds}), flush=True)
        results.append(result)
    if args.seeds:
        print(json.dumps({"name": args.name} | over_seeds(results)))


def over_seeds(results: list[Result]) -> Result:
    """The rate of passing; the mean, least and largest of every measure before and after."""
    found: Result = {"seeds": len(results), "passed": sum(r["passed"] for r in results)}
    for when in ("before", "after"):
        values = [r[when] if isinstance(r[when], dict) else {"": r[when]} for r in results]
        found[when] = {
            name: {
                "mean": round(sum(v[name] for v in values) / len(values), 4),
                "least": min(v[name] for v in values), "largest": max(v[name] for v in values),
            }
            for name in values[0]
        }  # fmt: skip
        found[when] = found[when].get("", found[when])
    return found


def base(folder: Path, seed: int) -> Path:
    """A small model that reads and writes sums, but has never seen a conversation.

    It has never seen a held-out problem either.
    """
    text = folder / "sums.txt"
    if not text.exists():
        from jaxgpt.data import synthetic

        text.parent.mkdir(parents=True, exist_ok=True)
        lines = synthetic.lines() * PASSES
        random.Random(seed).shuffle(lines)
        text.write_text("".join(lines))
    return train(folder, seed, "pretrain", "sums", "pretrain-sums", **{"data.path": text})


def tuned(folder: Path, seed: int) -> Path:
    """The base after fine-tuning on the arithmetic assistant's conversations."""
    return train(folder, seed, "sft", "arithmetic-tuned", init=base(folder, seed))


def wordy(folder: Path, seed: int) -> Path:
    """The base after fine-tuning on answers of which every second one rambles."""
    return train(folder, seed, "sft", "arithmetic-styles", init=base(folder, seed))


def beside_full(folder: Path, seed: int, kind: str, less: float) -> Result:
    run = train(folder, seed, "sft", f"arithmetic-{kind}", init=base(folder, seed))
    full, before = (share(model(folder, seed), "is_correct") for model in (tuned, base))
    return judge(before, share(run, "is_correct"), full - less) | {"full": round(full, 4)}


def practised(folder: Path, seed: int, stage: str, target: float) -> Result:
    """Exact match of a policy that was tuned only partly, before and after it practised."""
    start = train(folder, seed, "sft", "arithmetic-partly", init=base(folder, seed))
    run = train(folder, seed, stage, "arithmetic", init=start)
    return judge(share(start, "is_correct"), share(run, "is_correct"), target)


def train(
    folder: Path, seed: int, stage: str, config: str, name: str = "", **settings: Any
) -> Path:
    """The run of a command, which goes on where it was and costs nothing once it is done."""
    import yaml

    from jaxgpt import metrics

    run = folder / (name or f"{stage}-{config}")
    flags = [part for field, value in settings.items() for part in (f"--{field}", str(value))]
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "scripts" / f"{stage}.py"),
            "--config", str(ROOT / "configs" / stage / f"{config}.yaml"),
            "--run", str(run), "--seed", str(seed), *flags,
        ],
        stdout=sys.stderr,
    )  # fmt: skip
    if done.returncode:  # the command has said why
        raise SystemExit(done.returncode)
    wanted = yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"]
    if max(line["step"] for line in metrics.read_jsonl(run / "metrics.jsonl")) < wanted:
        raise SystemExit(f"{run}: was stopped before step {wanted}; the same command goes on")
    return run


def share(run: Path, rule: str, temperature: float = 0.0) -> float:
    """Share of held-out problems whose answer keeps a rule of jaxgpt/tasks."""
    from jaxgpt import tasks

    kept = [getattr(tasks, rule)(*pair) for pair in answered(run, temperature)]
    return sum(kept) / len(kept)


def pleased(taste: Path, run: Path) -> float:
    """A reward model's mean reward of sampled answers to held-out problems."""
    from jaxgpt.data import synthetic
    from jaxgpt.judge import Judge

    said = [
        [
            {"role": "user", "content": synthetic.question(problem)},
            {"role": "assistant", "content": answer},
        ]
        for problem, answer in answered(run, temperature=1.0)
    ]
    rewards = Judge(str(taste), "reward_model").rewards(said, batch_tokens=8192)
    return sum(reward for _, reward, _ in rewards) / len(said)


def answered(run: Path, temperature: float) -> list[tuple[Any, str]]:
    """Held-out problems with a model's answers."""
    import itertools

    import jaxgpt
    from jaxgpt.convert import chatting
    from jaxgpt.convert.load import load
    from jaxgpt.data import chat, synthetic
    from jaxgpt.sampling.sample import Sampling

    problems = list(itertools.islice(synthetic.problems(held_out=True), ASKED))
    form = chatting.chat_format(load(run))
    asked = [
        chat.prompt(form, [{"role": "user", "content": synthetic.question(problem)}])
        for problem in problems
    ]
    answers = jaxgpt.load(str(run)).complete(asked, Sampling(144, temperature, top_p=1.0))
    return list(zip(problems, answers, strict=True))


def solved(run: Path, name: str) -> float:
    """Share of a task's held-out problems that a model solves, greedy, with the task's tools."""
    import jaxgpt
    from jaxgpt import tasks
    from jaxgpt.sampling.sample import Sampling

    task = tasks.find(name)
    environments = [task.environment(problem) for problem in task.problems(True)[:ASKED]]
    found = jaxgpt.load(str(run)).play(environments, Sampling(80, 0.0, top_p=1.0))
    return sum(episode.reward for episode in found) / len(found)


def held_out(run: Path, name: str) -> tuple[float, float]:
    """The first and the last value of a metric."""
    from jaxgpt import metrics

    values = [line[name] for line in metrics.read_jsonl(run / "metrics.jsonl") if name in line]
    return values[0], values[-1]


def judge(before: float, after: float, target: float) -> Result:
    rounded = {"before": round(before, 4), "after": round(after, 4), "target": round(target, 4)}
    return rounded | {"passed": after >= target}


class _AsWritten(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


if __name__ == "__main__":
    main()

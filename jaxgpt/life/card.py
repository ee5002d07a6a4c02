"""The card of a life: card.json, and the same as a page and as Markdown.

Everything comes from the run directories and life.json. What depends on the clock stands under
`costs` and nowhere else, so that a life that was killed and went on has the same card but for that.
"""

import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from jaxgpt import files, metrics, rundir
from jaxgpt.config import ModelConfig
from jaxgpt.evals import statistics
from jaxgpt.life import life as lives
from jaxgpt.life import page
from jaxgpt.life.life import Life, Stage
from jaxgpt.life.runs import Run

Card = dict[str, Any]
MOST_POINTS = 80  # of a curve
CURVES = ("train/loss", "val/loss", "val/accuracy", "rollout/reward", "rollout/length", "val/kl")
DISTANCES = ("rollout/difference_max", "rollout/difference_p999")
KINDS = ("compile", "data", "step", "rollout", "evaluation", "sampling", "saving", "report")
FORWARD = 1 / 3  # of a training step's FLOPs


def collect(life: Life, run: Path) -> Card:
    """The card of what has been made so far."""
    state = lives.read_state(run)
    stages = [
        _stage(life, stage, run, state["stages"][stage.name])
        for stage in life.stages
        if stage.name in state.get("stages", {})
    ]
    measures = [m | {"stage": s["name"]} for s in stages for m in s["measures"]]
    seconds = sum(s["costs"]["wall_seconds"] for s in stages)
    return {
        "title": life.title, "about": life.about, "seed": state.get("seed", 0),
        "made_by": _made_by(stages), "minutes": life.minutes,
        "price_per_hour": life.price_per_hour,
        "missed": [m for m in measures if not m["met"]],
        "complete": len(stages) == len(life.stages),
        "tokens": sum(sum(s["tokens"].values()) for s in stages),
        "flops": sum(s["flops"] for s in stages),
        "costs": {
            "seconds": seconds, "price": seconds / 3600 * life.price_per_hour,
            "peak_bytes": max((s["costs"]["peak_bytes"] or 0 for s in stages), default=0),
            "ended": max((s["costs"]["ended"] for s in stages), default=""),
        },
        "stages": stages,
    }  # fmt: skip


def write(card: Card, run: Path) -> list[Path]:
    """card.md, card.html, and card.json with the sha256 of these two."""
    pages = {"card.md": markdown(card), "card.html": html(card)}
    for name, text in pages.items():
        files.write(run / name, text)
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in pages.items()}
    whole = json.dumps(card | {"pages": hashes}, indent=1, ensure_ascii=False)
    files.write(run / "card.json", whole)
    return [run / name for name in ("card.json", *pages)]


def spread(cards: Sequence[Card]) -> Card:
    """One card of several seeds: means, with the lowest and the highest seed."""
    whole: Card = json.loads(json.dumps(cards[0]))
    whole["seeds"] = [card["seed"] for card in cards]
    for number, stage in enumerate(whole["stages"]):
        for place, measure in enumerate(stage["measures"]):
            values = [c["stages"][number]["measures"][place]["value"] for c in cards]
            found = statistics.mean("value", values)
            measure |= {
                "value": found["value"], "low": min(values), "high": max(values),
                "by_seed": values,
                "met": all(c["stages"][number]["measures"][place]["met"] for c in cards),
            }  # fmt: skip
    named = [m | {"stage": s["name"]} for s in whole["stages"] for m in s["measures"]]
    whole["missed"] = [m for m in named if not m["met"]]
    for name in ("seconds", "price"):
        whole["costs"][name] = sum(card["costs"][name] for card in cards)
    return whole


def answer(life: Life, run: Path) -> None:
    """Lets every stage answer the life's questions; what was answered already is kept.

    A stage is asked by the sampler's greedy choice, with the calculator at hand.
    """
    made = lives.read_state(run).get("stages", {})
    for stage in life.stages:
        if not (life.asks and stage.trains and stage.kind != "reward" and stage.name in made):
            continue
        file = run / "answers" / f"{stage.name}.json"
        wanted = {"weights": made[stage.name]["output"], "asks": life.asks}
        known = json.loads(file.read_text()) if file.is_file() else {}
        if {name: known.get(name) for name in wanted} != wanted:
            file.parent.mkdir(exist_ok=True)
            said = _said(run / stage.name, life.asks)
            files.write(file, json.dumps(wanted | {"said": said}, ensure_ascii=False))


def _said(path: Path, asks: Sequence[str]) -> list[dict[str, Any]]:
    """Every answer turn by turn, and each token of its turns with its probability."""
    import jax
    import numpy as np

    from jaxgpt import language_model
    from jaxgpt.sampling.sample import Sampling
    from jaxgpt.tasks.environment import Question

    lm = language_model.load(path)
    room = min(96, lm.config.context_length // 2)
    found = []
    for ask in asks:
        asked = [{"role": "user", "content": ask}]
        question = Question(asked, names=("calculator",))
        (episode,) = lm.play([question], Sampling(room, 0.0, top_p=1.0))
        logits_TV = lm.logits(np.array([episode.tokens]))[0]
        chances_TV = np.asarray(jax.nn.softmax(logits_TV))
        tokens = [
            [lm.tokenizer.decode([token]), round(float(chances_TV[place - 1, token]), 3)]
            for place, (token, own) in enumerate(zip(episode.tokens, episode.mask, strict=True))
            if own
        ]
        turns = [{"role": m["role"], "content": m["content"]} for m in episode.messages]
        found.append({"turns": turns, "tokens": tokens})
    return found


def _stage(life: Life, stage: Stage, run: Path, record: dict[str, Any]) -> Card:
    path = run / stage.name
    known = Run(path) if stage.trains else None
    evaluations = record["evaluations"]
    spent = sum(e["seconds"] for e in evaluations.values())
    wall = record["seconds"] + spent
    answers = run / "answers" / f"{stage.name}.json"
    tokens, flops, parameters = _work(known) if known else ({}, 0.0, 0)
    sessions = known.lineage["sessions"] if known else []
    return {
        "name": stage.name, "kind": stage.kind, "about": stage.about,
        "command": lives.typed(record["command"]),
        "output": record["output"],
        "step": known.lineage["result"]["step"] if known else None,
        "parameters": parameters, "tokens": tokens, "flops": flops,
        "from": [{"role": p["role"], "path": p["relative"], "weights": p["weights"]["sha256"]}
                 for p in known.lineage["parents"]] if known else [],
        "data": [{key: entry[key] for key in ("setting", "path", "kind", "sha256")}
                 for entry in known.lineage["data"]] if known else [],
        "made_by": {"commit": known.lineage["code"]["commit"],
                    "changes": known.lineage["code"]["changes"],
                    "jax": known.lineage["environment"]["jax"],
                    "device": known.lineage["environment"]["device"]} if known else {},
        "measures": _measures(life, stage, run, record),
        "curves": _curves(known) if known else {},
        "distance": {name: max(known.series(name).values()) for name in DISTANCES
                     if known and known.series(name)},
        "answers": json.loads(answers.read_text())["said"] if answers.is_file() else [],
        "costs": {
            "wall_seconds": wall, "evaluation_seconds": spent,
            "seconds": known.spent("seconds") if known else {},
            "peak_bytes": max((s["peak_bytes"] or 0 for s in sessions), default=0),
            "price": wall / 3600 * life.price_per_hour, "ended": record["ended"],
        },
    }  # fmt: skip


def _measures(life: Life, stage: Stage, run: Path, record: dict[str, Any]) -> list[Card]:
    """The stage's measures with their 95 % intervals, targets and commands."""
    found = []
    for name, (value, target, met) in lives.judged(stage, run, record).items():
        source, _, number = name.partition("/")
        result = record["evaluations"].get(source, {}).get("result", {})
        low, high = _interval(value, result.get(f"{number}_stderr"), result.get("count", 0))
        command = record["evaluations"].get(source, {}).get("command")
        found.append({
            "name": name, "title": life.titles.get(name, name), "value": value, "low": low,
            "high": high, "count": result.get("count"), "target": target, "met": met,
            "command": lives.typed(command) if command
            else f"last {name} of {stage.name}/metrics.jsonl",
        })  # fmt: skip
    return found


def _interval(value: float, error: float | None, count: int) -> tuple[float | None, float | None]:
    """Wilson's for shares of items, the normal one for other means; none without an error."""
    if error is None:
        return None, None
    share = value * count
    if 0 <= value <= 1 and abs(share - round(share)) < 1e-6:
        low, high = statistics.interval(share, count)
        return low, high
    half = statistics.NORMAL_95 * error
    return value - half, value + half


def _work(run: Run) -> tuple[dict[str, int], float, int]:
    """Tokens by kind, FLOPs and parameters. Tokens are counted by the log, which a resumed run
    writes again from where it goes on."""
    settings = yaml.safe_load((run.path / "config.yaml").read_text())["model"]
    model = rundir.model_config(run.path)
    read = run.series("train/tokens")
    drawn = sum(run.series("rollout/tokens").values())
    tokens = {"trained": int(max(read.values(), default=0))} | (
        {"drawn": int(drawn)} if drawn else {}
    )
    each = metrics.flops_per_token(model, settings["context_length"])
    flops = each * (tokens["trained"] + FORWARD * tokens.get("drawn", 0))
    return tokens, flops, _parameters(model)


def _parameters(model: ModelConfig) -> int:
    """Weights of the network, from its shape alone."""
    import jax

    from jaxgpt.model import gpt

    shapes = jax.eval_shape(lambda: gpt.init(model, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def _curves(run: Run) -> dict[str, list[list[float]]]:
    found = {}
    for name in CURVES:
        series = run.series(name)
        if len(series) > 1:
            every = -(-len(series) // MOST_POINTS)
            points = list(series.items())
            kept = [*points[:-1][::every], points[-1]]
            found[name] = [[float(x) for x, _ in kept], [y for _, y in kept]]
    return found


def _made_by(stages: Sequence[Card]) -> Card:
    known = [stage["made_by"] for stage in stages if stage["made_by"]]
    return known[-1] if known else {}


# How a card looks.


def number(value: float | None, title: str = "") -> str:
    """A share as per cent, other numbers with four digits."""
    if value is None:
        return ""
    return f"{value:.1%}" if "%" in title else f"{value:.4g}"


def shown(measure: Card) -> tuple[str, str, str]:
    """A measure's title, value and interval."""
    title = measure["title"]
    span = ""
    if measure["low"] is not None:
        span = f"{number(measure['low'], title)} to {number(measure['high'], title)}"
    return title.removesuffix(", %"), number(measure["value"], title), span


def target(measure: Card) -> str:
    """Such as `≥ 95 %`."""
    text = measure["target"].replace(">=", "≥").replace("<=", "≤")
    if not text or "%" not in measure["title"]:
        return text
    sign, limit = text.split()[0], text.split()[-1]
    return f"{sign} {float(limit):.0%}"


def clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def markdown(card: Card) -> str:
    """The card for a README."""
    lines = [f"# {card['title']}", "", card["about"], "", *_missed_lines(card), ""]
    lines += ["| stage | measure | value | 95 % interval | target |", "|" + " --- |" * 5]
    for stage in card["stages"]:
        for measure in stage["measures"]:
            title, value, span = shown(measure)
            value = value if measure["met"] else f"**{value} missed**"
            lines.append(f"| {stage['name']} | {title} | {value} | {span} | {target(measure)} |")
    lines += ["", "| stage | tokens | FLOPs | time | peak memory |", "|" + " --- |" * 5]
    for stage in card["stages"]:
        costs = stage["costs"]
        lines.append(
            f"| {stage['name']} | {sum(stage['tokens'].values()):,} | {stage['flops']:.2g} "
            f"| {clock(costs['wall_seconds'])} | {costs['peak_bytes'] / 1e9:.2f} GB |"
        )
    lines += ["", "Commands:", ""]
    lines += [f"    {stage['command']}" for stage in card["stages"]]
    commands = dict.fromkeys(m["command"] for s in card["stages"] for m in s["measures"])
    return "\n".join([*lines, *(f"    {command}" for command in commands), ""])


def html(card: Card) -> str:
    """The card as a page."""
    bad = card["missed"] or not card["complete"]
    body = [
        f"<p class=lead>{escape(card['about'])}</p>", _tiles(card),
        *(f"<p class='verdict bad'>{escape(line)}</p>" for line in _missed_lines(card) if bad),
        "<h2>What it can do, stage by stage</h2>", _measure_table(card),
        "<h2>One conversation, answered by every stage</h2>", _conversation(card),
        "<h2>How it learned</h2>", _charts(card),
        "<h2>Where it comes from</h2>", _lineage(card),
        "<h2>What it cost</h2>", _costs(card),
        "<h2>The command behind every number</h2>", _commands(card),
    ]  # fmt: skip
    return page.page(card["title"], "\n".join(body))


def _missed_lines(card: Card) -> list[str]:
    lines = [
        f"Missed: {m['stage']}, {shown(m)[0]} is {shown(m)[1]}, the target is {target(m)}."
        for m in card["missed"]
    ]
    if not card["complete"]:
        lines.append("This life is not complete.")
    return lines or ["Every target is met."]


def _tiles(card: Card) -> str:
    costs, made = card["costs"], card["made_by"]
    aim = f"target {card['minutes']:g} min" if card["minutes"] else ""
    seeds = card.get("seeds", [card["seed"]])
    tiles = [
        ("time", clock(costs["seconds"]), aim),
        ("tokens", metrics.short(card["tokens"]), "read and written"),
        ("FLOPs", f"{card['flops']:.2g}", "6 per weight and token"),
        ("peak memory", f"{costs['peak_bytes'] / 1e9:.2f} GB", "of a process"),
        ("price", f"${costs['price']:.3f}", f"at ${card['price_per_hour']:g} an hour"),
        ("machine", escape(str(made.get("device", "?"))), f"jax {made.get('jax', '?')}"),
        ("seed" if len(seeds) == 1 else "seeds", ", ".join(map(str, seeds)),
         f"commit {made.get('commit') or '?'}"),
    ]  # fmt: skip
    cells = [f"<div><dt>{a}</dt><dd>{b}<small>{escape(c)}</small></dd></div>" for a, b, c in tiles]
    return f"<dl class=tiles>{''.join(cells)}</dl>"


def _measure_table(card: Card) -> str:
    rows = []
    for stage in card["stages"]:
        for place, measure in enumerate(stage["measures"]):
            title, value, span = shown(measure)
            style = "bad" if not measure["met"] else "good" if measure["target"] else ""
            rows.append([
                f"<b>{escape(stage['name'])}</b>" if not place else "", escape(title),
                f"<span class='{style}'>{value}</span>", span, escape(target(measure)),
                f"{measure['count']:,}" if measure["count"] else "",
            ])  # fmt: skip
    interval = "lowest to highest seed" if "seeds" in card else "95 % interval"
    return page.table(["stage", "measure", "value", interval, "target", "items"], rows)


def _conversation(card: Card) -> str:
    stages = [stage for stage in card["stages"] if stage["answers"]]
    parts = []
    for place in range(max((len(stage["answers"]) for stage in stages), default=0)):
        asked = stages[0]["answers"][place]["turns"][0]["content"]
        lines = []
        for stage in stages:
            said = stage["answers"][place]
            turns = "<br>".join(
                f"<span class=faint>→ {escape(turn['content'])}</span>" if turn["role"] == "tool"
                else escape(_visible(turn["content"]))
                for turn in said["turns"][1:]
            )  # fmt: skip
            strip = "".join(
                f"<span style='background:color-mix(in srgb, {page.COLORS[0]} {_shade(chance)}%, "
                f"transparent)' title='{chance:.1%}'>{escape(_visible(text))}</span>"
                for text, chance in said["tokens"]
            )
            lines.append(
                f"<b>{escape(stage['name'])}</b><div>{turns}<div class=strip>{strip}</div></div>"
            )
        parts.append(
            f"<div class=card><h3>{escape(asked)}</h3><div class=said>{''.join(lines)}</div></div>"
        )
    note = (
        "<p class=lead>Greedy answers with one seed. Below each: its tokens, darker where the "
        "model was surer.</p>"
    )
    return note + "".join(parts) if parts else "<p>No stage was asked.</p>"


def _charts(card: Card) -> str:
    figures = []
    for stage in card["stages"]:
        curves = stage["curves"]
        losses = [
            page.Curve(name, color, *curves[name])
            for name, color in (("train/loss", page.COLORS[0]), ("val/loss", page.COLORS[1]))
            if name in curves
        ]
        if losses:
            figures.append(page.figure(f"{stage['name']}: loss", page.chart(losses)))
        for name in ("rollout/reward", "val/accuracy", "val/kl"):
            if name in curves:
                drawing = page.chart([page.Curve("", page.COLORS[2], *curves[name])])
                figures.append(page.figure(f"{stage['name']}: {name}", drawing))
    return f"<div class=grid>{''.join(figures)}</div>"


def _lineage(card: Card) -> str:
    rows = []
    for stage in card["stages"]:
        origins = [
            f"{p['role']} ← {Path(p['path']).name} <span class=faint>{p['weights'][:12]}</span>"
            for p in stage["from"]
        ]
        texts = [f"{escape(Path(d['path']).name)} <span class=faint>{d['sha256'][:12]}</span>"
                 for d in stage["data"]]  # fmt: skip
        rows.append([
            f"<b>{escape(stage['name'])}</b>", "<br>".join(origins), "<br>".join(texts),
            f"<span class=mono>{stage['output'][:12]}</span>",
        ])  # fmt: skip
    return page.table(["stage", "weights taken", "data", "sha256 of the result"], rows)


def _costs(card: Card) -> str:
    rows = []
    for stage in card["stages"]:
        costs, seconds = stage["costs"], stage["costs"]["seconds"]
        whole = costs["wall_seconds"] or 1.0
        measured = {**seconds, "measures": costs["evaluation_seconds"]}
        bar = "".join(
            f"<i style='width:{100 * measured[kind] / whole:.1f}%;background:{color}' "
            f"title='{kind} {measured[kind]:.1f} s'></i>"
            for kind, color in zip((*KINDS, "measures"), page.COLORS, strict=True)
            if measured.get(kind)
        )
        distance = stage["distance"].get("rollout/difference_max")
        rows.append([
            f"<b>{escape(stage['name'])}</b>", clock(costs["wall_seconds"]),
            f"<div class=bar style='min-width:9rem'>{bar}</div>",
            f"{sum(stage['tokens'].values()):,}" if stage["tokens"] else "",
            f"{stage['flops']:.2g}" if stage["flops"] else "",
            f"{costs['peak_bytes'] / 1e9:.2f} GB" if costs["peak_bytes"] else "",
            f"${costs['price']:.4f}", f"{distance:.1e}" if distance is not None else "",
        ])  # fmt: skip
    keys = "".join(
        f"<span><i style='background:{color}'></i>{kind}</span>"
        for kind, color in zip((*KINDS, "measures"), page.COLORS, strict=True)
    )
    head = ["stage", "time", "spent on", "tokens", "FLOPs", "peak memory", "price",
            "sampler against trainer"]  # fmt: skip
    return page.table(head, rows) + f"<div class=keys style='margin-top:.6rem'>{keys}</div>"


def _commands(card: Card) -> str:
    folds = []
    for stage in card["stages"]:
        lines = [stage["command"], *dict.fromkeys(m["command"] for m in stage["measures"])]
        code = "\n".join(escape(line) for line in lines)
        folds.append(
            f"<details><summary>{escape(stage['name'])}</summary><pre>{code}</pre></details>"
        )
    return "".join(folds)


def _shade(chance: float) -> int:
    """Per cent of colour behind a token."""
    return round(8 + 40 * chance)


def _visible(text: str) -> str:
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "·" for c in shown) or "∅"

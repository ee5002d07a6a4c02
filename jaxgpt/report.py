"""The page of a run: report.html (self-contained, light and dark) and plots/*.png.

It reads what the run directory holds and leaves out what is missing:

    metrics.jsonl     every numeric metric becomes a plot; train/x and val/x share one
    samples.md        the last step's texts are open, the others folded
    config.yaml       what differs from the defaults is marked
    environment.json  a flat object
    lineage.json      origin and time; evals/*.json are what was measured of the run
"""

import contextlib
import dataclasses
import io
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxgpt import config, files, lineage, metrics
from jaxgpt.config import idle

Series = tuple[np.ndarray, np.ndarray]  # x, y
Plot = dict[str, Series]  # label -> curve

CALIBRATION = "calibration/"  # a reward model's, which has a figure of its own

_INK = "#010203"  # becomes the page's own text colour in the inlined SVG
_COLORS = {"train": "#3b82f6", "val": "#f97316", "": "#14a38b"}  # legible on white and on black
_MAX_POINTS = 2000  # per curve: more is neither visible nor light
_TITLES = {
    "loss": "Loss", "loss by tokens": "Loss over tokens", "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm", "speed/tokens_per_second": "Tokens per second",
    "speed/mfu": "Model FLOPs utilisation",
    "accuracy": "Accuracy", "nll": "Negative log-likelihood",
    "reward": "Reward on held-out problems", "exact_match": "Exact match on held-out problems",
    "rollout/reward": "Reward of rollouts", "rollout/exact_match": "Exact match of rollouts",
    "full_reward": "Share of held-out problems with the full reward",
    "rollout/full_reward": "Share of rollouts with the full reward",
    "rollout/length": "Tokens of an answer", "rollout/kl": "KL of an answer to the reference",
    "policy/kl": "KL to the reference", "policy/entropy": "Entropy",
    "speed/rollout_tokens_per_second": "Tokens per second, writing rollouts",
    "learnt_reward": "Learnt reward on held-out problems",
    "length": "Tokens of an answer to held-out problems",
    "truncated": "Share of held-out problems' answers that were cut off",
    "rollout/learnt_reward": "Learnt reward of rollouts",
    "rollout/difference_max": "Sampler against trainer: largest |Δ log p|",
    "rollout/difference_p999": "Sampler against trainer: 99.9 % of |Δ log p| lie below",
    "rollout/difference_mean": "Sampler against trainer: mean |Δ log p|",
    "rollout/truncated": "Share of rollouts that were cut off",
    "rollout/uninformative": "Share of groups that agree",
}  # fmt: skip


def write_report(run_dir: str | Path) -> Path:
    """Writes report.html and plots/*.png into the run directory; returns the page's path."""
    run_dir = files.path(run_dir)
    try:
        records = metrics.read_jsonl(run_dir / "metrics.jsonl")
        problem = metrics.outran(records)
    except ValueError as error:  # a damaged log must not cost the rest of the page
        records, problem = [], str(error)
    series = _series(records)
    sections = [
        _tiles(series), problem and f"<p class=note>{escape(problem)}</p>",
        _curves(_plots(series), run_dir / "plots"), _reliability(records, run_dir / "plots"),
        _origin(run_dir), _evaluations(run_dir),
        _samples(run_dir / "samples.md"), _settings(run_dir),
        _environment(run_dir / "environment.json"),
    ]  # fmt: skip
    page = run_dir / "report.html"
    name = escape(run_dir.resolve().name)
    body = "\n".join(filter(None, sections))
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return files.write(page, template.replace("NAME", name).replace("BODY", body, 1))


def while_it_runs(run_dir: str | Path) -> Callable[[], None]:
    """Writes the page when called, from the first half minute on, for at most a twentieth of the
    time."""
    due = time.perf_counter() + 30

    def write() -> None:
        nonlocal due
        began = time.perf_counter()
        if began >= due:
            write_report(run_dir)
            ended = time.perf_counter()
            due = ended + 20 * (ended - began)

    return write


def _series(records: list[dict[str, Any]]) -> dict[str, Series]:
    """Every metric by name, where it is a finite number."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            if (
                name != "step"
                and CALIBRATION not in name
                and isinstance(value, int | float)
                and abs(value) < 1e300
            ):
                points[name].append((record["step"], value))
    columns = {name: np.array(pairs, float).T for name, pairs in points.items()}
    return {name: (steps, values) for name, (steps, values) in columns.items()}


def _plots(series: dict[str, Series]) -> dict[str, Plot]:
    """Curves by plot: train/x and val/x go into plot x, all others stand alone."""
    plots: dict[str, Plot] = defaultdict(dict)
    for name, curve in sorted(series.items()):
        split, _, rest = name.partition("/")
        key, label = (rest, split) if split in ("train", "val") and rest else (name, "")
        plots[key][label] = curve
    known = plots.pop("tokens", {}).get("train")
    if known and "loss" in plots:
        plots["loss by tokens"] = {
            label: (np.interp(steps, *known), values)
            for label, (steps, values) in plots["loss"].items()
        }
    rank = list(_TITLES)
    order = lambda key: (rank.index(key) if key in rank else len(rank), key)
    return {key: plots[key] for key in sorted(plots, key=order)}


def _tiles(series: dict[str, Series]) -> str:
    """The run in a few numbers."""
    tiles = {}
    if "val/loss" in series:
        steps, values = series["val/loss"]
        best = int(values.argmin())
        tiles["validation loss"] = f"{values[0]:.3f} → {values[-1]:.3f}"
        tiles["best validation loss"] = f"{values[best]:.3f} <small>step {steps[best]:,.0f}</small>"
    for name in ("exact_match", "full_reward"):
        if f"val/{name}" in series:
            _, values = series[f"val/{name}"]
            tiles[name.replace("_", " ")] = f"{values[0]:.1%} → {values[-1]:.1%}"
    if "train/loss" in series:
        steps, values = series["train/loss"]
        tiles["training loss"] = f"{values[0]:.3f} → {values[-1]:.3f}"
        tiles["steps"] = f"{steps[-1]:,.0f}"
    if "train/tokens" in series:
        tiles["tokens"] = metrics.short(series["train/tokens"][1][-1])
    if "speed/tokens_per_second" in series:
        rate = np.median(series["speed/tokens_per_second"][1])
        tiles["tokens/s"] = metrics.short(float(rate))
    if "speed/mfu" in series:
        tiles["MFU"] = f"{np.median(series['speed/mfu'][1]):.1%}"
    cells = [f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles.items()]
    return f"<dl class=tiles>{''.join(cells)}</dl>" if cells else ""


def _curves(plots: dict[str, Plot], directory: Path) -> str:
    """A grid of figures, and a PNG of each."""
    if not plots:
        return ""
    files.make_folder(directory)
    figures = []
    for key, plot in plots.items():
        group, slash, name = key.rpartition("/")
        title = f"<small>{escape(group + slash)}</small>{escape(name.replace('_', ' '))}"
        svg = _draw(key, plot, directory / f"{re.sub(r'[^A-Za-z0-9_.]+', '-', key)}.png")
        caption = f"<figcaption>{_TITLES.get(key, title)}</figcaption>"
        figures.append(f"<figure>{caption}{svg}</figure>")
    return f"<h2>Curves</h2>\n<div class=grid>{''.join(figures)}</div>"


def _draw(key: str, plot: Plot, png: Path) -> str:
    """Draws one figure into a PNG and returns it as inline SVG."""
    from matplotlib.ticker import EngFormatter

    with _figure(key, png) as (axes, svg):
        for label, curve in plot.items():
            _draw_curve(axes, label, *curve)
        values = np.concatenate([y for _, y in plot.values()])
        if key != "loss" and values.min() > 0 and values.max() > 1000 * values.min():
            axes.set_yscale("log")
        axes.grid(alpha=0.13, linewidth=0.7)
        for axis, quantity in ((axes.xaxis, "by tokens"), (axes.yaxis, "tokens_per_second")):
            if key.endswith(quantity):
                axis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("tokens" if key.endswith("by tokens") else "step")
        if len(plot) > 1:
            axes.legend(frameon=False)
    return svg[0]


@contextlib.contextmanager
def _figure(key: str, png: Path) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on; afterwards the list holds the inline SVG, and the PNG is written."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.edgecolor": _INK, "grid.color": _INK, "svg.fonttype": "none", "font.size": 9,
        "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.limits": (-3, 5),
        "axes.formatter.useoffset": False, "svg.hashsalt": key,
    }  # fmt: skip
    markup: list[str] = []
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.6, 3.1), layout="constrained")
        yield figure.add_subplot(), markup
        image = io.BytesIO()
        figure.savefig(image, dpi=150)
        png.write_bytes(image.getvalue())
        svg = io.StringIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    markup.append(text[text.index("<svg") :].replace(_INK, "currentColor"))


def _draw_curve(axes: Any, label: str, x: np.ndarray, y: np.ndarray) -> None:
    """Many noisy points as a pale line under their moving mean, few points with dots."""
    color = _COLORS[label]
    stride = -(-len(x) // _MAX_POINTS)
    many = len(x) >= 50 and label != "val"
    if many:
        axes.plot(x[::stride], y[::stride], color=color, alpha=0.3, linewidth=0.8)
        y = _smooth(y, reach=len(y) // 40)
    dots = "o" if len(x) < 50 else ""
    names = {"train": "training", "val": "validation"}
    axes.plot(
        x[::stride], y[::stride], dots + "-", color=color, linewidth=1.6, markersize=3.2,
        label=names.get(label, label),
    )  # fmt: skip


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over `reach` points on either side, over fewer but as many on both near the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reaches = np.minimum(reach, np.minimum(index, index[::-1]))
    return (total[index + reaches + 1] - total[index - reaches]) / (2 * reaches + 1)


def _reliability(records: list[dict[str, Any]], directory: Path) -> str:
    """How often a reward model is right against how sure it is, at the last evaluation."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for record in records:
        known = {name: value for name, value in record.items() if CALIBRATION in name}
        found = defaultdict(dict) if known else found
        for name, value in known.items():
            _, bin, measure = name.rsplit("/", 2)
            found[bin][measure] = value
    bins = [found[bin] for bin in sorted(found) if {"expected", "right"} <= found[bin].keys()]
    if not bins:
        return ""
    sure, right, share = (
        np.array([bin[name] for bin in bins]) for name in ("expected", "right", "share")
    )
    files.make_folder(directory)
    with _figure("reliability", directory / "reliability.png") as (axes, svg):
        axes.plot([0.5, 1], [0.5, 1], "--", color=_INK, alpha=0.4, label="perfectly calibrated")
        axes.plot(sure, right, "-", color=_COLORS["val"], linewidth=1.6)
        axes.scatter(sure, right, 20 + 300 * share, color=_COLORS["val"], label="held-out pairs")
        axes.set_xlabel("probability that it gives to the answer it prefers")
        axes.set_ylabel("share in which it is right")
        axes.grid(alpha=0.13, linewidth=0.7)
        axes.legend(frameon=False)
    error = float((share * np.abs(right - sure)).sum())
    caption = f"<figcaption>Expected calibration error {error:.3f}</figcaption>"
    return (
        "<h2>Calibration of the reward</h2>\n"
        f"<div class=grid><figure>{caption}{svg[0]}</figure></div>"
    )


def _origin(run_dir: Path) -> str:
    """Where the run comes from, and what its time was spent on, by lineage.json."""
    found = lineage.read(run_dir)
    if not found:
        return ""
    rows = [("command", escape(found["command"]))]
    for parent in found["parents"]:
        place = lineage.where(run_dir, parent)
        name, page = escape(parent["path"]), f"{parent['relative']}/report.html"
        if place and (place / "report.html").is_file():
            name = f'<a href="{escape(page, quote=True)}">{name}</a>'
        rows.append((escape(parent["role"]), f"{name}, weights {parent['weights']['sha256'][:12]}"))
    rows += [
        (escape(entry["setting"]), f"{escape(entry['path'])}, sha256 {entry['sha256'][:12]}")
        for entry in found["data"]
    ]
    spent = lineage.spent(found, "seconds")
    tokens = [f"{kind} {count:,}" for kind, count in lineage.spent(found, "tokens").items()]
    rows.append(("tokens", ", ".join(tokens)))
    whole = sum(spent.values()) or 1.0
    times = [
        (escape(kind), f"{seconds:,.1f} s", f"{seconds / whole:.1%}")
        for kind, seconds in sorted(spent.items(), key=lambda pair: -pair[1])
    ]
    return "\n".join([
        "<h2>Where it comes from</h2>", _table((), rows), "<h2>Time</h2>",
        _table(("kind", "seconds", "share"), times) if times else "<p>Nothing is saved yet.</p>",
    ])  # fmt: skip


def _evaluations(run_dir: Path) -> str:
    """What scripts/evaluate.py measured, with 95 % intervals."""
    rows = [
        (escape(result["task"]), escape(result["data"]), escape(name),
         f"{value:.4f} ± {1.96 * error:.4f}", f"{result['count']:,}")
        for result in lineage.results(run_dir)
        for name, value, error in lineage.measures(result)
    ]  # fmt: skip
    head = ("task", "data", "measure", "value, 95 % interval", "items")
    return f"<h2>Evaluations</h2>\n{_table(head, rows)}" if rows else ""


def _samples(path: Path) -> str:
    """One fold per step, newest first and open."""
    sections = metrics.read_samples(path)
    folds = []
    for step, texts in reversed(sections):
        opened = " open" if step == sections[-1][0] else ""
        blocks = "".join(f"<pre>{escape(text)}</pre>" for text in texts)
        folds.append(f"<details{opened}><summary>step {step:,}</summary>{blocks}</details>")
    return "\n".join(["<h2>Samples</h2>", *folds]) if folds else ""


def _settings(run_dir: Path) -> str:
    """A table of what differs from the defaults, and the whole config with those lines marked."""
    path = run_dir / "config.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    if not isinstance(settings, dict):
        return ""
    # The command whose defaults these are; a run of an older version does not name it.
    stage = (lineage.read(run_dir) or {}).get("stage", "")
    kind = config.RUN_CONFIGS.get(stage, config.RunConfig)
    flat = idle.flat(settings)
    defaults = idle.flat(dataclasses.asdict(kind(run=str(settings.get("run", "")))))
    changed = [name for name, value in flat.items() if value != defaults.get(name)]
    rows = [(escape(n), _show(flat[n]), _show(defaults.get(n))) for n in changed]
    lines = []
    for name, value in flat.items():
        line = f"{escape(name)}: {_show(value)}"
        lines.append(f"<mark>{line}</mark>" if name in changed else line)
    whole = "\n".join(lines)
    return "\n".join([
        "<h2>Settings that differ from the defaults</h2>",
        _table(("setting", "value", "default"), rows) if rows else "<p>None.</p>",
        f"<details><summary>all settings</summary><pre>{whole}</pre></details>",
    ])  # fmt: skip


def _environment(path: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    rows = [(name.replace("_", " "), _show(value)) for name, value in content.items()]
    return "<h2>Environment</h2>\n" + _table((), [row for row in rows if row[1]])


def _show(value: Any) -> str:
    return escape(json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Cells are HTML already."""
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"
    header = line(head, "th") if head else ""
    body = "".join(line(cells, "td") for cells in rows)
    return f"<div class=scroll><table>{header}{body}</table></div>"

"""Groups of runs: what differs in their settings, what came out, whether chance explains it.

Runs that differ in nothing but the seed are one group. Where both groups ran the same seeds, the
differences are taken seed by seed: what a seed does to both cancels.
"""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from jaxgpt.life import page
from jaxgpt.life.runs import Run

CONFIDENCE = 0.95  # of the interval that is shown
# A claim asks for more than the interval: by chance alone one comparison in fifty is told apart.
CLAIM = 0.02


class Group(NamedTuple):
    """Runs of one config, by seed."""

    name: str
    runs: dict[int, Run]

    def values(self, metric: str) -> dict[int, float]:
        """The last value of a metric by seed.

        Raises:
            ValueError: a run does not have it.
        """
        found = {}
        for seed, run in self.runs.items():
            series = run.series(metric)
            if not series:
                names = {n for record in run.records for n in record if n.startswith("val/")}
                raise ValueError(
                    f"metric={metric}: {run.path} has no such number; it has "
                    f"{', '.join(sorted(names)) or 'no val/… at all'}"
                )
            found[seed] = series[max(series)]
        return found


class Difference(NamedTuple):
    """Mean of one group less mean of the other."""

    mean: float
    low: float  # of the 95 % t interval; NaN where one run each allows none
    high: float
    p: float
    pairs: int  # seeds that both groups ran; 0: the groups are taken as they are (Welch)

    @property
    def verdict(self) -> str:
        if math.isnan(self.p):
            return "no claim"
        return "told apart" if self.p < CLAIM else "not told apart"


def grouped(paths: Sequence[str | Path], side: str) -> list[Group]:
    """The groups of a list of runs, named after the side and what sets them apart.

    Raises:
        ValueError: a path is no run, or two runs have all settings and the seed in common.
    """
    found: dict[str, dict[int, Run]] = {}
    for run in map(Run, paths):
        key, seed = repr(sorted(run.settings.items())), run.config["seed"]
        if seed in (mine := found.setdefault(key, {})):
            raise ValueError(
                f"{mine[seed].path} and {run.path}: have the same settings and seed={seed}; drop "
                "one"
            )
        mine[seed] = run
    several = len(found) > 1
    return [
        Group(f"{side}{n}" if several else side, dict(sorted(runs.items())))
        for n, runs in enumerate(found.values(), 1)
    ]


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Difference:
    """Ours less theirs, paired by seed where at least two seeds are common."""
    common = sorted(ours.keys() & theirs.keys())
    if len(common) >= 2:
        apart = np.array([ours[seed] - theirs[seed] for seed in common])
        return _interval(
            apart.mean(), apart.std(ddof=1) / math.sqrt(len(apart)), len(apart) - 1, len(apart)
        )
    a, b = np.array([*ours.values()]), np.array([*theirs.values()])
    if min(len(a), len(b)) < 2:
        return Difference(float(a.mean() - b.mean()), math.nan, math.nan, math.nan, 0)
    of_a, of_b = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    error = math.sqrt(of_a + of_b)
    freedom = 1.0  # Welch and Satterthwaite
    if error:
        freedom = error**4 / (of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1))
    return _interval(a.mean() - b.mean(), error, freedom, 0)


def compare(ours: Sequence[Group], against: Group, metric: str) -> dict[str, Any]:
    """Everything that a comparison says, as one JSON object."""
    values = {group.name: group.values(metric) for group in (*ours, against)}
    found = {group.name: difference(values[group.name], values[against.name]) for group in ours}
    finite = lambda number: None if math.isnan(number) else number
    return {
        "metric": metric,
        "against": against.name,
        "groups": [
            {
                "name": group.name,
                "runs": [str(run.path) for run in group.runs.values()],
                "seeds": list(group.runs),
                "values": list(values[group.name].values()),
                "mean": float(np.mean([*values[group.name].values()])),
                "sd": finite(_deviation([*values[group.name].values()])),
            }
            for group in (*ours, against)
        ],
        "comparisons": [
            {
                "group": name, "difference": d.mean, "confidence": CONFIDENCE,
                "interval": None if math.isnan(d.p) else [d.low, d.high], "p": finite(d.p),
                "paired": d.pairs > 0, "pairs": d.pairs, "verdict": d.verdict,
            }
            for name, d in found.items()
        ],
        "differing": differing([*ours, against]),
    }  # fmt: skip


def differing(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Setting -> its value in each group, where they are not all the same."""
    settings = {group.name: next(iter(group.runs.values())).settings for group in groups}
    names = dict.fromkeys(name for known in settings.values() for name in known)
    table = {name: {g: known.get(name) for g, known in settings.items()} for name in names}
    return {name: row for name, row in table.items() if len({repr(v) for v in row.values()}) > 1}


def sentences(result: dict[str, Any]) -> list[str]:
    """What a comparison found, one sentence for each group."""
    groups = {group["name"]: group for group in result["groups"]}
    base = groups[result["against"]]
    found = []
    for entry in result["comparisons"]:
        mine = groups[entry["group"]]
        line = (
            f"{result['metric']}: {mine['name']} {mine['mean']:.4g} (n = {len(mine['seeds'])}), "
            f"{base['name']} {base['mean']:.4g} (n = {len(base['seeds'])}), difference "
            f"{entry['difference']:+.4g}"
        )
        if entry["interval"] is None:
            fewest = min(len(mine["seeds"]), len(base["seeds"]))
            line += f": no claim, n = {fewest} says nothing of chance; run more seeds"
        else:
            low, high = entry["interval"]
            how = f"paired by {entry['pairs']} seeds" if entry["paired"] else "not paired (Welch)"
            line += f", 95 % interval {low:+.4g} to {high:+.4g}, {how}, p = {entry['p']:.2g}"
            line += f": {entry['verdict']}"
        found.append(line)
    return found


def warnings(groups: Sequence[Group]) -> list[str]:
    """Runs whose last step is not that of the others."""
    steps = {run.path: max((r["step"] for r in run.records), default=0)
             for group in groups for run in group.runs.values()}  # fmt: skip
    most = max(steps.values())
    return [
        f"warning: {path} ends at step {step:,}, others at {most:,}"
        for path, step in steps.items()
        if step < most
    ]


def html(result: dict[str, Any], groups: Sequence[Group]) -> str:
    """The comparison as a page."""
    metric = result["metric"]
    colors = {group.name: page.COLORS[n % len(page.COLORS)] for n, group in enumerate(groups)}
    verdicts = "".join(
        f"<p class='verdict'>{escape(line)}</p>" for line in [*sentences(result), *warnings(groups)]
    )
    rows = [
        [escape(group["name"]), f"{group['mean']:.5g}",
         "-" if group["sd"] is None else f"{group['sd']:.3g}",
         ", ".join(f"{seed}: {value:.5g}"
                   for seed, value in zip(group["seeds"], group["values"], strict=True)),
         "<br>".join(escape(path) for path in group["runs"])]
        for group in result["groups"]
    ]  # fmt: skip
    names = [group.name for group in groups]
    settings = [
        [escape(name), *(f"<code>{escape(str(row[group]))}</code>" for group in names)]
        for name, row in result["differing"].items()
    ]
    shared = _shared_metrics(groups)
    shared.sort(key=lambda name: (name != metric, not name.startswith("val/"), name))
    figures = [page.figure(name, page.chart(curves(groups, name, colors))) for name in shared]
    return page.page(f"{' · '.join(names[:-1])} against {names[-1]}", "\n".join([
        f"<p class=lead>{escape(metric)}, last value of every run. Lines are means over seeds, "
        "bands go from the lowest to the highest seed.</p>", verdicts,
        "<h2>Groups</h2>", page.table(["group", "mean", "sd", "by seed", "runs"], rows),
        "<h2>Settings that differ</h2>",
        page.table(["setting", *map(escape, names)], settings) if settings else "<p>None.</p>",
        "<h2>Curves</h2>", f"<div class=grid>{''.join(figures)}</div>",
    ]))  # fmt: skip


def curves(groups: Sequence[Group], metric: str, colors: dict[str, str]) -> list[page.Curve]:
    """Mean over seeds by step, with lowest and highest, where all runs of a group have the step."""
    found = []
    for group in groups:
        series = [run.series(metric) for run in group.runs.values()]
        steps = sorted(set.intersection(*map(set, series))) if all(series) else []
        values = np.array([[one[step] for step in steps] for one in series])
        if steps:
            band = (values.min(0), values.max(0)) if len(series) > 1 else ([], [])
            found.append(page.Curve(group.name, colors[group.name], steps, list(values.mean(0)),
                                    list(band[0]), list(band[1])))  # fmt: skip
    return found


def _shared_metrics(groups: Sequence[Group]) -> list[str]:
    names = [
        {name for record in run.records for name in record}
        for group in groups
        for run in group.runs.values()
    ]
    hidden = lambda name: name == "step" or name.startswith(("speed/", "calibration/"))
    return [name for name in set.intersection(*names) if not hidden(name)]


def _interval(mean: float, error: float, freedom: float, pairs: int) -> Difference:
    """A t interval. Equal numbers everywhere leave no doubt: the interval is a point."""
    if error == 0:
        return Difference(float(mean), float(mean), float(mean), float(mean == 0), pairs)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, freedom))
    return Difference(float(mean), float(mean - half), float(mean + half), p, pairs)


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

"""report.html: the run on one page, in one file that needs nothing else."""

import itertools
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from longwave.models.saving import write_text
from longwave.tasks.progress import clock
from longwave.training.chart import Line, line_chart, smooth
from longwave.training.live import thousands
from longwave.training.log import read_log

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #667079; --page: #fbfbfa; --card: #fff; --rule: #e3e5e8;
  --line: #0b63ce; --faint: #0b63ce44; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #98a2ab; --page: #15181b; --card: #1d2125;
  --rule: #33393f; --line: #6cb2ff; --faint: #6cb2ff55; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .75rem; }
.tiles, .charts { display: grid; gap: 1rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin-top: 1.5rem; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.tile, figure, pre, table { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; }
.tile { padding: .75rem 1rem; } .tile b { display: block; font-size: 1.35rem; font-weight: 600; }
.tile span, .soft, figcaption { color: var(--soft); font-size: .875rem; }
figure { margin: 0; padding: .75rem 1rem; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 13px; } .grid { stroke: var(--rule); }
polyline { fill: none; stroke: var(--line); stroke-width: 2; stroke-linejoin: round; }
polyline.faint { stroke: var(--faint); stroke-width: 1; } .dot { fill: var(--line); }
pre { margin: .25rem 0 1rem; padding: .75rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .875rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; } summary { cursor: pointer; margin: .5rem 0; }
td { padding: .3rem .75rem; border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; vertical-align: top; }
td:first-child { color: var(--soft); width: 16rem; }
"""


def write_report(out: str | Path) -> Path:
    """Make <out>/report.html from <out>/log.jsonl. The run may still be going on."""
    path = Path(out) / "report.html"
    write_text(path, render(Path(out).name, read_log(out)))
    return path


def render(name: str, entries: list[dict[str, Any]]) -> str:
    """The page, from the log's entries, the first of which is a `start`."""
    events: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ("start", "step", "eval", "sample", "checkpoint")}
    for entry in entries:
        events[entry["event"]].append(entry)
    start = events["start"][-1]
    title = f"Training run: {escape(name)}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head>
<body>
<h1>{title}</h1>
<div class="tiles">{_tiles(events)}</div>
<h2>Curves</h2><div class="charts">{_charts(events)}</div>
<h2>Samples</h2>{_samples(events["sample"])}
<h2>Repeat it</h2><pre>{escape(start["command"])}</pre>
<h2>Environment</h2>{_table(start["environment"].items())}
<h2>Configuration</h2><details><summary>All settings</summary>{_table(_settings(start["config"]))}</details>
</body>
</html>
"""


def _tiles(events: dict[str, list[dict[str, Any]]]) -> str:
    start, steps, evals = events["start"][-1], events["step"], events["eval"]
    tiles = [(thousands(start["parameters"]), "parameters")]
    if evals:
        best = min(evals, key=lambda entry: entry["bits_per_byte"])
        last = evals[-1]
        tiles.append((f"{last['bits_per_byte']:.3f}", f"bits per byte, {last['n_bytes']:,} held-out bytes"))
        tiles.append((f"{best['bits_per_byte']:.3f}", f"best, after step {best['step']}"))
    if steps:
        seconds = sum(entry["seconds"] for entry in steps)
        tiles.append((str(steps[-1]["step"]), "steps"))
        tiles.append((thousands(steps[-1]["tokens"]), "tokens seen"))
        tiles.append((clock(seconds), "spent in training steps"))
        tiles.append((thousands(steps[-1]["tokens"] / seconds), "tokens per second"))
        speed = start["flops_per_token"] * steps[-1]["tokens"] / seconds
        tiles.append((f"{thousands(speed)}FLOP/s", "sustained, counted from the model"))
    return "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in tiles)


def _charts(events: dict[str, list[dict[str, Any]]]) -> str:
    steps = events["step"]

    def line(key: str) -> list[tuple[float, float]]:
        return [(entry["step"], entry[key]) for entry in steps]

    speed = [
        (now["step"], (now["tokens"] - before["tokens"]) / now["seconds"]) for before, now in itertools.pairwise(steps)
    ]
    held_out = [(entry["step"], entry["bits_per_byte"]) for entry in events["eval"]]
    loss = [Line("each step", line("loss"), "faint"), Line("running mean", smooth(line("loss")))]
    charts = [
        line_chart("Training loss, nats per token", "step", loss),
        line_chart("Held-out text, bits per byte", "step", [Line("bits per byte", held_out, "marked")]),
        line_chart("Learning rate", "step", [Line("learning rate", line("lr"))]),
        line_chart("Norm of the gradient, before clipping", "step", [Line("norm", line("grad_norm"))]),
        line_chart("Tokens per second", "step", [Line("tokens per second", speed)]),
    ]
    return "".join(charts)


def _samples(samples: list[dict[str, Any]]) -> str:
    """Newest first: what the model writes, and how it got there."""
    if not samples:
        return '<p class="soft">None yet.</p>'
    return "".join(
        f'<div class="soft">after step {entry["step"]}</div><pre>{escape(entry["text"])}</pre>'
        for entry in reversed(samples)
    )


def _settings(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Settings with dotted names; lists of layers stay in one line each."""
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _settings(item, f"{prefix}{key}.")
        elif isinstance(item, list) and any(isinstance(part, dict) for part in item):
            yield from ((f"{prefix}{key}[{i}]", json.dumps(part)) for i, part in enumerate(item))
        else:
            yield f"{prefix}{key}", item


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = (f"<tr><td>{escape(str(key))}</td><td>{escape(str(value))}</td></tr>" for key, value in rows)
    return f"<table>{''.join(cells)}</table>"

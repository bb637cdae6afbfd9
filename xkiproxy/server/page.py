"""The status page: one HTML document that needs nothing else, for people in a hurry.

It shows what /status and /metrics say, in words and plots. It works without JavaScript (the browser
then loads it anew); with it, only what changes is exchanged, and a page that is out of date says
so: a proxy that hangs must not look ready. Of requests there are counts alone.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from xkiproxy.observability.series import Snapshot
from xkiproxy.server.trend import STEPS, Point

_WIDTH, _HEIGHT = 600, 90
_DEADLINE_SECONDS = 0.25
_SOON_DAYS = 30

_STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --dim: #5f6b76; --line: #d7dde3;
  --back: #ffffff; --good: #1a7f45; --warn: #9a6700; --bad: #c62828; --plot: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --text: #e6eaee; --dim: #9aa7b3; --line: #38424c;
  --back: #14181c; --good: #4cc47f; --warn: #e0b341; --bad: #ff7b72; --plot: #79a8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--back);
  color: var(--text); font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
p { margin: .3rem 0; } .dim { color: var(--dim); }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.state { font-weight: 600; white-space: nowrap; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } th { color: var(--dim); font-weight: 500; }
ul { margin: .3rem 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
figure { margin: 0; } figcaption { color: var(--dim); }
svg { width: 100%; height: auto; display: block; border-bottom: 1px solid var(--line); }
polyline { fill: none; stroke: var(--plot); stroke-width: 2; vector-effect: non-scaling-stroke; }
polyline.second { stroke: var(--bad); } line { stroke: var(--warn); stroke-dasharray: 4 4; }
main.old > :not(h1, #old) { opacity: .35; }
"""

_SCRIPT = """
setInterval(async () => {
  const main = document.querySelector("main");
  try {
    const answer = await fetch(location.href,
      { cache: "no-store", signal: AbortSignal.timeout(4000) });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const next = page.querySelector("main");
    if (next === null) throw new Error("something else answers");
    main.replaceWith(next);
    document.title = page.title;
  } catch (error) {
    document.title = "xkiproxy: no answer";
    main.className = "old";
    main.querySelector("h1").className = "bad";
    main.querySelector("h1").textContent = "xkiproxy does not answer";
    main.querySelector("#old").textContent = `No answer since ${
      main.querySelector("time").textContent} (${error.message}). What is below is of then.`;
  }
}, 5000);
"""


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


POLICY = (
    f"default-src 'none'; style-src 'sha256-{_digest(_STYLE)}';"
    f" script-src 'sha256-{_digest(_SCRIPT)}'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page's Content-Security-Policy (CSP Level 3): itself, and nothing from anywhere."""


def render(
    status: Mapping[str, Any], snapshot: Snapshot, points: Sequence[Point], now: datetime
) -> str:
    """The page; `status` is what /status says, `now` in UTC."""
    word = "ready" if status["ready"] else "not ready"
    if status["ready"] and status["problems"]:
        word = "ready, with problems"
    parts = [
        _head(status, word),
        _problems(status),
        _traffic(points),
        _stores(status),
        _kmis(status, snapshot),
        _lanes(status),
        _dates(status, snapshot, now),
        _audit(status),
        _reload(status),
        f'<p class="dim"><time>{escape(now.strftime("%Y-%m-%d %H:%M:%S"))} UTC</time></p>',
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>xkiproxy: {word}</title><style>{_STYLE}</style>"
        '<noscript><meta http-equiv="refresh" content="5"></noscript></head>'
        f"<body><main>{''.join(parts)}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _head(status: Mapping[str, Any], word: str) -> str:
    tone = "bad" if not status["ready"] else "warn" if status["problems"] else "good"
    workers = status.get("workers")
    count = f", {len(workers)} workers" if workers else ""
    said = f"version {status['version']}, since {status['started']}, process {status['pid']}{count}"
    return (
        f'<h1>xkiproxy is <span class="{tone}">{word}</span></h1><p id="old" class="bad"></p>'
        f'<p class="dim">{escape(said)}</p>'
    )


def _problems(status: Mapping[str, Any]) -> str:
    if not status["problems"]:
        return ""
    return f"<h2>What is wrong</h2>{_list(status['problems'], 'bad')}"


def _traffic(points: Sequence[Point]) -> str:
    last = points[-1] if points else Point(0.0, 0.0, math.nan, math.nan)
    rates, failures = [p.rate for p in points], [p.failures for p in points]
    times = [p.p99 for p in points]
    most = max([1.0, *rates])
    slowest = max([0.01, *(t for t in times if not math.isnan(t))])
    deadline = _level(_DEADLINE_SECONDS, slowest) if slowest >= _DEADLINE_SECONDS else ""
    traffic = _line(rates, most) + _line(failures, most, "second")
    return (
        '<h2>Traffic</h2><div class="plots">'
        f"<figure>{_plot(traffic, 'requests a second')}"
        f"<figcaption>{last.rate:,.1f} requests a second, {last.failures:,.1f} of them refused or"
        f" failed. Ten minutes; the top is {most:,.0f}.</figcaption></figure>"
        f"<figure>{_plot(_line(times, slowest) + deadline, '99th percentile of the latency')}"
        f"<figcaption>Answered within {_ms(last.p50)} (median), {_ms(last.p99)} (99 in 100)."
        f" Ten minutes; the top is {_ms(slowest)}.</figcaption></figure></div>"
    )


def _stores(status: Mapping[str, Any]) -> str:
    rows = []
    for store in _each(status, "keystores"):
        tone = {"ACTIVE": "good", "DEGRADED": "warn"}.get(store["availability"], "bad")
        rows.append(
            [
                escape(store["name"]),
                f'<span class="state {tone}">{escape(store["availability"].lower())}</span>',
                escape(store["protocol"]),
                escape(store["path"]),
                escape(", ".join(store["kmis"])),
            ]
        )
    return "<h2>Key stores</h2>" + _table(["name", "state", "protocol", "path", "KMIs"], rows)


def _kmis(status: Mapping[str, Any], snapshot: Snapshot) -> str:
    rows = []
    for kmi in _each(status, "kmis"):
        tone = {"connected": "good", "degraded": "warn"}.get(kmi["state"], "bad")
        name = kmi["name"]
        lanes = [
            f"{int(values[0])} {labels[1]}"
            for labels, values in snapshot.get("xkiproxy_kmi_lanes", {}).items()
            if labels[0] == name and values[0]
        ]
        waiting = snapshot.get("xkiproxy_kmi_queue_depth", {}).get((name,), [0.0])[0]
        rows.append(
            [
                escape(name),
                f'<span class="state {tone}">{escape(kmi["state"])}</span>',
                escape(kmi["type"]),
                escape(", ".join(lanes) or "none"),
                f"{int(waiting)}",
                escape(kmi["error"]) or _past_error(status, name),
            ]
        )
    columns = ["name", "state", "type", "lanes", "waiting", "last error"]
    return "<h2>Key managers</h2>" + _table(columns, rows)


def _past_error(status: Mapping[str, Any], name: str) -> str:
    """The newest of all processes, with its time: it is over."""
    errors = [
        kmi["last_error"]
        for process in _processes(status)
        for kmi in process["kmis"]
        if kmi["name"] == name and kmi["last_error"] is not None
    ]
    if not errors:
        return '<span class="dim">none</span>'
    newest = max(errors, key=lambda error: str(error["time"]))
    return f'<span class="dim">{escape(newest["time"])}: {escape(newest["error"])}</span>'


def _lanes(status: Mapping[str, Any]) -> str:
    """Each lane by the number that the log gives it; workers have lanes of their own."""
    rows = []
    for number, process in enumerate(status.get("workers", [status]), 1):
        where = f" of worker {number}" if "workers" in status else ""
        for kmi in process["kmis"] if process is not None else []:
            lanes = [_lane(index, state) for index, state in enumerate(kmi["lanes"])]
            rows.append([escape(kmi["name"] + where), ", ".join(lanes)])
    return "<h2>Lanes</h2>" + _table(["KMI", "lanes"], rows)


def _lane(index: int, state: str) -> str:
    tone = {"failed": "bad", "starting": "warn"}.get(state, "good")
    return f'lane {index} <span class="{tone}">{escape(state)}</span>'


def _dates(status: Mapping[str, Any], snapshot: Snapshot, now: datetime) -> str:
    rows = []
    family = snapshot.get("xkiproxy_tls_certificate_expiry_timestamp_seconds", {})
    for (listener,), (seconds, *_) in family.items():
        end = datetime.fromtimestamp(seconds, UTC)
        days = (end - now).days
        tone = "good" if days > _SOON_DAYS else "warn" if days > 7 else "bad"
        rows.append(
            [
                f"certificate ({escape(listener)})",
                f'<span class="{tone}">expires {end:%Y-%m-%d}, in {days} days</span>',
            ]
        )
    for store in _each(status, "keystores"):
        for credential in store["credentials"]:
            name = f"credential {credential['access_key_id']} of {store['name']}"
            rows.append([escape(name), f"created {escape(credential['created'][:10])}"])
    return "<h2>Certificates and credentials</h2>" + _table(["what", "date"], rows)


def _audit(status: Mapping[str, Any]) -> str:
    rows: dict[str, list[str]] = {}
    for process in _processes(status):
        for sink in process["audit"]["sinks"]:
            if sink["name"] not in rows or not sink["up"]:
                word = '<span class="good">takes records</span>'
                if not sink["up"]:
                    word = f'<span class="bad">{escape(sink["error"])}</span>'
                rows[sink["name"]] = [escape(sink["name"]), word]
    return "<h2>Audit log</h2>" + _table(["sink", "state"], rows.values())


def _reload(status: Mapping[str, Any]) -> str:
    last = status["reload"]
    if not last["number"]:
        return "<h2>Last reload</h2><p>None since the start.</p>"
    said = _list(last["problems"], "bad") if last["problems"] else _list(last["changes"], "")
    word = "failed and changed nothing" if last["problems"] else "done"
    return f"<h2>Last reload</h2><p>{escape(last['time'])}: {word}.</p>{said}"


# ---- pieces ----------------------------------------------------------------------------------


def _processes(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The processes that serve; one that is being started has nothing to say."""
    return [process for process in status.get("workers", [status]) if process is not None]


def _each(status: Mapping[str, Any], what: str) -> Iterator[Mapping[str, Any]]:
    """Key stores or KMIs, each as the worker has it that is worst off."""
    worst: dict[str, Mapping[str, Any]] = {}
    order = ["ACTIVE", "connected", "DEGRADED", "degraded", "UNAVAILABLE", "disconnected"]
    for process in _processes(status):
        for item in process[what]:
            known = worst.get(item["name"])
            state = item.get("state") or item["availability"]
            if known is None or order.index(state) > order.index(
                known.get("state") or known["availability"]
            ):
                worst[item["name"]] = item
    yield from worst.values()


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _list(items: Iterable[str], tone: str) -> str:
    return f'<ul class="{tone}">' + "".join(f"<li>{escape(i)}</li>" for i in items) + "</ul>"


def _plot(lines: str, title: str) -> str:
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none"'
    return f'<svg {box} role="img" aria-label="{title}"><title>{title}</title>{lines}</svg>'


def _line(values: Sequence[float], most: float, kind: str = "first") -> str:
    """A line over ten minutes that ends at the right; a gap where there was nothing."""
    step = _WIDTH / STEPS
    start = _WIDTH - step * (len(values) - 1)
    runs: list[list[str]] = [[]]
    for number, value in enumerate(values):
        if math.isnan(value):
            runs.append([])
        else:
            y = _HEIGHT - 2 - (_HEIGHT - 6) * min(value / most, 1.0)
            runs[-1].append(f"{start + number * step:.1f},{y:.1f}")
    return "".join(f'<polyline class="{kind}" points="{" ".join(run)}"/>' for run in runs if run)


def _level(value: float, most: float) -> str:
    y = _HEIGHT - 2 - (_HEIGHT - 6) * value / most
    return f'<line x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _ms(seconds: float) -> str:
    return "none" if math.isnan(seconds) else f"{1000 * seconds:.1f} ms"

"""The page of ``gpu-resource-monitor``: facts in, HTML out; its style, its script. Nothing of it is from elsewhere.

The page is complete without its script, which only puts new versions of ``main`` in the place of the old one. Texts of
tasks and people are shown as text: escaped, without control characters, and isolated, so that one that is written
from right to left does not reverse its neighbours.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from gpu_resource_extensions.english import ENGLISH
from gpu_resource_extensions.screens import KINDS, age, ranges, ranges_by_reason
from gpu_resource_manager_v01 import printable

LANGUAGES = {"ja": "&#26085;&#26412;&#35486;", "en": "English"}  # as each calls itself
LEAST_AGE = "1 分未満"  # the page does not change every second
RELOAD_S = 30  # between two loads of the page where scripts are off
MANY_GPUS = 128  # beyond which each gets a small cell
SLOTS, SLOT_S = 144, 600  # of the curve of a day
Say = Callable[..., str]
Curve = Sequence["float | None"]  # share of the GPUs in use, one value a slot, oldest first; ``None``: not known


class Seen(NamedTuple):
    """The pool as it was when it could last be read, and whether that is so now."""

    overview: Mapping[str, Any] | None = None  # as ``--status --json`` has it; ``None`` before it could be read
    ended: Sequence[Mapping[str, Any]] = ()  # tasks that have ended and are not taken back, as in its ``tasks``
    read_s: float = 0  # when that was read
    failure: Mapping[str, str] = {}  # why it cannot be read now, by language; empty if it can
    is_late: bool = False  # the present look at it takes long


def speaker(language: str) -> Say:
    """Return what ``say`` of the library is, for the HTML of one viewer: facts are HTML, too."""

    def say(template: str, /, *facts: object) -> str:
        return html.escape(ENGLISH.get(template, template) if language == "en" else template).format(*facts)

    return say


def language_of(asked: str | None, accepted: str, default: str) -> str:
    """Return the language for a viewer: what the address asks for, else what the browser likes best, else ``default``.

    >>> language_of(None, "fr, en-GB;q=0.7, ja;q=0.3", "ja")
    'en'
    """
    if asked in LANGUAGES:
        return asked
    liked = []
    for item in accepted.split(","):
        name, _, weight = item.replace(" ", "").partition(";q=")
        language = name.lower().partition("-")[0]
        weight = weight or "1"
        if language in LANGUAGES and weight.replace(".", "", 1).isdecimal() and float(weight):
            liked.append((float(weight), language))
    return max(liked, key=lambda one: one[0])[1] if liked else default


def text(fact: object) -> str:
    """Return a fact as text of the page."""
    return html.escape(printable(str(fact)))


def isolated(fact: object) -> str:
    """Return what somebody has made up, such that it changes nothing around it."""
    return f"<bdi>{text(fact)}</bdi>"


# --- The page -------------------------------------------------------------------------------------


def render_page(language: str, main: str) -> str:
    """Return the whole page in one language; ``main`` is what :func:`render_main` returns."""
    say = speaker(language)
    others = [
        f'<a href="?lang={other}" lang="{other}" hreflang="{other}">{name}</a>'
        for other, name in LANGUAGES.items()
        if other != language
    ]
    return f"""<!doctype html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{say("GPU リソース状態")}</title>
<link rel="icon" href="icon.svg?{BUILD}">
<link rel="stylesheet" href="page.css?{BUILD}">
<script src="page.js?{BUILD}" defer></script>
<noscript><meta http-equiv="refresh" content="{RELOAD_S}"></noscript>
</head>
<body>
<header>
<h1>{say("GPU リソース状態")}</h1>
<p id="live" hidden>{say("自動更新中")}</p>
<noscript><p>{say("{} 秒ごとに読み込み直します", RELOAD_S)}</p></noscript>
<nav>{" ".join(others)}</nav>
</header>
<p id="lost" class="banner" role="alert" hidden data-text="{
        say("モニターとの接続が切れています。表示しているのは {} の状態です", "{}")
    }"></p>
{main}
</body>
</html>
"""


def render_main(language: str, seen: Seen, curve: Curve, trouble: str, now_s: float) -> str:
    """Return the part of the page that changes.

    An element with ``data-parts`` is brought up to date child by child, any other one as a whole.
    """
    say = speaker(language)
    parts = [_banner(language, seen, say)]
    if seen.overview is not None:
        running = [task for task in seen.overview["tasks"] if task["kind"] != "waiting"]
        waiting = [task for task in seen.overview["tasks"] if task["kind"] == "waiting"]
        parts += [
            _totals(seen.overview, curve, trouble, say),
            _servers(seen.overview, [*running, *seen.ended], say),
            _line(waiting, now_s, say),
            _tasks([*running, *seen.ended], now_s, say),
            _pool(seen.overview, say),
        ]
    is_old = "old" if seen.failure or seen.is_late else ""
    return f'<main class="{is_old}" data-build="{BUILD}" data-parts>\n' + "\n".join(parts) + "\n</main>"


def _banner(language: str, seen: Seen, say: Say) -> str:
    lines = []
    if seen.failure:
        reason = seen.failure.get(language) or next(iter(seen.failure.values()))
        lines = [say("プールを読めません"), *map(text, reason.split("\n"))]
    elif seen.is_late or seen.overview is None:
        lines = [say("プールからの応答を待っています")]
    if lines and seen.overview is not None:
        when = datetime.fromtimestamp(seen.read_s).isoformat(" ", "seconds")
        lines.append(say("表示しているのは {} の状態です", when))
    shown = [f"<strong>{lines[0]}</strong>", *lines[1:]] if lines else []
    return f'<div id="banner" class="banner" role="status">{"<br>".join(shown)}</div>'


def share_in_use(overview: Mapping[str, Any]) -> float:
    """Return the share of all GPUs that tasks hold."""
    held = sum(len(task["allocated_gpus"]) for task in overview["tasks"] if task["kind"] != "waiting")
    total: int = overview["total_gpus"]
    return held / max(1, total)


def _totals(overview: Mapping[str, Any], curve: Curve, trouble: str, say: Say) -> str:
    facts = [
        ("空き GPU", overview["total_available_gpus"], overview["total_gpus"]),
        ("空き CPU", overview["total_available_cpus"], overview["total_cpus"]),
        ("実行中", overview["total_running_tasks"], None),
        ("待機中", overview.get("total_waiting", 0), None),
    ]
    tiles = [
        f"<div><dt>{say(name)}</dt><dd><strong>{count}</strong>{'' if total is None else f'/{total}'}</dd></div>"
        for name, count, total in facts
    ]
    day = _curve(share_in_use(overview), curve, trouble, say)
    return f'<section id="totals" data-parts><dl>{"".join(tiles)}</dl>{day}</section>'


def _curve(now: float, curve: Curve, trouble: str, say: Say) -> str:
    known = [value for value in curve if value is not None] or [now]
    caption, numbers = say("直近 24 時間の GPU 使用率"), say("現在 {:.0%}、平均 {:.0%}", now, sum(known) / len(known))
    note = f" <span>{say('Prometheus から得られません ({})', text(trouble))}</span>" if trouble else ""
    pieces: list[list[str]] = [[]]
    for slot, value in enumerate(curve):
        if value is None:
            pieces.append([])
        else:
            pieces[-1] += [f"{slot},{100 - 100 * value:.0f}", f"{slot + 1},{100 - 100 * value:.0f}"]
    shapes = []
    for points in filter(None, pieces):
        start, end = points[0].split(",")[0], points[-1].split(",")[0]
        shapes.append(f'<polygon points="{start},100 {" ".join(points)} {end},100"/>')
        shapes.append(f'<polyline points="{" ".join(points)}"/>')
    return (
        f"<figure><figcaption>{caption} <b>{numbers}</b>{note}</figcaption>"
        f'<svg viewBox="0 0 {SLOTS} 100" preserveAspectRatio="none" role="img" aria-label="{caption}: {numbers}">'
        f'<path d="M0 0H{SLOTS}M0 50H{SLOTS}M0 100H{SLOTS}"/>{"".join(shapes)}</svg>'
        f"<p><span>{say('24 時間前')}</span><span>{say('現在')}</span></p></figure>"
    )


def _servers(overview: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]], say: Say) -> str:
    holders: dict[tuple[str, int], Mapping[str, Any]] = {}
    for task in tasks:
        holders.update({(task["server_name"], gpu): task for gpu in task["allocated_gpus"]})
    rows = []
    for server in overview["servers"]:
        name, disabled = server["server_name"], server.get("disabled", {})
        cells = [_cell(gpu, holders.get((name, gpu)), str(gpu) in disabled, say) for gpu in range(server["total_gpus"])]
        row = [
            _name(name),
            _td("free", f"<strong>{server['available_gpus']}</strong>/{server['total_gpus']}"),
            _td("gpus", f'<ul role="list">{"".join(cells)}</ul>'),
            _td("cpus", f"{server['available_cpus']}/{server['total_cpus']}", say("空き CPU")),
            _td("why", "<br>".join(_out_of_service(disabled, say))),
        ]
        rows.append(f'<tr role="row">{"".join(row)}</tr>')
    is_many = "many" if overview["total_gpus"] > MANY_GPUS else ""
    legend = [
        f'<li class="{state}"><b></b><span>{say(meaning)}</span></li>'
        for state, meaning in (
            ("free", "空き"),
            ("held", "使用中"),
            ("off", "使用停止"),
            ("ended", "終了済み (次の変更で回収)"),
        )
    ]
    headings = "サーバー", "空き GPU", "GPU", "空き CPU", "使用停止"
    return (
        f'<section id="servers" class="{is_many}" data-parts><h2>{say("サーバー一覧")}</h2>'
        f'<ul class="legend" role="list">{"".join(legend)}</ul>{_table(headings, rows, say)}</section>'
    )


def _cell(gpu: int, task: Mapping[str, Any] | None, is_disabled: bool, say: Say) -> str:
    if task is None:
        state, word = ("off", say("停止")) if is_disabled else ("free", say("空き"))
        return f'<li class="{state}"><b>{gpu}</b><span>{word}</span></li>'
    who = task.get("user") or task["task_id"]
    if task["kind"] == "ended":
        state, word = "ended", f"<span>{say('終了')}</span>"
    else:
        state, word = ("held off", f"<span>{say('停止')}</span>") if is_disabled else ("held", "")
    return f'<li class="{state}" title="{text(task["task_id"])}"><b>{gpu}</b>{isolated(who)}{word}</li>'


def _out_of_service(disabled: Mapping[str, str], say: Say) -> list[str]:
    """Return a line for the GPUs of a server that are out of service for the same reason."""
    return [
        say("使用停止: GPU {}", gpus) + (f" ({isolated(reason)})" if reason else "")
        for gpus, reason in ranges_by_reason(disabled)
    ]


def _line(waiting: Sequence[Mapping[str, Any]], now_s: float, say: Say) -> str:
    rows = []
    for position, request in enumerate(waiting, start=1):
        only = f" <small>({isolated(request['server_name'])})</small>" if request["server_name"] else ""
        row = [
            _td("number", f"<strong>{position}</strong>"),
            _name(request["task_id"], only),
            _td("who", isolated(request.get("user") or "-")),
            _td("number", str(request["required_gpus"]), "GPU"),
            _td("number", str(request["required_cpus"]), "CPU"),
            _td("age", age(request.get("asked_time"), now_s, say, LEAST_AGE)),
        ]
        rows.append(f'<tr role="row">{"".join(row)}</tr>')
    headings = "順番", "タスク", "利用者", "GPU", "CPU", "待ち時間"
    table = _table(headings, rows, say) if rows else f"<p>{say('待っている要求はありません')}</p>"
    return f'<section id="line" data-parts><h2>{say("待ち行列")}</h2>{table}</section>'


def _tasks(tasks: Sequence[Mapping[str, Any]], now_s: float, say: Say) -> str:
    rows = []
    for task in tasks:
        kind = "終了済み" if task["kind"] == "ended" else KINDS[task["kind"]]
        row = [
            _name(task["task_id"]),
            _td("who", isolated(task.get("user") or "-")),
            _td("where", isolated(task["server_name"])),
            _td("number", ranges(task["allocated_gpus"]), "GPU"),
            _td("number", str(task["allocated_cpus"]), "CPU"),
            _td("age", age(task.get("start_time"), now_s, say, LEAST_AGE)),
            _td(f"kind {task['kind']}", say(kind)),
        ]
        rows.append(f'<tr role="row">{"".join(row)}</tr>')
    headings = "タスク", "利用者", "サーバー", "GPU", "CPU", "経過", "種類"
    table = _table(headings, rows, say) if rows else f"<p>{say('動いているタスクはありません')}</p>"
    return f'<section id="tasks" data-parts><h2>{say("タスク一覧")}</h2>{table}</section>'


def _table(headings: Iterable[str], rows: Sequence[str], say: Say) -> str:
    # Roles by name, for a table that the style lays out as something else would lose them.
    cells = [f'<th scope="col" role="columnheader">{say(heading)}</th>' for heading in headings]
    head = f'<thead role="rowgroup"><tr role="row">{"".join(cells)}</tr></thead>'
    return f'<table role="table" data-parts>{head}<tbody role="rowgroup" data-parts>{"".join(rows)}</tbody></table>'


def _name(name: str, more: str = "") -> str:
    """Return the cell that a row is known by; the title has what the style may cut off."""
    return f'<th scope="row" role="rowheader" title="{text(name)}">{isolated(name)}{more}</th>'


def _td(kind: str, content: str, label: str = "") -> str:
    """Return a cell; ``label`` is what it shows ahead where the screen is too narrow for headings."""
    labelled = f' data-label="{label}"' if label else ""
    return f'<td class="{kind}" role="cell"{labelled}>{content}</td>'


def _pool(overview: Mapping[str, Any], say: Say) -> str:
    lines = [say("プール: {}", isolated(overview["resource_file"]))]
    if overview["last_updated"]:
        lines.append(say("最終更新: {}", text(overview["last_updated"])))
    else:
        lines.append(say("  まだありません。最初の割り当てか --init が作ります"))
    if overview["made_up"]:
        how = "--reset" if overview["last_updated"] else "--init"
        lines.append(say("  架空のサーバー (登録: {0} --detect か {0} --server NAME:GPUS:CPUS)", how))
    return f'<footer id="pool">{"<br>".join(lines)}</footer>'


# --- Style, script, icon --------------------------------------------------------------------------

STYLE = """\
:root {
  --paper: #f3f5f7; --card: #fff; --ink: #18212c; --soft: #526072; --rule: #d3d9e0;
  --held: #1f5f99; --on-held: #fff;
  --free: #0a7350; --free-paper: #f1faf6;
  --ended: #f3b63f; --on-ended: #2a1c00; --ended-rule: #8a5a00;
  --off: #e8ebef; --off-stripe: #d5dae1; --on-off: #465160;
  --alarm: #8c2a12; --alarm-paper: #fdf0ec;
  color-scheme: light dark;
  font: clamp(16px, 11.5px + 0.42vw, 30px) / 1.4 system-ui,
    "Noto Sans CJK JP", "Hiragino Sans", sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #10151b; --card: #19212a; --ink: #e9eef4; --soft: #a3b0bf; --rule: #323d49;
    --held: #2d6db0; --on-held: #fff;
    --free: #55cfa0; --free-paper: #14241f;
    --ended: #e2a32b; --on-ended: #211600; --ended-rule: #ffe0a3;
    --off: #28313b; --off-stripe: #343f4b; --on-off: #c3ccd6;
    --alarm: #ffb3a0; --alarm-paper: #34180f;
  }
}
* { box-sizing: border-box; }
body { margin: 0; padding: 1rem clamp(0.75rem, 2vw, 2rem); background: var(--paper); color: var(--ink); }
h1, h2, p, dl, dd, ul, figure { margin: 0; padding: 0; }
ul { list-style: none; }
h1 { font-size: 1.1rem; font-weight: 600; }
h2 { font-size: 1rem; font-weight: 600; margin-bottom: 0.5rem; }
bdi { overflow: hidden; overflow-wrap: anywhere; }
strong { font-weight: 700; }
small { font-size: 0.85em; color: var(--soft); }
a { color: inherit; }
a:focus-visible { outline: 3px solid var(--held); outline-offset: 2px; }
header { display: flex; flex-wrap: wrap; gap: 0.25rem 1.5rem; align-items: baseline; color: var(--soft); }
header h1 { color: var(--ink); }
header nav { margin-left: auto; }
#live::before {
  content: ""; display: inline-block; width: 0.6em; height: 0.6em; margin-right: 0.4em; border-radius: 50%;
  background: var(--free);
}
[hidden] { display: none; }
main { display: grid; gap: 1.5rem; margin-top: 1rem; }
main.old > :not(#banner), body.old main > :not(#banner) { filter: grayscale(1); }
.banner {
  padding: 0.75rem 1rem; border: 2px solid; border-radius: 0.5rem; background: var(--alarm-paper);
  color: var(--alarm); overflow-wrap: anywhere;
}
.banner:empty { display: none; }
.banner strong { font-size: 1.2rem; }
#lost { margin-top: 1rem; }

#totals {
  display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 1rem clamp(1.5rem, 4vw, 5rem); align-items: end;
}
#totals dl { display: flex; flex-wrap: wrap; gap: 0.5rem clamp(1.25rem, 2.5vw, 3rem); align-items: end; }
#totals dt { color: var(--soft); line-height: 1.2; }
#totals dd {
  color: var(--soft); font-size: 1.3rem; line-height: 1; white-space: nowrap; font-variant-numeric: tabular-nums;
}
#totals dd strong { color: var(--ink); font-size: 2.6rem; }
#totals div:first-child dd { font-size: 2rem; }
#totals div:first-child strong { color: var(--free); font-size: 5rem; letter-spacing: -0.03em; }
figcaption { color: var(--soft); }
figcaption b { color: var(--ink); margin-left: 0.5em; }
figure p { display: flex; justify-content: space-between; color: var(--soft); font-size: 0.85rem; }
svg { display: block; width: 100%; height: 4rem; margin-top: 0.25rem; overflow: visible; }
svg path { stroke: var(--rule); stroke-width: 1; vector-effect: non-scaling-stroke; }
svg polyline { fill: none; stroke: var(--held); stroke-width: 2; vector-effect: non-scaling-stroke; }
svg polygon { fill: var(--held); opacity: 0.18; }

table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; }
#servers { display: grid; grid-template-columns: auto 1fr; gap: 0.5rem 2rem; align-items: center; }
#servers h2 { margin: 0; }
#servers thead { position: absolute; left: 0; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
#servers thead th { display: block; }
#servers table { grid-column: 1 / -1; }
#servers table, #servers tr { display: block; }
#servers tbody {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15.5rem), 1fr)); gap: 0.9rem;
}
#servers tbody tr {
  display: grid; grid-template-columns: minmax(0, 1fr) auto; align-content: start; align-items: baseline;
  gap: 0.15rem 0.75rem;
  padding: 0.7rem 0.8rem; border: 1px solid var(--rule); border-radius: 0.6rem; background: var(--card); min-width: 0;
}
#servers td { padding: 0; }
#servers tbody th { font-size: 1.15rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.free > strong { font-size: 1.6rem; line-height: 1; color: var(--free); }
td.free { color: var(--soft); }
td.gpus, td.why { grid-column: 1 / -1; }
td.why { color: var(--soft); font-size: 0.9rem; overflow-wrap: anywhere; }
td.why:empty { display: none; }
td.cpus { color: var(--soft); font-size: 0.9rem; grid-column: 1 / -1; margin-top: 0.2rem; }
#servers td.cpus::before { content: attr(data-label) " "; }
td.gpus ul { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 0.3rem; }
td.gpus li {
  height: 3.1rem; padding: 0.2rem 0.3rem; line-height: 1.25; position: relative; display: grid;
  grid-template-columns: auto 1fr; align-content: space-between; overflow: hidden;
}
.gpus li, .legend b { border: 2px solid; border-radius: 0.35rem; }
.gpus b { font-size: 0.8rem; font-weight: 400; }
.gpus bdi, .gpus span { font-size: 0.9rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.gpus bdi { grid-row: 2; grid-column: 1 / -1; }
.gpus .held span { font-size: 0.75rem; text-align: right; }
.gpus .ended span { position: absolute; clip-path: inset(50%); }
.gpus .free span, .gpus .off:not(.held) span { grid-row: 2; grid-column: 1 / -1; }
li.free, .legend .free b { background: var(--free-paper); color: var(--free); border-color: var(--free); }
li.held, .legend .held b { background: var(--held); color: var(--on-held); border-color: var(--held); }
li.off, .legend .off b {
  background: repeating-linear-gradient(135deg, var(--off) 0 6px, var(--off-stripe) 6px 8px);
  color: var(--on-off); border-color: var(--off-stripe);
}
li.held.off { background: var(--held); color: var(--on-held); border-color: var(--on-off); }
li.ended, .legend .ended b { background: var(--ended); color: var(--on-ended); border: 2px dashed var(--ended-rule); }
li.off:not(.held) b::after { content: "×"; }
li.ended b::after { content: "!"; font-weight: 700; }
.gpus b::after { margin-left: 0.3em; }
.many .gpus b::after { margin: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; color: var(--soft); font-size: 0.9rem; }
.legend li { display: flex; align-items: center; gap: 0.4rem; background: none; color: inherit; border: 0; }
.legend b { width: 1.4rem; height: 1.1rem; font-size: 0.75rem; line-height: 1; text-align: center; }

#servers.many tbody { grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.5rem), 1fr)); gap: 0.5rem; }
#servers.many tbody tr { padding: 0.35rem 0.5rem 0.45rem; border-radius: 0.4rem; }
#servers.many tbody th { font-size: 0.95rem; }
.many .free > strong { font-size: 1.1rem; }
.many td.gpus ul { grid-template-columns: repeat(8, minmax(0, 1fr)); gap: 0.15rem; }
.many td.gpus li {
  display: block; height: 1.35rem; padding: 0; border-radius: 0.2rem; font-size: 0.65rem;
  line-height: calc(1.35rem - 4px); text-align: center;
}
.many .gpus b, .many .gpus span { display: none; }
.many .gpus .free b { display: inline; font-size: 0.7rem; }
.many .gpus :is(.off:not(.held), .ended) b { display: inline; font-size: 0; }
.many .gpus :is(.off:not(.held), .ended) b::after { font-size: 0.8rem; }
.many .gpus .ended bdi { position: absolute; clip-path: inset(50%); }
.many .gpus bdi { display: block; font-size: 0.65rem; text-align: left; text-overflow: clip; }
.many td.cpus { font-size: 0.8rem; }

#line table, #tasks table {
  background: var(--card); border: 1px solid var(--rule); border-radius: 0.6rem; border-collapse: separate;
  border-spacing: 0;
}
#line :is(th, td), #tasks :is(th, td) {
  padding: 0.35rem 0.45rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  overflow-wrap: anywhere;
}
#line tbody tr:last-child > *, #tasks tbody tr:last-child > * { border-bottom: 0; }
#line thead th, #tasks thead th { color: var(--soft); font-size: 0.85rem; font-weight: 400; white-space: nowrap; }
td.number, td.age, td.kind, td.who, td.where { white-space: nowrap; }
td.who bdi, td.where bdi { display: inline-block; max-width: 6rem; text-overflow: ellipsis; vertical-align: bottom; }
#line tbody th, #tasks tbody th { min-width: 7rem; font-weight: 400; }
#line th bdi, #tasks th bdi {
  display: -webkit-inline-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; vertical-align: bottom;
}
#line td, #tasks td { color: var(--soft); }
#line td strong { color: var(--ink); }
#line p, #tasks p, footer { color: var(--soft); }
footer { font-size: 0.85rem; overflow-wrap: anywhere; }
td.kind::before { content: "● "; color: var(--held); }
td.reservation::before { content: "○ "; }
td.ended::before { content: "! "; color: inherit; font-weight: 700; }
#tasks td.ended { color: var(--ink); font-weight: 600; }

@media (max-width: 48rem) {
  td.who bdi, td.where bdi { max-width: 12rem; }
  #servers { grid-template-columns: minmax(0, 1fr); }
  header { gap: 0.25rem 1rem; font-size: 0.9rem; }
  #totals { grid-template-columns: minmax(0, 1fr); }
  #totals div:first-child { width: 100%; }
  #totals div:first-child strong { font-size: 4rem; }
  #line table, #tasks table, #line tbody, #tasks tbody { display: block; }
  #line thead, #tasks thead {
    position: absolute; left: 0; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  }
  #line thead th, #tasks thead th { display: block; }
  #line tbody tr, #tasks tbody tr {
    display: flex; flex-wrap: wrap; gap: 0 0.9rem; padding: 0.5rem 0.7rem; border-bottom: 1px solid var(--rule);
  }
  #line tbody tr:last-child, #tasks tbody tr:last-child { border-bottom: 0; }
  #line tbody tr > *, #tasks tbody tr > * { padding: 0; border: 0; min-width: 0; }
  #line tbody th { flex: 1 1 calc(100% - 3rem); }
  #tasks tbody th { width: 100%; }
  #line tbody td:not(:first-child), #tasks tbody td { font-size: 0.9rem; }
  #line td[data-label]::before, #tasks td[data-label]::before { content: attr(data-label) " "; }
}
@media (min-width: 75rem) {
  main { grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); }
  #line { grid-column: 1; }
  #tasks { grid-column: 2; }
  #banner, #totals, #servers, #pool { grid-column: 1 / -1; }
}
"""

SCRIPT = """\
"use strict";
const ALIVE_MS = 25000;  // the monitor says something every 10 s, so without a word for so long it is out of reach
const language = document.documentElement.lang;
const main = document.querySelector("main");
const live = document.querySelector("#live");
const lost = document.querySelector("#lost");
let stream, heard;

function hear() {
  heard = new Date();
  show(true);
}

function show(isLive) {
  live.hidden = !isLive;
  lost.hidden = isLive;
  lost.textContent = isLive ? "" : lost.dataset.text.replace("{}", heard.toLocaleTimeString(language));
  document.body.classList.toggle("old", !isLive);
}

function update(old, next) {
  if (old.isEqualNode(next)) return;
  if (old.localName !== next.localName || !("parts" in old.dataset && "parts" in next.dataset)) {
    old.replaceWith(next);
    return;
  }
  for (const { name, value } of next.attributes) old.setAttribute(name, value);
  const parts = [...next.children];
  while (old.children.length > parts.length) old.lastElementChild.remove();
  parts.forEach((part, place) => (place in old.children ? update(old.children[place], part) : old.append(part)));
}

function connect() {
  stream = new EventSource("events?lang=" + language);
  stream.onmessage = (event) => {
    const next = new DOMParser().parseFromString(event.data, "text/html").querySelector("main");
    if (next.dataset.build !== main.dataset.build) location.reload();
    hear();
    update(main, next);
  };
  stream.addEventListener("alive", hear);
  stream.onerror = () => show(false);
}

heard = new Date();
connect();
setInterval(() => {
  if (stream.readyState !== EventSource.CLOSED && Date.now() - heard < ALIVE_MS) return;
  stream.close();
  show(false);
  connect();
}, 3000);
"""

ICON = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path fill="#1f5f99" d="M1 1h6v6H1zM9 9h6v6H9zM1 9h6v6H1z"/>
<path fill="none" stroke="#0b7a53" stroke-width="1.5" d="M9.75 1.75h4.5v4.5h-4.5z"/></svg>
"""

BUILD = hashlib.sha256((STYLE + SCRIPT + ICON).encode()).hexdigest()[:12]  # a page of an earlier one loads itself anew

"""The right line for a wrong one; loaded only after a refusal for wrong usage.

A line is read as options with the words behind each, which are repaired by what they stand for; of the result
stays what the parser takes. What the pool could not grant is not made, and nothing is guessed that deletes.
"""

from __future__ import annotations

import math
import os
import re
from unicodedata import category, normalize

TYPE_CHECKING = False
if TYPE_CHECKING:  # a refusal is to be quick too
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    Accepts = Callable[[list[str], "list[str] | None"], bool]
    Groups = list[tuple[str, list[str]]]

#: what the words behind them are, of commands and of other options
SHAPES = {
    "": ("help version init status detail reset reclaim", "any export force detect yes json"),
    "request": ("allocate run", ""),
    "task": ("release stop", ""),
    "description": ("add-server", "server"),
    "server": ("remove-server", "prefer-server on"),
    "gpus": ("disable enable", ""),
    "time": ("", "wait grace watch"),
    "number": ("", "min-gpus"),
    "file": ("metrics", ""),
    "text": ("", "reason"),
}
COMMANDS, OTHERS = (
    {f"--{name}": shape for shape, names in SHAPES.items() for name in names[at].split()} for at in (0, 1)
)
OPTIONS = {**COMMANDS, **OTHERS}
DELETING, NEVER_GUESSED = ("--release", "--stop", "--remove-server", "--reset"), ("--reset", "--force", "--yes")
#: how far names and counts behind --run are from right, where a job follows
MISFITS = {"ncc": 0, "ccc": 0, "cc": 1, "ccn": 2, "nc": 3, "n": 4, "c": 4, "": 5}
TIMES_S = {"seconds": 1, "secs": 1, "minutes": 60, "mins": 60, "hours": 3600, "hrs": 3600, "days": 86400}
#: dashes that editors make; second, minute, "time between" (two letters: an hour) and day
TO_ASCII = {0x2013: "--", 0x2014: "--", 0x2212: "-", 0x79D2: "s", 0x5206: "m", 0x6642: "h", 0x9593: None, 0x65E5: "d"}


class Unclear(Exception):  # noqa: N818 - then there is no example
    """It cannot be told what was meant, or it could not be had."""


def right_line(
    words: Sequence[str], job: list[str] | None, parse: Callable[..., object], refusal: type[Exception]
) -> str | None:
    """Return the command line, without its first word, that would have worked, or ``None``.

    :param parse: reads words and a job as the command line does, or raises ``refusal``.
    """

    def accepts(words: list[str], job: list[str] | None) -> bool:
        try:
            return bool(parse(words, job))
        except refusal:
            return False

    def pool() -> Mapping[str, Any] | None:
        from gpu_resource_manager_v01 import GPUResourceManagerV01, ResourceManagerError

        try:
            return GPUResourceManagerV01(lock_timeout_s=1, create=False).get_overview()
        except ResourceManagerError:
            return None

    found = example(words, job, accepts, pool)
    if found is None:
        return None
    from gpu_resource_manager_v01 import quoted

    right, right_job = found
    return " ".join([*map(quoted, right), *(["--", *map(quoted, right_job)] if right_job else [])])


def example(
    words: Sequence[str], job: Sequence[str] | None, accepts: Accepts, pool: Callable[[], Mapping[str, Any] | None]
) -> tuple[list[str], list[str] | None] | None:
    """Return words, and a job, near to what was typed that would have worked, or ``None``."""
    typed = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    try:
        for start, command in ways(words, list(job or ())):
            line = repaired(start, command, accepts, pool)
            is_right = line == (typed, job) and accepts(list(words), line[1])
            return None if is_right else line  # for then something else is wrong
    except Unclear:
        pass
    return None


def ways(words: Sequence[str], job: list[str]) -> list[tuple[Sequence[str], list[str]]]:
    """Return the line, and where a job may begin that lacks its ``--``, the likeliest first."""
    if command_of(read(words)[0]) != "--run":
        return [(words, job)]
    from shutil import which

    def misfit(words: Sequence[str]) -> int | None:
        groups, loose = read(words)
        counted = [(value, count_of(value)) for value in dict(groups).get("--run", ["", ""]) + loose]
        return MISFITS.get("".join("n" if it is None else "c" for value, it in counted if it or not is_dashed(value)))

    if job and (which(job[0]) or misfit(words) == 0):
        return [(words, job)]
    words, ranked = [*words, *job], []
    for at in range(1, min(len(words), 12)) if misfit(words) in (None, 2) else ():  # as much may precede a job
        rank, is_unknown = misfit(words[:at]), which(words[at]) is None
        if rank is not None and not (is_unknown and rank) and count_of(words[at]) is None and not is_dashed(words[at]):
            ranked.append((is_unknown, rank, -at))
    return [(words[:-at], words[-at:]) for *_, at in sorted(ranked)]


def repaired(
    words: Sequence[str], job: list[str], accepts: Accepts, pool: Callable[[], Mapping[str, Any] | None]
) -> tuple[list[str], list[str] | None]:
    """Return the line with its words repaired, and without the options that the parser does not take with them."""
    job = job[1:] if job[:1] == ["-"] else job  # for "--"
    if job and " " in job[0] and not os.path.exists(job[0]):  # a command in one word
        job = job[0].split() + job[1:]
    groups, loose = read(words)
    command = command_of(groups)
    if command is None or any(shown(word) != word for word in job):
        raise Unclear
    overview = pool() or {}
    first, last = [option for option, _ in groups].index(command), len(groups)
    values = groups[first][1] + loose
    if command == "--init" and values:  # what was meant is plain, but for "--server"
        groups[first : first + 1] = [("--init", []), ("--server", values)]
        values, last = [], last + 1
    if command in DELETING and (any(map(is_dashed, values)) or (command == "--reset" and values)):
        raise Unclear  # without "--dry-run", or a name behind --reset, more would go than was asked for
    groups[first] = ("--run" if command == "--allocate" and job else command), values
    kept: dict[int, list[str]] = {}
    for at in sorted(range(last), key=lambda at: (at != first, groups[at][0] == "--json")):  # which yields to others
        option, values = groups[at]
        if at == first or option in OTHERS:
            kept[at] = [option, *words_for(option, values, groups, overview)]
            line = [word for at in sorted(kept) for word in kept[at]], job if groups[first][0] == "--run" else None
            if not accepts(*line):
                del kept[at]
    if first not in kept or (command == "--reset" and len(kept) < last):
        raise Unclear
    return [word for at in sorted(kept) for word in kept[at]], line[1]


def read(words: Sequence[str]) -> tuple[Groups, list[str]]:
    """Return the options, each with the words that may belong to it, and the words that belong to none."""
    groups: Groups = []
    loose: list[str] = []
    since = 0  # how many words belonged to none when the last option came
    for typed in words:
        word = shown(typed)
        head, equals, value = word.partition("=") if is_dashed(word) else (word, "", "")
        option, values = groups[-1] if groups else ("", [])
        is_next = OPTIONS.get(option) != "time" or len(loose) == since  # in "--wait a 2 8", 2 is no time
        is_wanted = bool(groups) and is_next and takes(OPTIONS[option], values, word)
        named = option_named(head) if is_dashed(word) or not (is_wanted or command_of(groups)) else None
        if named:
            groups.append((named, [value] if equals else []))
            since = len(loose)
        else:
            (values if is_wanted else loose).extend([head, value] if equals else [word])
    return groups, loose


def takes(shape: str, values: list[str], word: str) -> bool:
    if shape == "time":  # "10 m" is one
        return bool(unit_s(plain(word))) if values else plain(word).lstrip("-")[:1].isdigit()
    return not values if shape in ("server", "number") else bool(shape)


def command_of(groups: Groups) -> str | None:
    found = [option for option, _ in groups if option in COMMANDS]
    return "--help" if "--help" in found else found[0] if found else None


def option_named(word: str) -> str | None:
    """Return the option that a word is, begins, or nearly is; what deletes is never what a word begins."""
    from difflib import get_close_matches

    name = plain(word).replace("_", "-").strip("-")
    begun = [option for option in OPTIONS if option.startswith(f"--{name}")]
    near = begun or [f"--{found}" for found in get_close_matches(name, [option[2:] for option in OPTIONS], 1, 0.75)]
    if name == "h" or f"--{name}" in OPTIONS:
        return "--help" if name == "h" else f"--{name}"
    if len(name) < 3 or len(near) != 1 or near[0] in NEVER_GUESSED:
        return None
    return near[0] if near[0] not in DELETING or (not begun and is_slip(name, near[0][2:])) else None


def is_slip(one: str, other: str) -> bool:
    """Tell whether they are alike but for a letter of each."""
    shorter = [{word, *(word[:at] + word[at + 1 :] for at in range(len(word)))} for word in (one, other)]
    return not shorter[0].isdisjoint(shorter[1])


def shown(text: str) -> str:
    """Return ``text`` without control characters, which no argument may have."""
    return "".join(letter for letter in text if category(letter) not in ("Cc", "Cs"))


def plain(text: str) -> str:
    return normalize("NFKC", text).translate(TO_ASCII).strip().lower()


def is_dashed(word: str) -> bool:
    return plain(word).startswith("-") and word != "-"


# --- What the words behind an option stand for ----------------------------------------------------


def words_for(option: str, values: list[str], groups: Groups, pool: Mapping[str, Any]) -> list[str]:
    """Return what the words behind an option have to be."""
    import gpu_resource_manager_v01 as library

    shape, servers, options = OPTIONS[option], pool.get("servers", ()), [option for option, _ in groups]
    is_fixed = "--init" in options and pool.get("last_updated")  # for a pool that is there stays as it is
    if shape == "request":
        is_local = "--export" in options or ("--run" in options and not {"--any", "--on"} & {*options})
        return request(values, pool, is_local)
    if shape in ("server", "gpus"):
        return [server(option, values, servers)]
    if shape == "description":
        found = descriptions(values, servers)
        names = [server["server_name"].casefold() for server in servers]
        if is_fixed and not {*found} <= {*map(tuple, library.descriptions(servers))}:
            raise Unclear
        if option == "--add-server" and found[0][0].casefold() in names:
            raise Unclear
        texts = [":".join(map(str, one)) for one in found]
        return texts[:1] if option == "--add-server" else [word for text in texts for word in (option, text)][1:]
    if shape == "number":
        new = [size for other, texts in groups if other == "--server" for _, size, _ in descriptions(texts, servers)]
        most = max(new or [server["total_gpus"] for server in servers], default=library.MIN_GPUS_PER_TASK)
        return [str(pool["min_gpus_per_task"] if is_fixed else min(max(count_of("".join(values)) or 1, 1), most))]
    if shape == "time":
        return [time(values)] if values else []
    tasks = [value for value in values if not library.task_id_problem(value)]
    return {"": [], "task": tasks[:1], "file": values[:1], "text": [" ".join(values)]}[shape]


def request(values: list[str], pool: Mapping[str, Any], is_local: bool) -> list[str]:
    """Return name, GPUs and CPUs that one server, this machine if it has to be, could hold."""
    import gpu_resource_manager_v01 as library
    from gpu_resource_extensions.hosts import server_of_host

    values = [value.rstrip(",") for value in values]
    counts = [count_of(value) for value in values]
    names = [value for value, count in zip(values, counts, strict=True) if count is None and not is_dashed(value)]
    if not names and len(values) > 2:
        names, counts[0] = [values[0].lstrip("-")], None
    taken = [task["task_id"] for task in pool.get("tasks", ())]
    name = names[0] if names and not library.task_id_problem(names[0]) and names[0] not in taken else "-"
    servers, whole = pool.get("servers", ()), dict(pool)
    try:
        named: Any = whole, library.host_name(), os.environ.get(library.SERVER_VARIABLE)
        servers = [server_of_host(*named)] if is_local else servers
    except (library.InvalidRequestError, KeyError):
        pass  # it may be known by its last job alone, which is not told
    numbers = [count for count in counts if count is not None]
    if len(names) > 1 and len(numbers) < 2:
        raise Unclear  # one of them may have been a number
    return [name, *map(str, amounts(numbers, servers, pool.get("min_gpus_per_task", 1)))]


def amounts(numbers: list[int], servers: Sequence[Mapping[str, Any]], least: int) -> tuple[int, int]:
    """Return the GPUs and CPUs nearest to the numbers, which may be swapped, that one of the servers could hold."""
    gpus, cpus = (numbers or [least])[0], numbers[1] if len(numbers) > 1 else None
    if cpus is not None:
        for one, other in ((gpus, cpus), (cpus, gpus))[: 1 + (gpus >= least)]:  # swapped, if there are too many GPUs
            if any(least <= one <= it["total_gpus"] and 1 <= other <= it["total_cpus"] for it in servers):
                return one, other
    found = []
    for server in servers:
        most = server["total_gpus"] - len(server.get("disabled", ()))
        held = min(max(gpus, least), most)
        wanted = held * server["total_cpus"] // max(1, server["total_gpus"]) if cpus is None else cpus
        held_cpus = min(max(wanted, 1), server["total_cpus"])
        if most >= least:
            found.append((abs(held - gpus), abs(held_cpus - wanted), held, held_cpus))
    if not found:
        raise Unclear
    return min(found)[2:]


def count_of(word: str) -> int | None:
    """Return the number that a word stands for; of indices, such as "0-3" or "GPU0,GPU1", how many they are."""
    number = re.fullmatch(r"(?:[a-z]+=)?([+-]?\d{1,15}(?:\.\d{1,15})?)(?:x|gpus?|cpus?|cores?)?", plain(word))
    return math.ceil(float(number[1])) if number else len(indices(word)) or None


def indices(text: str) -> list[int]:
    """Return the indices that a text lists, or none."""
    parts = re.sub(r"[\[\](){}'\"\s]|gpu|cuda:?", "", plain(text)).split(",")
    ends = [re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", part) for part in parts]
    return sorted({gpu for it in ends if it for gpu in range(int(it[1]), int(it[2] or it[1]) + 1)}) if all(ends) else []


def server(option: str, values: list[str], servers: Sequence[Mapping[str, Any]]) -> str:
    """Return the server meant, with the GPUs where some are; another server only to be preferred."""
    from difflib import get_close_matches

    sizes = {server["server_name"]: server["total_gpus"] for server in servers}
    name, _, rest = values[0].partition(":") if values and OPTIONS[option] == "gpus" else ("".join(values), "", "")
    same = [other for other in sizes if other.casefold() == name.casefold()]
    if option == "--prefer-server" and sizes:
        is_id = name in [str(server["server_id"]) for server in servers]
        return name if is_id else [*same, *get_close_matches(name, sizes, 1), *sizes][0]
    listed = ",".join([rest, *values[1:]]).strip(",")
    gpus = indices(listed)
    if len(same) != 1 or (listed and not gpus) or max(gpus, default=0) >= sizes[same[0]]:
        raise Unclear
    return f"{same[0]}:{','.join(map(str, gpus))}" if gpus else same[0]


def descriptions(values: list[str], servers: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Return name, GPUs and CPUs of each server described."""
    from gpu_resource_manager_v01 import MAX_CPUS_PER_SERVER, MAX_GPUS_PER_SERVER

    text = normalize("NFKC", " ".join(values))
    pattern = r"([^\s:,]+)[\s:,]+(\d{1,9}) ?(?:gpus?)?(?:[\s:,]+(\d{1,9}) ?(?:cpus?|cores?)?)?(?:[\s,]+|$)"
    found = re.findall(pattern, text, re.IGNORECASE)
    if not found or re.sub(pattern, "", text, flags=re.IGNORECASE):
        raise Unclear
    most = max(servers, key=lambda server: int(server["total_cpus"]), default={"total_gpus": 1, "total_cpus": 8})
    share = most["total_cpus"] // max(1, most["total_gpus"])
    sizes = [(name, int(gpus), int(cpus or share * int(gpus))) for name, gpus, cpus in found]
    most_gpus, most_cpus = MAX_GPUS_PER_SERVER, MAX_CPUS_PER_SERVER
    return [(name, max(1, min(gpus, most_gpus)), max(1, min(cpus, most_cpus))) for name, gpus, cpus in sizes]


def unit_s(unit: str) -> int:
    """Return the seconds of a unit, however it is shortened, or 0."""
    return next((size_s for name, size_s in TIMES_S.items() if name.startswith(unit)), 0)


def time(values: list[str]) -> str:
    """Return a time as the parser takes it; "1:30" may be minutes or hours."""
    text = plain("".join(values)).replace(" ", "")
    parts = re.findall(r"(\d+(?:\.\d+)?)([a-z]*)", text)
    total_s = sum(float(number) * unit_s(unit) for number, unit in parts)
    units = [unit for _, unit in parts]
    if "".join(map("".join, parts)) != text or not all(map(unit_s, units)) or total_s > 1e9:
        raise Unclear
    if len(parts) == 1:
        return f"{parts[0][0]}{units[0][:1]}"
    if "" in units:
        raise Unclear
    return f"{total_s / 60:g}m"

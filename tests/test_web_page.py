"""The page of ``gpu-resource-monitor`` in a real browser."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from conftest import GUARD_S, needed
from database_servers import wait_until
from monitors import HOSTILE, Monitor, disable, end, made_state, skip_without_packages, write

from gpu_resource_manager_v01 import GPUResourceManagerV01, State

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

skip_without_packages()
playwright = needed("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (.ci/install-services)"),
]

ALONE = [  # of the switches those that keep it on this machine
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LANGUAGES = "ja", "en"
SIZES = (360, 740), (1280, 720)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ALONE)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, width: int = 1280, height: int = 720, **settings: Any) -> Iterator[Page]:
    """Yield the page at ``url``; it must not complain, nor ask anybody else for anything."""
    context = browser.new_context(viewport={"width": width, "height": height}, **settings)
    context.set_default_timeout(1000 * GUARD_S)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    hosts: set[str] = set()
    page.goto(url)
    yield page
    context.close()
    assert hosts == {urlsplit(url).netloc}
    # A lost connection is one too, and some tests cut it.
    assert [text for text in complaints if "net::ERR_" not in text] == []


def wait_for(page: Page, text: str, within: str = "main") -> None:
    wait_until(lambda: text in texts(page, within)[0], f"{text} is shown")


def texts(page: Page, selector: str) -> list[str]:
    found: list[str] = page.eval_on_selector_all(selector, "found => found.map(one => one.textContent)")
    return found


def boxes(page: Page, selector: str) -> list[dict[str, float]]:
    """Return where each such element is that is shown at all."""
    script = """found => found.map(one => one.getBoundingClientRect().toJSON()).filter(box => box.width > 1)"""
    found: list[dict[str, float]] = page.eval_on_selector_all(selector, script)
    return found


def every_state(servers: int = 4, tasks: int = 9) -> State:
    """Return a pool in which each state of a GPU occurs."""
    state = made_state(servers, [f"task-{number}" for number in range(tasks)], ["waits-1", "waits-2"])
    end(state, "task-4")
    disable(state, 0, [0], "in use, and broken")
    disable(state, servers - 1, [5, 6], "a fan; see the ticket")
    return state


# --- What it shows --------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[0]))
@pytest.mark.parametrize(("servers", "tasks"), [(4, 16), (20, 40), (100, 40)])
def test_every_server_gpu_and_task_is_shown_and_nothing_sticks_out(
    browser: Browser, pool: Path, servers: int, tasks: int, size: tuple[int, int], language: str
) -> None:
    write(pool, made_state(servers, [f"task-{number}" for number in range(tasks)], ["waits"]))
    with Monitor(pool) as monitor, opened(browser, f"{monitor.url}?lang={language}", *size) as page:
        page.wait_for_selector("#live:not([hidden])")
        assert texts(page, "#servers tbody th") == [f"node{number:03d}" for number in range(servers)]
        assert len(boxes(page, "td.gpus li")) == 8 * servers
        assert len(boxes(page, "td.gpus li.held")) == 2 * tasks
        assert texts(page, "#tasks tbody th") == [f"task-{number}" for number in range(tasks)]
        assert texts(page, "#line tbody th") == ["waits"]
        check_layout(page, size[0])


def check_layout(page: Page, width: int) -> None:
    """Nothing is wider than the screen, and no part covers another one."""
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for selector in ("#servers tbody tr", "#tasks tbody tr", "#line tbody tr", "td.gpus li", "td, th"):
        for box in boxes(page, selector):
            assert box["left"] >= 0 and box["right"] <= width, (selector, box)
    for selector in ("#servers tbody tr", "#tasks tbody tr", "#line tbody tr", "td.gpus li", "main > *"):
        found = boxes(page, selector)
        for one, other in pairwise(found):
            assert one["right"] <= other["left"] + 1 or one["bottom"] <= other["top"] + 1, (selector, one, other)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[0]))
@pytest.mark.parametrize("servers", [4, 100])
def test_hostile_names_are_text_and_break_neither_layout_nor_order(
    browser: Browser, pool: Path, size: tuple[int, int], servers: int
) -> None:
    state = made_state(servers, HOSTILE, [f"{name[:126]}-w" for name in HOSTILE])
    for server, name in zip(state["servers"], ["漢" * 128, "<script>x</script>", HOSTILE[3], "n" * 128], strict=False):
        server["server_name"] = name
        for task in server["running_tasks"]:
            task["user"] = name
    write(pool, state)
    with Monitor(pool) as monitor, opened(browser, monitor.url, *size) as page:
        page.wait_for_selector("#live:not([hidden])")
        assert texts(page, "#tasks tbody th") == HOSTILE
        assert texts(page, "#line tbody th") == [f"{name[:126]}-w" for name in HOSTILE]
        assert (
            page.title() != "run"
            and page.eval_on_selector_all("main script, main img, main h1", "all => all.length") == 0
        )
        check_layout(page, size[0])
        # Right to left within their names, left to right in their rows: the columns are where they are for the others.
        for row in range(len(HOSTILE)):
            cells = page.eval_on_selector_all(
                f"#tasks tbody tr:nth-child({row + 1}) > *",
                "all => all.map(one => one.getBoundingClientRect().toJSON())",
            )
            places = [(cell["top"] if size[0] < 700 else 0, cell["left"]) for cell in cells]
            assert places == sorted(places), HOSTILE[row]


def test_states_of_gpus_differ_in_more_than_colour(browser: Browser, pool: Path) -> None:
    for servers, tasks in ((4, 9), (100, 9)):
        write(pool, every_state(servers, tasks))
        with Monitor(pool) as monitor, opened(browser, monitor.url) as page:
            script = """all => all.map(one => [
                getComputedStyle(one).borderStyle,
                getComputedStyle(one).backgroundImage !== "none",
                getComputedStyle(one.querySelector("b"), "::after").content,
                one.classList.contains("held"),
            ].join())"""
            signs = {
                state: {*page.eval_on_selector_all(f"td.gpus li.{state}", script)}
                for state in ("free", "held:not(.off)", "ended", "off:not(.held)")
            }
            assert all(len(found) == 1 for found in signs.values()), signs
            assert len({sign for found in signs.values() for sign in found}) == 4, signs


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[0]))
def test_without_scripts_it_is_complete_and_loads_itself_anew(
    browser: Browser, pool: Path, size: tuple[int, int]
) -> None:
    write(pool, every_state())
    with Monitor(pool, setting="web_monitor.web_page.RELOAD_S = 1") as monitor:
        with opened(browser, monitor.url, *size, java_script_enabled=False) as page:
            assert page.locator("table").count() == 3 and page.locator("#live").is_hidden()
            assert page.locator("#tasks tbody tr").count() == 9
            assert page.evaluate("document.documentElement.scrollWidth") == size[0]
            GPUResourceManagerV01(pool).allocate_resources("newcomer", 2, 8)
            page.wait_for_selector("text=newcomer")


# --- What it does ---------------------------------------------------------------------------------


def test_change_is_shown_where_it_was_made_and_the_rest_stays(browser: Browser, pool: Path) -> None:
    write(pool, made_state(tasks=["old-1", "old-2"]))
    with Monitor(pool) as monitor, opened(browser, monitor.url) as page:
        page.wait_for_selector("#live:not([hidden])")
        page.evaluate(
            "document.querySelectorAll('#servers tbody tr, #tasks tbody tr').forEach(row => (row.marked = true))"
        )
        GPUResourceManagerV01(pool).allocate_resources("newcomer", 8, 8)
        wait_for(page, "newcomer")
        assert texts(page, "#tasks tbody th") == ["old-1", "old-2", "newcomer"]
        marked = page.eval_on_selector_all(
            "#servers tbody tr, #tasks tbody tr", "all => all.map(row => row.marked || false)"
        )
        assert marked[0] and marked[2:] == [True, True, True, True, False]  # node001 has it, and a row is new
        GPUResourceManagerV01(pool).release_resources("old-1")
        wait_until(lambda: texts(page, "#tasks tbody th") == ["old-2", "newcomer"], "the task is gone")


def test_servers_come_and_go(browser: Browser, pool: Path) -> None:
    write(pool, made_state(4))
    with Monitor(pool) as monitor, opened(browser, monitor.url) as page:
        for servers in (100, 3):
            write(pool, made_state(servers, ["task"]))
            wait_until(lambda: page.locator("#servers tbody tr").count() == servers, "they are shown")  # noqa: B023
            assert page.locator("#servers").evaluate("it => it.classList.contains('many')") is (servers == 100)


@pytest.mark.parametrize("language", LANGUAGES)
def test_pool_that_goes_is_a_banner_until_it_is_back(browser: Browser, pool: Path, language: str) -> None:
    write(pool, made_state(tasks=["task"]))
    gone = "プールがありません" if language == "ja" else "There is no pool"
    with Monitor(pool) as monitor, opened(browser, f"{monitor.url}?lang={language}") as page:
        assert page.locator("#banner").is_hidden()
        aside = pool.rename(pool.with_suffix(".aside"))
        wait_for(page, gone, "#banner")
        assert page.locator("#banner").is_visible() and page.locator("main").get_attribute("class") == "old"
        assert texts(page, "#tasks tbody th") == ["task"]
        aside.rename(pool)
        page.wait_for_selector("#banner", state="hidden")
        assert page.locator("main").get_attribute("class") == ""


def test_lost_monitor_is_said_until_it_is_back(browser: Browser, pool: Path) -> None:
    write(pool, made_state(tasks=["before"]))
    monitor = Monitor(pool)
    with opened(browser, f"{monitor.url}?lang=en") as page:
        page.wait_for_selector("#live:not([hidden])")
        monitor.stop()
        page.wait_for_selector("#lost:not([hidden])")
        assert re.search("connection to the monitor is lost.*at .*\\d", page.locator("#lost").inner_text())
        assert page.locator("#live").is_hidden() and texts(page, "#tasks tbody th") == ["before"]
        write(pool, made_state(tasks=["after"]))
        with Monitor(pool, port=monitor.port):
            page.wait_for_selector("#live:not([hidden])")
            wait_for(page, "after")
            assert page.locator("#lost").is_hidden()


def test_monitor_that_falls_silent_is_lost_too(browser: Browser, pool: Path) -> None:
    write(pool, made_state())
    quick = "web_monitor.ALIVE_S = 0.5; page = web_monitor.web_page; page.SCRIPT = page.SCRIPT.replace('25000', '2000')"
    with Monitor(pool, setting=quick) as monitor, opened(browser, monitor.url) as page:
        page.wait_for_selector("#live:not([hidden])")
        monitor.process.send_signal(signal.SIGSTOP)
        page.wait_for_selector("#lost:not([hidden])")
        monitor.process.send_signal(signal.SIGCONT)
        page.wait_for_selector("#live:not([hidden])")


def test_page_of_an_earlier_release_loads_itself_anew(browser: Browser, pool: Path) -> None:
    write(pool, made_state())
    monitor = Monitor(pool, setting="web_monitor.web_page.BUILD = 'earlier'")
    with opened(browser, monitor.url) as page:
        page.wait_for_selector("#live:not([hidden])")
        assert page.locator("link[href='page.css?earlier']").count() == 1
        monitor.stop()
        with Monitor(pool, port=monitor.port):
            page.wait_for_selector("link[href='page.css?earlier']", state="detached")
            page.wait_for_selector("#live:not([hidden])")


# --- Who reads it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_language_is_that_of_the_browser_and_a_link_leads_to_the_other(
    browser: Browser, pool: Path, language: str
) -> None:
    write(pool, made_state())
    words = {"ja": "空き GPU", "en": "GPUs free"}
    with Monitor(pool) as monitor, opened(browser, monitor.url, locale=language) as page:
        wait_for(page, words[language])
        # By the keyboard alone: the link is what there is to reach, and where one is can be seen.
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.localName") == "a"
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        other = "en" if language == "ja" else "ja"
        page.wait_for_selector(f"html[lang={other}]")
        wait_for(page, words[other])
        page.wait_for_selector("#live:not([hidden])")
        GPUResourceManagerV01(pool).allocate_resources("newcomer", 2, 8)
        wait_for(page, "newcomer")
        assert words[other] in page.locator("main").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size[0]))
@pytest.mark.parametrize("servers", [4, 20])  # in the two ways of a cell
def test_accessibility_checker_finds_nothing(
    browser: Browser, pool: Path, servers: int, size: tuple[int, int], scheme: str
) -> None:
    checker = needed("axe_playwright_python")
    source = (Path(checker.__file__).parent / "axe.min.js").read_text("utf-8")
    write(pool, every_state(servers))
    with Monitor(pool) as monitor:
        for language in LANGUAGES:
            # The policy of the page would refuse the checker, which is none of its own.
            address = f"{monitor.url}?lang={language}"
            with opened(browser, address, *size, color_scheme=scheme, bypass_csp=True) as page:
                page.wait_for_selector("#live:not([hidden])")
                page.evaluate(source)
                assert violations(page) == []
                document = pool.read_bytes()
                pool.write_text("{")
                wait_for(page, str(pool), "#banner")
                assert violations(page) == []
                pool.write_bytes(document)
                page.wait_for_selector("#banner", state="hidden")


def violations(page: Page) -> list[str]:
    """Return what axe objects to: rule, element and summary."""
    result = page.evaluate("axe.run()")
    assert len(result["passes"]) > 10
    return [
        f"{rule['id']}: {node['html']} {node['failureSummary']}"
        for rule in result["violations"]
        for node in rule["nodes"]
    ]


def test_colours_follow_the_scheme_of_the_viewer(browser: Browser, pool: Path) -> None:
    write(pool, made_state())
    with Monitor(pool) as monitor:
        papers = {}
        for scheme in ("light", "dark"):
            with opened(browser, monitor.url, color_scheme=scheme) as page:
                papers[scheme] = page.evaluate(
                    "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
                )
        assert min(papers["light"]) > 200 and max(papers["dark"]) < 60

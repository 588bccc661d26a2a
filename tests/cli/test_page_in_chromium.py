from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Locator

from logsync.coordinator.messages import LogEntry
from support.browser import chromium, opened
from support.command import entry, logsync, ranks_waits, write_run

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def logged(seq: int, entries: int) -> LogEntry:
    """An entry of everything that a page draws: a spread, ranks, a NaN, a rare metric, two attempts."""
    loss = 3 * math.exp(-3 * seq / entries)
    metrics = {"loss": loss, "loss/min": 0.9 * loss, "loss/max": 1.2 * loss, "loss/std": 0.1, "loss/argmax_rank": 1.0}
    metrics |= {"gpu/memory_gb": 60.0, "gpu/memory_gb/rank0": 59.0, "gpu/memory_gb/rank1": 61.0}
    metrics |= {"grad_norm": math.nan if seq == entries // 3 else 1 + math.sin(seq) ** 2}
    if seq % 10 == 0:
        metrics["val/accuracy"] = 1 - loss / 4
    return entry(seq, metrics, attempt=int(seq > entries // 2))


def plotted(folder: Path, entries: int) -> Path:
    run = [logged(seq, entries) for seq in range(entries)]
    write_run(folder, run, waits=lambda each: ranks_waits(slow=1, wait_ms=400 if each.seq > entries // 2 else 3))
    ran = logsync("plot", folder)
    assert ran.returncode == 0, ran.stderr
    return folder / "plot.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plotted(tmp_path_factory.mktemp("run"), 300)


def colour(locator: Locator, name: str = "background-color") -> str:
    return str(locator.evaluate("(it, name) => getComputedStyle(it).getPropertyValue(name)", name))


def brightness(colour: str) -> float:
    return sum(float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_picture_is_there_and_nothing_is_complained_of_or_asked_for(
    browser: Browser, page: Path, scheme: Literal["light", "dark"]
) -> None:
    with opened(browser, page, scheme) as shown:
        cards = shown.page.locator("#cards .card")
        assert cards.count() == 4
        for at in range(4):
            cards.nth(at).scroll_into_view_if_needed()
            cards.nth(at).locator(".scatterlayer path.js-line").first.wait_for(state="attached")
        heat = shown.page.locator("#heatmap .heatmaplayer image, #heatmap .heatmaplayer canvas").first
        heat.wait_for(state="attached")

        assert shown.page.locator("#heatmap").bounding_box()["width"] > 1000  # type: ignore[index]
        assert shown.complaints == []
        assert shown.requests == [page.as_uri()]
        light = brightness(colour(shown.page.locator("body")))
        text = brightness(colour(shown.page.locator("body"), "color"))
        assert (light > 200 > text) if scheme == "light" else (light < 60 < text)


def test_title_units_legend_attempts_and_ranks_can_be_read(browser: Browser, page: Path) -> None:
    with opened(browser, page) as shown:
        shown.page.locator("#heatmap .ytick text").first.wait_for()
        cards = {str(card.locator("h3 b").inner_text()): card for card in shown.page.locator("#cards .card").all()}
        assert list(cards) == ["loss", "gpu/memory_gb", "grad_norm", "val/accuracy"]
        for card in cards.values():
            card.scroll_into_view_if_needed()
            card.locator(".xtitle").wait_for()

        assert shown.page.locator("h1").inner_text() == page.parent.name
        assert cards["gpu/memory_gb"].locator(".ytitle").text_content() == "GB"
        assert cards["loss"].locator(".xtitle").text_content() == "step"
        legends = {name: card.locator(".legendtext").all_text_contents() for name, card in cards.items()}
        assert legends["loss"] == ["all ranks", "range of ranks"]
        assert legends["gpu/memory_gb"] == ["all ranks", "range of ranks", "rank 0", "rank 1"]
        assert legends["grad_norm"] == ["all ranks", "not finite"]
        for card in [*cards.values(), shown.page.locator("#heat")]:
            assert card.locator(".annotation-text").all_text_contents() == ["attempt 0", "↻ attempt 1"]
        ticks = shown.page.locator("#heatmap .ytick text").all_text_contents()
        assert sorted(ticks) == ["rank 0", "rank 1", "rank 2", "rank 3"]
        assert "rank 1 on node-1" in shown.page.locator("#waited").inner_text()
        assert shown.complaints == []


def test_colours_change_by_hand_and_the_pictures_with_them(browser: Browser, page: Path) -> None:
    with opened(browser, page, "dark") as shown:
        line = shown.page.locator("#cards .card .scatterlayer path.js-line").last
        line.wait_for(state="attached")
        body, button = shown.page.locator("body"), shown.page.locator("#theme")
        seen = [(colour(body), colour(line, "stroke"))]
        for _ in range(3):
            button.click()
            line = shown.page.locator("#cards .card .scatterlayer path.js-line").last
            seen.append((colour(body), colour(line, "stroke")))

        as_system, by_hand_light, by_hand_dark, again = seen
        assert as_system == by_hand_dark == again
        assert brightness(by_hand_light[0]) > 200
        assert by_hand_light[1] != by_hand_dark[1]
        assert shown.complaints == []


def test_time_a_logarithm_and_a_filter_redraw_without_a_complaint(browser: Browser, page: Path) -> None:
    with opened(browser, page) as shown:
        loss = shown.page.locator("#cards .card").first
        loss.locator(".xtitle").wait_for()
        shown.page.select_option("#axis", "time")
        shown.page.check("#log")
        shown.page.fill("#filter", "LOSS")

        loss.locator(".xtitle", has_text="time (UTC)").wait_for()
        assert shown.page.locator("#cards .card:visible").count() == 1
        assert shown.page.locator("#count").inner_text() == "1 of 4"
        assert shown.complaints == []


def test_a_run_of_100_000_entries_opens(browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = plotted(tmp_path, 100_000)
    started = time.monotonic()
    with opened(browser, path) as shown:
        shown.page.locator("#cards .card .scatterlayer path.js-line").first.wait_for(state="attached")
        shown.page.locator("#heatmap .heatmaplayer image").first.wait_for(state="attached")
        took_s = time.monotonic() - started

        assert "so that no peak is lost" in shown.page.locator("#notes").inner_text()
        assert "100,000" in shown.page.locator("#facts").inner_text()
        assert shown.complaints == []
    with capsys.disabled():
        print(f"\na page of 100,000 entries ({path.stat().st_size / 1e6:.1f} MB) opened in {took_s:.1f} s")


def test_names_of_metrics_are_text_and_no_markup(browser: Browser, tmp_path: Path) -> None:
    name = '<img src=x onerror="throw 1"></script><b>bold</b>'
    write_run(tmp_path, [entry(seq, {name: 1.0}) for seq in range(3)])
    assert logsync("plot", tmp_path).returncode == 0

    with opened(browser, tmp_path / "plot.html") as shown:
        assert shown.page.locator("#cards h3 b").first.inner_text() == name
        assert shown.page.locator("#cards img").count() == 0
        assert "no line of this file tells of waits" in shown.page.locator("#waited").inner_text()
        assert shown.page.locator("#heat").is_hidden()
        assert shown.complaints == []

"""The page in a real browser: nothing fails, nothing leaves it, everybody can use it."""

from __future__ import annotations

import base64
import io
import itertools
import re
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devtools import Page, browser
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FRAME = 1 / 8
ALL_OPEN = "document.querySelectorAll('details').forEach(d => d.open = true)"
VIDEOS = "[...document.querySelectorAll('video.film')]"
ISSUES = """axe.run(document, {resultTypes: ['violations']}).then(found => found.violations.map(
    v => [v.impact, v.id, v.nodes.map(n => n.target.join(' ')).slice(0, 3)]))"""


@pytest.fixture
def tab(page: Path, tmp_path: Path) -> Generator[Page]:
    """The page, opened from its file."""
    with browser(tmp_path / "profile") as tab:
        tab.size(1400)
        tab.colours("light")
        tab.open(page.as_uri())
        yield tab


@pytest.fixture(autouse=True)
def quiet(tab: Page, page: Path) -> Generator[None]:
    """Whatever a test does: no word on the console, and nothing asked for but the page."""
    yield
    assert tab.complaints() == []
    assert tab.requests() == [page.as_uri()]


def test_it_loads_fast_and_every_picture_with_it(tab: Page, page: Path) -> None:
    assert page.stat().st_size < 15e6
    spent = tab.run("performance.getEntriesByType('navigation')[0].duration")
    assert spent < 2000 or _busy(), f"{spent:.0f} ms"
    lost = tab.run("[...document.images].filter(i => !i.naturalWidth).map(i => i.alt)")
    assert lost == []
    assert tab.run("document.images.length") > 15
    told = tab.run("[...document.images].map(i => i.alt)")
    assert all(len(text) > 40 for text in told)


def _busy() -> bool:
    """Whether others hold the processors: then time says nothing about the page."""
    import os

    return os.getloadavg()[0] > (os.cpu_count() or 1)


def test_every_claim_opens_to_its_figure_numbers_and_command(tab: Page) -> None:
    claims = tab.run("[...document.querySelectorAll('details.claim')].map(c => c.id)")
    rows = tab.run("[...document.querySelectorAll('.verdicts tbody a')].map(a => a.hash.slice(1))")
    assert sorted(claims) == sorted(rows)
    for name in claims:
        tab.run(f"document.querySelector('.verdicts a[href=\"#{name}\"]').click()")
        claim = f"document.getElementById('{name}')"
        tab.until(f"{claim}.open", 5)
        assert tab.run(f"{claim}.querySelector('.body').getBoundingClientRect().height") > 150
        shown = tab.run(f"{claim}.querySelectorAll('figure img, .figure table, .absent').length")
        assert shown, name
        assert tab.run(f"{claim}.querySelector('.body').innerText.includes('Set against')"), name
        assert tab.run(f"{claim}.querySelector('code.command').innerText.length") > 5


def test_the_filter_shows_what_fits(tab: Page) -> None:
    shown = "[...document.querySelectorAll('.verdicts tbody tr')].filter(r => r.offsetHeight > 0)"
    everything = tab.run(f"{shown}.length")
    tab.run("document.querySelector('#filter [value=supported]').click()")
    left = tab.run(f"{shown}.map(r => r.dataset.verdict)")
    assert 0 < len(left) < everything and "supported" not in left
    counted = tab.run("document.querySelector('.counts [data-verdict=supported]').dataset.count")
    assert len(left) == everything - int(counted)
    tab.run("document.querySelector('#filter [type=search]').focus()")
    tab.send("Input.insertText", text="long videos")
    few = tab.run(f"{shown}.map(r => r.innerText.toLowerCase())")
    assert 0 < len(few) < len(left)
    assert all("long" in text and "videos" in text for text in few)
    assert f"{len(few)} of {everything}" in tab.run("document.querySelector('.showing').innerText")
    hidden = tab.run(
        "[...document.querySelectorAll('details.claim')].filter(c => c.offsetHeight > 0).length"
    )
    assert hidden == len(few)


def test_videos_play_in_step_and_the_slider_moves_all(tab: Page) -> None:
    tab.run("document.getElementById('videos').scrollIntoView()")
    tab.until(f"{VIDEOS}.every(v => v.readyState === 4)")
    count = tab.run(f"{VIDEOS}.length")
    assert count == 9
    assert tab.run(f"{VIDEOS}.every(v => !v.controls && v.poster && v.getAttribute('aria-label'))")
    tab.run("document.getElementById('play').click()")
    tab.until(f"{VIDEOS}[0].currentTime > 1")
    for _ in range(5):
        tab.listen(0.3)
        times = tab.run(f"{VIDEOS}.map(v => v.currentTime)")
        assert max(times) - min(times) < 2 * FRAME, times
        assert tab.run(f"{VIDEOS}.every(v => !v.paused && !v.error)")
    tab.run("document.getElementById('play').click()")
    tab.until(f"{VIDEOS}.every(v => v.paused && !v.seeking)")
    assert len(set(tab.run(f"{VIDEOS}.map(v => v.currentTime.toFixed(3))"))) == 1
    tab.run("document.getElementById('time').focus()")
    before = tab.run(f"{VIDEOS}[0].currentTime")
    tab.key("ArrowRight")
    tab.until(f"{VIDEOS}.every(v => !v.seeking && v.currentTime > {before} + 0.06)", 10)
    after = tab.run(f"{VIDEOS}.map(v => v.currentTime)")
    assert max(after) - min(after) < 0.01 and after[0] == pytest.approx(before + FRAME, abs=0.03)
    tab.run("document.getElementById('time').value = 9; "
            "document.getElementById('time').dispatchEvent(new Event('input'))")  # fmt: skip
    tab.until(f"{VIDEOS}.every(v => !v.seeking && Math.abs(v.currentTime - 9) < 0.13)", 10)
    assert "beyond" in tab.run("document.getElementById('time').getAttribute('aria-valuetext')")
    assert "9." in tab.run("document.getElementById('clock').value")
    tab.run(f"{VIDEOS}[0].textTracks[0].mode = 'showing'")
    tab.until(f"{VIDEOS}[0].textTracks[0].cues?.length === 2", 10)


def test_curves_tell_their_values_to_pointer_and_keys(tab: Page) -> None:
    claim = "document.getElementById('claim-long-horizon-parity')"
    tab.run(f"{claim}.open = true; {claim}.querySelector('.chart').scrollIntoView()")
    tab.listen(0.3)
    chart = f"{claim}.querySelector('[data-chart=drift-iou]')"
    tab.run(f"{chart}.hidden = false; {chart}.scrollIntoView()")
    tab.until(f"{chart}.querySelector('.u-over')", 10)
    tab.run(f"{chart}.scrollIntoView()")
    x, y, width, height = tab.run(
        f"(b => [b.x, b.y, b.width, b.height])({chart}.querySelector('.u-over')"
        ".getBoundingClientRect())"
    )
    tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=x + width * 0.2, y=y + height / 2)
    tab.listen(0.3)
    legend = tab.run(f"{chart}.querySelector('.u-legend').innerText")
    assert re.search(r"dense, 10x:?\s*0\.8\d* \(0\.\d+ to 0\.\d+\)", legend), legend
    tab.run(f"{chart}.querySelector('.plot').focus()")
    tab.key("ArrowRight")
    tab.key("ArrowRight")
    told = tab.run(f"{chart}.querySelector('[role=status]').textContent")
    data = tab.run("JSON.parse(document.querySelector('script[data-chart=drift-iou]').textContent)")
    second, dense = data["x"][1], data["series"][0]
    assert f"{second:g}:" in told and f"{dense['name']} {dense['values'][1]:.4g}" in told


def test_colours_follow_the_system_and_the_button(tab: Page) -> None:
    back = "getComputedStyle(document.body).backgroundColor"

    def bright() -> float:
        return float(np.mean([int(n) for n in re.findall(r"\d+", tab.run(back))[:3]]))

    for scheme, dark in (("light", False), ("dark", True)):
        tab.colours(scheme)
        other = "Light" if dark else "Dark"
        tab.until(f"document.getElementById('theme').textContent === '{other}'", 10)
        assert (bright() < 60) == dark
    tab.run("document.getElementById('theme').click()")
    assert bright() > 200


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_issue(tab: Page, axe: str, scheme: str) -> None:
    tab.colours(scheme)
    tab.run(ALL_OPEN)
    tab.run(f"{axe};0")
    found: list[Any] = tab.run(ISSUES)
    assert [issue for issue in found if issue[0] in ("serious", "critical")] == []


def test_keys_alone_reach_a_claim(tab: Page) -> None:
    tab.key("Tab")
    assert tab.run("document.activeElement.className") == "skip"
    tab.key("Enter")
    for _ in range(40):
        tab.key("Tab")
        if tab.run("document.activeElement.closest('.verdicts') !== null"):
            break
    target = tab.run("document.activeElement.hash")
    assert target.startswith("#claim-")
    outline = tab.run("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    tab.key("Enter")
    tab.until(f"document.querySelector('{target}').open", 5)
    heads = tab.run(
        "[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))"
    )
    assert heads.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(heads))
    for landmark in ("header", "nav", "main", "footer"):
        assert tab.run(f"document.querySelectorAll('{landmark}').length") == 1


@pytest.mark.parametrize("width", [400, 1400])
def test_no_width_cuts_anything_off(tab: Page, tmp_path: Path, width: int) -> None:
    tab.size(width, 900, phone=width < 600)
    tab.run(ALL_OPEN)
    tab.listen(0.5)
    assert tab.run("document.documentElement.scrollWidth") <= width
    tab.run("document.querySelectorAll('details').forEach(d => d.open = false); scrollTo(0, 0)")
    shot = Image.open(io.BytesIO(tab.picture(tmp_path / f"{width}.png")))
    assert shot.width == width
    assert len(set(np.asarray(shot.convert("L")).ravel().tolist())) > 50
    size = tab.run("parseFloat(getComputedStyle(document.querySelector('.verdicts a')).fontSize)")
    assert size >= 14


def test_it_prints_with_every_claim_open(tab: Page) -> None:
    tab.run("addEventListener('beforeprint', () => { window.opened = "
            "document.querySelectorAll('details.claim[open]').length; })")  # fmt: skip
    printed = tab.send("Page.printToPDF", printBackground=True)
    content = base64.b64decode(printed["data"])
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b(?!s)", content)) > 10
    claims = tab.run("document.querySelectorAll('details.claim').length")
    assert tab.run("window.opened") == claims
    tab.until("document.querySelectorAll('details.claim[open]').length === 0", 5)


def test_without_a_script_everything_is_there(page: Path, tab: Page) -> None:
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    tab.send("Page.reload")
    time.sleep(1)
    tab.until("document.readyState === 'complete'")
    assert tab.run(f"{VIDEOS}.every(v => v.controls)")
    assert tab.run("document.getElementById('filter').offsetHeight") == 0
    assert tab.run("[...document.images].every(i => i.naturalWidth > 0)")
    assert tab.run("getComputedStyle(document.querySelector('.verdicts')).display") != "none"
    tab.events.clear()
    tab.events.append({"method": "Network.requestWillBeSent",
                       "params": {"request": {"url": page.as_uri()}}})  # fmt: skip

"""Every page of the built docs in headless Chromium: no error, no request to the network, no raw LaTeX, no cut."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html")) if SITE.exists() else []
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1300, 400)
# Tables over all losses and modifiers, or of signatures: they scroll inside themselves.
WIDE = ("losses/capabilities.html", "integrations/matrix.html")
# What is wrong with a page that is rendered at one width, as sentences.
FAULTS = """(wide) => {
  const faults = [];
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth) faults.push(`the page is ${page.scrollWidth} pixels wide`);
  for (const box of document.querySelectorAll(".table-wrapper")) {
    // On a phone, a table of three columns and more scrolls inside itself.
    const scrolls = window.innerWidth < 600 && box.querySelectorAll("tr:first-child > *").length > 2;
    const cut = box.scrollWidth > box.clientWidth + 1;
    if (!wide && !scrolls && cut) faults.push(`cut off: ${box.innerText.slice(0, 60)}`);
  }
  for (const math of document.querySelectorAll("div.math, span.math"))
    if (!math.querySelector("mjx-container")) faults.push(`raw LaTeX: ${math.innerText.slice(0, 60)}`);
  for (const error of document.querySelectorAll("mjx-merror, [data-mjx-error]"))
    faults.push(`LaTeX: ${error.getAttribute("data-mjx-error") || error.innerText}`);
  const text = document.querySelector("article, main, body").cloneNode(true);
  text.querySelectorAll("pre, code, script, style, mjx-container").forEach((node) => node.remove());
  const raw = text.textContent.match(/\\\\(frac|log|sigma|ell|beta|mathrm|left)\\b.{0,40}|\\$\\$.{0,40}/);
  if (raw) faults.push(`raw LaTeX: ${raw[0]}`);
  for (const image of document.images) if (!image.naturalWidth) faults.push(`no image: ${image.src}`);
  return faults;
}"""

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium"),
    pytest.mark.skipif(not PAGES, reason="no built docs: make docs"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.mark.parametrize("name", PAGES or ["index.html"])
def test_page(browser: Any, name: str) -> None:
    page = browser.new_page(viewport={"width": WIDTHS[0], "height": 900})
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request", lambda it: faults.append(it.url) if not it.url.startswith(("file:", "data:")) else None
    )
    try:
        page.goto((SITE / name).as_uri(), wait_until="load")
        page.evaluate("() => window.MathJax ? window.MathJax.startup.promise : null")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            faults += [f"{width} pixels: {fault}" for fault in page.evaluate(FAULTS, name in WIDE)]
    finally:
        page.close()
    assert not faults, f"{name}: {'; '.join(faults)}"

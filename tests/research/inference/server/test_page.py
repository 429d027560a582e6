"""The chat page in headless Chromium, driven through WebDriver."""

import re
import shutil
import socket
import subprocess
import time
from html.parser import HTMLParser

import httpx
import pytest

from research.inference.server.page import PAGE, POLICY
from tests.research.inference.server.fake import FakeEngine, serving
from tests.research.inference.server.test_clients import wait_until

ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"
DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")
needs_browser = pytest.mark.skipif(
    not (DRIVER and BROWSER), reason="requires chromium and chromedriver on the PATH"
)


def test_the_page_is_one_file_that_loads_nothing():
    """Its labels are those of its fields, for readers of screens."""

    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.fields, self.labels, self.tags = set(), set(), set()

        def handle_starttag(self, tag, attrs):
            given = dict(attrs)
            self.tags.add(tag)
            if tag in ("input", "textarea", "select"):
                self.fields.add(given["id"])
            if tag == "label":
                self.labels.add(given["for"])
            assert not given.get("src") and given.get("href", "data:,") == "data:,"
            assert not any(name.startswith("on") or name == "style" for name in given)

    reader = Reader()
    reader.feed(PAGE)
    assert reader.fields and reader.fields <= reader.labels
    assert "main" in reader.tags and not reader.tags & {"img", "iframe", "object"}
    assert not re.search(r"https?://|@import|url\(|innerHTML|eval\(", PAGE)
    assert "default-src 'none'" in POLICY and POLICY.count("sha256-") == 2


class Browser:
    """A session of WebDriver (https://www.w3.org/TR/webdriver2/)."""

    def __init__(self, url, width, height):
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--hide-scrollbars"]  # fmt: skip
        metrics = {"width": width, "height": height, "pixelRatio": 1}
        options = {
            "binary": BROWSER,
            "args": arguments,
            "mobileEmulation": {"deviceMetrics": metrics},
        }
        self._client = httpx.Client(base_url=url, timeout=60)
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self._session = self._client.post("/session", json=wanted).json()["value"]["sessionId"]

    def __call__(self, path, **body):
        method = "POST" if body else "GET"
        response = self._client.request(
            method, f"/session/{self._session}/{path}", json=body or None
        )
        assert response.status_code == 200, response.text
        return response.json()["value"]

    def run(self, script):
        """What a function of this body returns in the page."""
        return self("execute/sync", script=script, args=[])

    def element(self, css):
        found = self("element", using="css selector", value=css)
        return next(iter(found.values()))

    def type(self, css, text):
        self(f"element/{self.element(css)}/value", text=text)

    def keys(self, *keys):
        """Press keys wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self("actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def wait(self, script):
        wait_until(lambda: self.run(f"return Boolean({script})"))

    def close(self):
        self._client.delete(f"/session/{self._session}")
        self._client.close()


@pytest.fixture(scope="module")
def driver():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                if httpx.get(f"{url}/status").json()["value"]["ready"]:
                    break
            except httpx.TransportError:
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait()


LOG = "document.getElementById('log').textContent"


@needs_browser
@pytest.mark.parametrize("width, height", [(390, 844), (1280, 800)])
def test_a_chat_by_keyboard_that_streams_stops_and_shows_errors(
    driver, tokenizer, tmp_path, width, height
):
    keys = tmp_path / "keys"
    keys.write_text("0123456789abcdef")
    tokens = tokenizer.prompt("the cat sat on the mat, ", beginning=False)
    engine = FakeEngine(
        tokenizer.plain,
        lambda request, index: tokens * 9 + [tokenizer.stop_tokens[-1]],
        max_length=10**4,
    )
    with serving(engine, tokenizer, api_key_file=str(keys)) as server:
        browser = Browser(driver, width, height)
        try:
            browser("url", url=f"{server.address}/")
            assert browser.run("return innerWidth") == width
            # without a key: an error that says what to do, and the field for it is shown
            browser.wait("!document.getElementById('problem').hidden")
            assert "401" in browser.run("return document.getElementById('problem').textContent")
            assert browser.run("return document.getElementById('options').open")
            browser.type("#key", "0123456789abcdef" + TAB)
            browser.wait("document.getElementById('model').textContent === 'small'")
            assert browser.run("return document.getElementById('problem').hidden")
            # an answer that streams; Enter sends
            browser.run("document.getElementById('options').open = false")
            browser.type("#text", "Hello <b>you</b>")
            with engine.steps:
                engine.seconds = 0.01
                browser.keys(ENTER)
                browser.wait("!document.getElementById('stop').hidden")
            browser.wait(f"{LOG}.includes('the cat')")
            assert not browser.run("return document.getElementById('stop').hidden")
            browser.wait("document.getElementById('stop').hidden")
            shown = browser.run(f"return {LOG}")
            assert "Hello <b>you</b>" in shown and shown.count("sat on the mat") == 9
            assert browser.run("return document.activeElement.id") == "text"
            assert "sat on the mat" in browser.run(
                "return document.getElementById('status').textContent"
            )
            # Escape stops an answer, and frees what it held
            engine.seconds = 0.2
            browser.type("#text", "More")
            browser.keys(ENTER)
            browser.wait("/the/.test(document.querySelectorAll('.assistant')[1]?.textContent)")
            browser.keys(ESCAPE)
            browser.wait(f"{LOG}.includes('You stopped this answer.')")
            wait_until(lambda: not engine.samples)
            engine.seconds = 0.0
            assert engine.requests[1].tokens[: len(engine.requests[0].tokens) - 4] == (
                list(engine.requests[0].tokens[:-4])
            )  # the second request has the first turn
            # nothing is wider than the window, and a button can be hit by a thumb
            assert browser.run("return document.documentElement.scrollWidth") <= width
            assert browser.run("return document.getElementById('send').offsetHeight") >= 44
            # a script that is not the page's does not run, and nothing comes from elsewhere
            script = "const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
            assert browser.run(f"{script} document.head.append(s); return window.ran") is None
            loaded = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
            assert all(name.startswith(server.address) for name in browser.run(loaded))
            engine.fault = RuntimeError("lost")
            browser.type("#text", "Again")
            browser.keys(ENTER)
            browser.wait("!document.getElementById('problem').hidden")
            assert "engine has failed" in browser.run(
                "return document.getElementById('problem').textContent"
            )
        finally:
            browser.close()

"""The page of tools/compare_page.py, opened and used in a real headless browser where one is installed."""

import base64
import io
import json
import shutil
import subprocess
import time

import numpy as np
import pytest
from conftest import TOOLS, run
from PIL import Image

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def saved_images(tmp_path_factory):
    """Two methods and LR of two images, in flat colours of their own, and a table."""
    folder = tmp_path_factory.mktemp("images")
    lines = ["scene,image,method,psnr,ssim,lpips"]
    colors = {"lr": (9, 9, 9), "ldm_same_nfe_bp": (250, 0, 0), "agent": (0, 0, 250)}
    for method, color in colors.items():
        side = 12 if method == "lr" else 48
        for k, name in enumerate(("a", "b")):
            (folder / method / "river").mkdir(parents=True, exist_ok=True)
            pixels = np.full((side, side, 3), np.array(color) - 9 * k * (np.array(color) > 100), np.uint8)
            Image.fromarray(pixels).save(folder / method / "river" / f"{name}.png")
            lines += [f"river,{name}.jpg,{method},{20 + k}.126,0.5,"] * (method == "agent")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_the_page_is_one_file_that_asks_for_nothing_from_a_network(saved_images):
    printed = run(TOOLS / "compare_page.py", saved_images)
    page = (saved_images / "compare.html").read_text("utf-8")
    assert "6 images of 3 methods" in printed
    assert "http" not in page and "@import" not in page and "<link" not in page and " src=" not in page
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    one = data["images"]["river"]["a"]
    assert one["size"] == [48, 48] and one["figures"]["agent"] == ["20.13", "0.500", "n/a"]
    content = base64.b64decode(one["pixels"]["agent"].split(",")[1])
    assert content == (saved_images / "agent/river/a.png").read_bytes()  # the original pixels
    shutil.copy(saved_images / "agent/river/a.png", saved_images / "agent/river/old.png")  # of an earlier table
    assert "6 images of 3 methods" in run(TOOLS / "compare_page.py", saved_images)


def test_a_folder_without_images_is_refused_in_one_sentence(tmp_path):
    command = run(TOOLS / "compare_page.py", tmp_path, code=2)
    assert command.count("error: ") == 1 and "--save-images" in command


class Browser:
    """Chromium, driven by DevTools messages through pipes, so that no WebSocket client is needed."""

    def __init__(self, url, profile):
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--window-size=900,800"]
        pipes = ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 >/dev/null']  # it reads from file 3 and writes to file 4
        command = [*pipes, BROWSER, *flags, f"--user-data-dir={profile}", "about:blank"]
        kinds = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process, self.count, self.session = subprocess.Popen(command, **kinds), 0, {}
        target = self.send("Target.createTarget", url=url)["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        deadline = time.monotonic() + 60
        while not self.value("document.readyState == 'complete' && !!document.getElementById('under')?.src"):
            assert time.monotonic() < deadline, "the page does not load"
            time.sleep(0.1)

    def send(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while True:
            answer = bytearray()
            while (byte := self.process.stdout.read(1)) != b"\0":
                assert byte, "the browser has ended"
                answer += byte
            answer = json.loads(answer)
            if answer.get("id") == self.count:  # others are events
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression):
        """Of JavaScript in the page."""
        return self.send("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def mouse(self, kind, x, y, button="left"):
        """kind: mousePressed, mouseMoved or mouseReleased. Chromium takes a move with a button for a drag."""
        held = {"button": button, "buttons": int(button == "left" and kind != "mouseReleased"), "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **held)

    def key(self, key):
        text = {"text": key} if len(key) == 1 else {}
        code = {"ArrowRight": 39}.get(key, ord(key[0].upper()))
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def pixel(self, x, y):
        """Colour of the page at px x, y, as it is drawn."""
        shot = self.send("Page.captureScreenshot", clip={"x": x, "y": y, "width": 1, "height": 1, "scale": 1})["data"]
        return Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB").getpixel((0, 0))

    def close(self):
        self.send("Browser.close")
        self.process.wait(30)


@pytest.fixture
def page(saved_images, tmp_path):
    if not BROWSER:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    run(TOOLS / "compare_page.py", saved_images)
    browser = Browser((saved_images / "compare.html").as_uri(), tmp_path)
    yield browser
    browser.close()


def test_the_slider_is_dragged_and_the_keyboard_works_in_chromium(page):
    view = "document.getElementById('view').getBoundingClientRect()"
    left, top, width = page.value(f"(({{left, top, width}}) => [left, top, width])({view})")
    middle = top + width / 2
    left, width = left + 1, width - 2  # within the frame
    assert width == 96  # 48 px at 2x
    red, blue = (250, 0, 0), (0, 0, 250)
    assert page.pixel(left + 0.25 * width, middle) == red and page.pixel(left + 0.75 * width, middle) == blue

    page.mouse("mousePressed", left + 0.5 * width, middle)
    for share in (0.6, 0.75, 0.9):
        page.mouse("mouseMoved", left + share * width, middle)
    page.mouse("mouseReleased", left + 0.9 * width, middle)
    assert 85 < float(page.value("document.getElementById('split').value")) < 95
    assert page.pixel(left + 0.75 * width, middle) == red and page.pixel(left + 0.97 * width, middle) == blue
    page.mouse("mouseMoved", left + 0.1 * width, middle, button="none")  # nothing moves
    assert page.pixel(left + 0.75 * width, middle) == red

    page.value("document.getElementById('split').focus()")
    before = float(page.value("document.getElementById('split').value"))
    page.key("ArrowRight")
    assert float(page.value("document.getElementById('split').value")) > before
    page.key("4")
    assert page.value("document.getElementById('under').getBoundingClientRect().width") == 4 * 48
    assert page.value("getComputedStyle(document.getElementById('under')).imageRendering") == "pixelated"
    page.key("x")
    assert page.value("document.getElementById('left').value") == "agent"
    figures = page.value("document.getElementById('figures').innerText").split()
    assert figures[:5] == ["left:", "agent", "20.13", "0.500", "n/a"]
    page.key("n")
    assert page.value("document.getElementById('image').value") == "b"
    assert "21.13" in page.value("document.getElementById('figures').innerText")

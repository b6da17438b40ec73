"""The page of `res2net-zoo space` in Chromium, driven by Playwright."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, SHIPPED_MODEL, input_error

pytest.importorskip("gradio", reason="the extra `space` is missing")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("Chromium is missing; `apt-get install chromium` installs it", allow_module_level=True)

EXAMPLES = ROOT / "hub" / "space" / "examples"
SECONDS = 60  # for an answer on a busy machine
playwright.expect.set_options(timeout=1000 * SECONDS)


class Server:
    """A running page, in a process."""

    def __init__(self, folder: Path, *words: str, program: tuple[str, ...] = ("-m", "res2net_zoo")) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.temporary = folder
        command = [sys.executable, *program, "space", "--port", str(self.port), *words]
        # A proxy that is down: it does not apply to the page itself.
        env = {**os.environ, "TMPDIR": str(folder), "http_proxy": "http://127.0.0.1:9"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == f"the page is at http://127.0.0.1:{self.port}/ until Ctrl-C\n"
        self.url = line.split()[4]

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_folder) -> Iterator[Server]:
    running = Server(
        tmp_path_factory.mktemp("uploads"), "--model", f"local-dir:{SHIPPED_MODEL}", f"local-dir:{tiny_folder}"
    )
    yield running
    assert running.stop() == 143
    assert not [*running.temporary.glob("res2net-zoo-space-*")]  # with all uploads


@pytest.fixture(scope="module")
def browser():
    # Without a sandbox, because tests may run as root; only the page on loopback is opened.
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield running
        running.close()


@pytest.fixture
def open_page(browser, server):
    """Opens the page in a new window; checks at the end that it has sent requests only to its own server."""
    asked: set[str] = set()
    contexts = []

    def open(width: int = 1400, height: int = 1000, **options):
        contexts.append(browser.new_context(viewport=dict(width=width, height=height), **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.on("request", lambda request: asked.add(request.url))
        page.goto(server.url)
        page.get_by_role("tab", name="Try").wait_for()
        return page

    yield open
    for context in contexts:
        context.close()
    others = {url for url in asked if not url.startswith((server.url, "data:", "blob:"))}
    assert asked and not others


def upload(page, path: Path) -> None:
    """Upload an image once the page is ready for it, as a user does."""
    remove = page.get_by_label("Remove Image")
    if remove.count():
        page.wait_for_timeout(500)  # an event may still be pending
        remove.click()
        playwright.expect(page.locator("#status")).to_contain_text("Choose, paste")
        page.wait_for_timeout(500)
    page.set_input_files("input[type=file]", path)


def first_class(page, which: str = "first") -> str:
    """Return the most likely class of a model, once it has answered."""
    heading = page.locator(f"#{which}-classes h2")
    heading.wait_for()
    return heading.inner_text().strip()


def choose(page, label: str, name: str) -> None:
    page.get_by_label(label, exact=True).first.click()
    page.get_by_role("option", name=name, exact=True).click()


def answered(page) -> None:
    playwright.expect(page.locator("#status")).to_have_text("Done.")


def test_an_uploaded_digit_is_classified(open_page, tmp_path):
    page = open_page()
    paints = page.evaluate("performance.getEntriesByType('paint').map(entry => entry.startTime)")
    assert paints and max(paints) < 2000
    upload(page, EXAMPLES / "digit_3.png")
    answered(page)
    assert first_class(page) == "3" and page.locator("#first-classes").inner_text().count("%") == 5
    assert re.search(r"\d ms by torch", page.locator("#first-note").inner_text())
    maps = page.locator("#first-map img")
    assert maps.count() == 2 and all(image.get_attribute("src").startswith("data:image/png") for image in maps.all())


def test_two_models_side_by_side_and_the_slider_of_the_map(open_page):
    page = open_page()
    page.get_by_label("digit_5").or_(page.locator("button.gallery-item").nth(2)).first.click()
    answered(page)
    assert first_class(page) == "5" and first_class(page, "second") in set("0123456789")
    heat = page.locator("#second-map img").nth(1)
    assert heat.evaluate("e => getComputedStyle(e).opacity") == "0.5"
    slider = page.get_by_role("slider", name="Activation map over the image")
    slider.focus()
    page.keyboard.press("End")
    playwright.expect(heat).to_have_css("opacity", "1")


def test_weights_that_cannot_be_fetched(open_page):
    page = open_page()
    choose(page, "Model", "res2net50_26w_4s.in1k")
    choose(page, "Beside it", "none")
    upload(page, EXAMPLES / "digit_8.png")
    status = page.locator("#status")
    playwright.expect(status).to_contain_text("The weights of res2net50_26w_4s.in1k cannot be fetched")
    page.get_by_role("button", name="Use the shipped digits model").click()
    answered(page)
    assert first_class(page) == "8"


@pytest.mark.full
def test_unsuitable_uploads_leave_the_server_alive(open_page, tmp_path):
    frames = [Image.new("L", (32, 32), grey) for grey in (0, 255)]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "corrupt.png").write_bytes((EXAMPLES / "balloon.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>")
    Image.new("L", (9000, 9000)).save(tmp_path / "large.png")
    page = open_page()
    for name, reason in {
        "corrupt.png": "The image is damaged",
        "animated.gif": "The image is animated",
        "text.png": "not an image of a supported format",
        "drawing.svg": "not an image of a supported format",
        "large.png": "9000 x 9000 pixels; the limit is 50 million",
    }.items():
        upload(page, tmp_path / name)
        playwright.expect(page.locator("#status")).to_contain_text(reason)
    upload(page, EXAMPLES / "digit_3.png")
    answered(page)
    assert first_class(page) == "3"


@pytest.mark.full
def test_two_users_get_their_own_answers(open_page):
    pages, digits = [open_page() for _ in range(3)], [3, 5, 8]
    for turn in range(3):
        pairs = list(zip(pages, digits[turn:] + digits[:turn], strict=True))
        for page, digit in pairs:
            upload(page, EXAMPLES / f"digit_{digit}.png")
        for page, digit in pairs:
            playwright.expect(page.locator("#first-classes h2")).to_have_text(str(digit))
            answered(page)


def open_table(page):
    """Open the tab with the table, and return the table."""
    page.get_by_role("tab", name="Choose").click()
    table = page.get_by_role("grid", name="Dataframe")
    table.get_by_role("gridcell", name="res2net101d.in1k").first.wait_for()
    return table


def column(table, index: int) -> list[str]:
    """Return the visible cells of a column, from 0."""
    cells = (row.get_by_role("gridcell") for row in table.get_by_role("row").all())
    return [row.nth(index).inner_text().strip() for row in cells if row.count()]


def test_the_table_is_sorted_and_filtered_and_shows_cards(open_page):
    page = open_page()
    table = open_table(page)
    page.get_by_label("Filter by name, licence or publisher").fill("vd apache")
    playwright.expect(table).not_to_contain_text("res2net101d.in1k")
    shown = column(table, 0)
    assert "res2net200_vd_26w_4s.ssld_in1k" in shown and len(shown) == 6 and all("_vd_" in name for name in shown)
    best = table.get_by_role("row").nth(1).get_by_role("gridcell").first
    playwright.expect(best).to_have_text("res2net200_vd_26w_4s.ssld_in1k")  # by accuracy
    choose(page, "Sort by", "GMACs")
    playwright.expect(best).to_have_text("res2net50_vd_26w_4s.ssld_in1k")
    heading = table.get_by_role("columnheader", name="params (M)")
    heading.hover()
    heading.locator("button").click()
    page.get_by_role("menuitem", name="Sort descending").click()
    playwright.expect(best).to_have_text("res2net200_vd_26w_4s.ssld_in1k")
    parameters = [float(text) for text in column(table, 3)]
    assert parameters == sorted(parameters, reverse=True) and len(parameters) == 6
    table.get_by_role("gridcell", name="res2net101_vd_26w_4s.ssld_in1k").click()
    card = page.locator("#card")
    playwright.expect(card).to_contain_text("res2net101_vd_26w_4s.ssld_in1k")
    playwright.expect(card).to_contain_text("83.900 top-1")
    page.get_by_role("button", name="Try this model").click()
    chosen = page.get_by_label("Model", exact=True).first
    playwright.expect(chosen).to_have_value("res2net101_vd_26w_4s.ssld_in1k")


@pytest.mark.full
def test_speed_is_measured_and_can_be_stopped(open_page):
    page = open_page()
    table = open_table(page)
    words = page.get_by_label("Filter by name, licence or publisher")
    words.fill("res2net_tiny")
    playwright.expect(table).not_to_contain_text("res2net101d.in1k")
    page.get_by_role("button", name="Measure images/s here").click()
    page.get_by_text("1 of 1 models measured.").wait_for()
    assert float(column(table, 5)[0]) > 1
    words.fill("dla60")
    playwright.expect(table).not_to_contain_text("res2net_tiny")
    page.get_by_role("button", name="Measure images/s here").click()
    page.get_by_text("1 of 2 models measured.").wait_for()
    page.get_by_role("button", name="Stop").last.click()
    page.get_by_text("Stopped.").wait_for()


def test_sliders_change_the_block_and_its_costs(open_page):
    page = open_page()
    page.get_by_role("tab", name="Block").click()
    figures, drawing = page.locator("#figures"), page.locator("#drawing")
    playwright.expect(figures).to_contain_text("25.70 M parameters, 4.26 GMACs at 224 x 224, receptive field 1,131")
    assert drawing.locator("circle").count() == 3
    page.get_by_role("slider", name="Scale s").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    playwright.expect(figures).to_contain_text("37.05 M parameters, 6.30 GMACs")
    assert drawing.locator("circle").count() == 5
    page.get_by_label("CIFAR (ResNeXt)").check()
    playwright.expect(figures).to_contain_text("at 32 x 32")


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.full
def test_no_tab_is_wider_than_the_page(open_page, width, scheme):
    page = open_page(width, 800, color_scheme=scheme)
    for name in ("Try", "Choose", "Block"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('.dark') !== null") == (scheme == "dark")


@pytest.mark.full
def test_uploads_are_limited_in_size_and_deleted(browser, tmp_path):
    hurry = (
        "import sys; from res2net_zoo.space import app; app.SWEEP, app.KEEP = 1, 2; "
        "from res2net_zoo.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    running = Server(tmp_path, program=("-c", hurry))
    page = browser.new_page()
    try:
        page.goto(running.url)
        (tmp_path / "large.png").write_bytes(bytes(21 * 2**20))
        page.set_input_files("input[type=file]", tmp_path / "large.png")
        page.get_by_text(re.compile("exceed the maximum", re.I)).first.wait_for()
        shutil.copy(EXAMPLES / "digit_3.png", tmp_path / "mine.png")
        upload(page, tmp_path / "mine.png")
        folder = next(tmp_path.glob("res2net-zoo-space-*"))
        stored = wait_until(lambda: [*folder.rglob("mine.png")])
        wait_until(lambda: not any(path.exists() for path in stored))
        assert not [*folder.rglob("large*")]
    finally:
        page.close()
        running.stop()


def wait_until(condition):
    """Return the result of a condition once it is true."""
    end = time.monotonic() + SECONDS
    while not (result := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return result


@pytest.mark.parametrize(
    ("path", "reason"), [("/etc/passwd", None), ("http://192.0.2.1/image.png", "Upload the file itself, not a URL.")]
)
def test_requests_can_name_neither_paths_nor_urls(server, path, reason):
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    # In any argument of any function, here those of the first one.
    body = {"data": [file, file, file], "fn_index": 1, "session_hash": f"session {path}"}
    request = urllib.request.Request(
        f"{server.url}gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=SECONDS).close()
    session = urllib.parse.quote(f"session {path}")
    with urllib.request.urlopen(
        f"{server.url}gradio_api/queue/data?session_hash={session}", timeout=SECONDS
    ) as messages:
        done = next(json.loads(line[6:]) for line in messages if b"process_completed" in line)
    assert not done["success"] and done["output"]["error"] == reason


def test_no_file_outside_the_folders_of_the_page_is_served(server):
    for path in ("/etc/passwd", ROOT / "pyproject.toml", "../pyproject.toml", "res2net_zoo"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{server.url}gradio_api/file={path}", timeout=20)
        assert error.value.code in (400, 403, 404)


@pytest.mark.full
def test_only_loopback_listens_and_a_used_port_is_an_error(server):
    command = [sys.executable, "-m", "res2net_zoo", "space", "--port", str(server.port)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "(--port, --host)" in input_error(result)
    command = [sys.executable, "-m", "res2net_zoo", "space", "--host", "192.0.2.1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "cannot listen on 192.0.2.1: Cannot assign" in input_error(result)
    with socket.socket() as other, pytest.raises(OSError):
        other.connect(("127.0.0.2", server.port))  # another address of this machine

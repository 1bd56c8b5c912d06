"""The chat page in a real browser, with phi-4-nano behind it.

PHIMLX_SCREENSHOTS may name a folder, into which each test puts what it saw last.
"""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from phimlx.api import Phi, load
from phimlx.hub.resolve import NANO_MULTIMODAL
from phimlx.server.ui import TYPES
from tests.server.adapters import write_adapter
from tests.server.conftest import Say
from tests.server.running import Running, running

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SECONDS = 60

needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="there is no Chromium with its driver"
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--window-size=1200,900",
)
PERSONA = 'system = "Be brief."\nmodel = "nano:mine"\ntemperature = 0.0\nmax_tokens = 12\n'
PICTURE = NANO_MULTIMODAL / "pictures" / "vision-00.png"
CLIP = NANO_MULTIMODAL / "clips" / "speech-00.flac"


DROP = """const data = new DataTransfer();
for (const [name, type, base64] of arguments) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  data.items.add(new File([bytes], name, { type }));
}
document.body.dispatchEvent(new DragEvent('drop', { dataTransfer: data, bubbles: true }));"""


TITLES = """return [...document.querySelectorAll('#conversations .title')]
  .map((each) => each.textContent);"""


class Page:
    """The page as a person uses it."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get("about:blank")
        self.driver.get(url)
        self.until(lambda: self.driver.find_elements(By.CSS_SELECTOR, "html[data-ready]"))

    def until(self, true: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, SECONDS, 0.05).until(lambda _: true())

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def click(self, selector: str) -> None:
        self.until(lambda: self.one(selector).is_displayed())
        self.one(selector).click()

    def press(self, words: str, within: str = "") -> None:
        """Press the last button that says something."""
        buttons = [each for each in self.all(f"{within} button") if each.text == words]
        buttons[-1].click()

    def choose(self, selector: str, value: str) -> None:
        Select(self.one(selector)).select_by_value(value)

    def say(self, text: str) -> str:
        """Send a message and wait for the reply."""
        self.one("#prompt").send_keys(text + Keys.ENTER)
        return self.reply()

    def reply(self) -> str:
        self.until(
            lambda: self.all(".assistant .tools button") and self.one("#send").is_displayed()
        )
        return self.all(".assistant .body")[-1].text

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, nano: Phi) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), nano, 3)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Iterator[Running]:
    """A server with an adapter and a persona."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHIMLX_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        settings = tmp_path_factory.mktemp("settings")
        patch.setenv("PHIMLX_CONFIG_DIR", str(settings))
        (settings / "personas").mkdir()
        (settings / "personas" / "clerk.toml").write_text(PERSONA)
        with running(adapters=(f"nano:mine={adapter}",)) as started:
            yield started


@pytest.fixture(scope="module")
def driver() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER or ""))
    driver.set_script_timeout(SECONDS)
    yield driver
    driver.quit()


@pytest.fixture
def page(
    served: Running, driver: webdriver.Chrome, request: pytest.FixtureRequest
) -> Iterator[Page]:
    """The page, newly opened; a complaint of the browser fails the test."""
    page = Page(driver)
    driver.set_window_size(1200, 900)
    page.open(f"{served.url}/")
    page.run("localStorage.clear(); sessionStorage.clear()")
    page.open(f"{served.url}/")
    yield page
    folder = os.environ.get("PHIMLX_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(Path(folder) / f"{request.node.name}.png"))
    assert [entry["message"] for entry in driver.get_log("browser")] == []


def test_the_page_is_small_and_asks_nobody_else() -> None:
    folder = Path(__file__).parents[2] / "phimlx" / "server" / "page"
    assert {path.name for path in folder.iterdir()} == {*TYPES, "index.html"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 150_000
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        text = text.replace("http://www.w3.org/", "")
        assert "://" not in text.replace("https?:\\/\\/", ""), path
        assert "innerHTML" not in text, path


def test_browsers_get_the_page_and_others_ollamas_sentence(server: Running) -> None:
    html = server.client.get("/", headers={"accept": "text/html,*/*"})
    assert html.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in html.headers["content-security-policy"]
    assert server.client.get("/").text == "Ollama is running"
    assert server.client.get("/ui/page/..%2Fapp.py").status_code == 404


def test_a_token_is_good_once() -> None:
    with running("the key") as server:
        server.app.token = "the token"
        assert server.post("/ui/session", {"token": "wrong"}).status_code == 403
        assert server.post("/ui/session", {"token": "the token"}).status_code == 403
        server.app.token = "another"
        assert server.post("/ui/session", {"token": "another"}).json() == {"key": "the key"}
        assert server.post("/ui/session", {"token": "another"}).status_code == 403


@needs_browser
@pytest.mark.slow
class TestInABrowser:
    def test_a_question_is_answered(self, page: Page, served: Running) -> None:
        page.choose("#model", "nano")
        assert page.say("What is 2 plus 3?") == "5"
        assert "2 tokens" in page.one(".assistant .figures").text
        page.say("And 4 plus 4?")
        assert len(page.all(".message")) == 4
        titles = page.until(lambda: page.all("#conversations .title"))
        assert titles[0].text == "What is 2 plus 3?"
        page.open(f"{served.url}/")
        page.until(lambda: page.all("#conversations .title"))[0].click()
        page.until(lambda: len(page.all(".message")) == 4)

    def test_edit_retry_and_copy(self, page: Page) -> None:
        page.choose("#model", "nano")
        page.say("What is 2 plus 3?")
        page.press("Retry", ".assistant")
        assert page.reply() == "5"
        page.press("Edit", ".user")
        assert page.one("#prompt").get_attribute("value") == "What is 2 plus 3?"
        page.one("#prompt").send_keys(Keys.CONTROL, "a")
        assert page.say("What is 3 plus 4?") == "7"
        assert [each.text for each in page.all(".user .body")] == ["What is 3 plus 4?"]
        page.press("Copy", ".assistant")
        page.until(lambda: any(each.text == "Copied" for each in page.all(".assistant button")))

    def test_a_reply_can_be_stopped(self, page: Page, served: Running) -> None:
        page.choose("#model", "nano")
        page.click("#open-settings")
        page.one("[name=temperature]").send_keys("2")
        page.press("Done", "#settings")
        page.one("#prompt").send_keys("Tell me a long story." + Keys.ENTER)
        page.run("document.getElementById('stop').click()")
        page.until(lambda: page.one("#send").is_displayed())
        page.until(lambda: served.app.service.running == 0)

    def test_settings_and_a_schema(self, page: Page) -> None:
        page.choose("#model", "nano")
        page.click("#open-settings")
        page.one("[name=schema]").send_keys("{no json")
        page.press("Done", "#settings")
        assert "The schema is not JSON" in page.one("#schema-error").text
        page.one("[name=schema]").clear()
        page.one("[name=schema]").send_keys('{"enum": ["only this"]}')
        page.press("Done", "#settings")
        assert page.say("Anything?") == '"only this"'

    def test_a_picture_is_seen(self, page: Page) -> None:
        page.choose("#model", "nano-multimodal")
        page.run("document.getElementById('model').dispatchEvent(new Event('change'))")
        page.one("#pick").send_keys(str(PICTURE))
        page.until(lambda: page.all("#files img"))
        question = "What shape is it?"
        messages = [{"role": "user", "content": [
            {"type": "image", "image": PICTURE.read_bytes()}, {"type": "text", "text": question}
        ]}]  # fmt: skip
        expected = load("nano-multimodal").generate(messages, temperature=0).text
        page.click("#open-settings")
        page.one("[name=temperature]").send_keys("0")
        page.press("Done", "#settings")
        assert page.say(question) == expected
        assert page.all(".user .files img")

    def test_files_are_dropped_and_heard(self, page: Page) -> None:
        page.choose("#model", "nano-multimodal")
        page.run("document.getElementById('model').dispatchEvent(new Event('change'))")
        given = ((PICTURE, "image/png"), (CLIP, "audio/flac"))
        data = [base64.b64encode(file.read_bytes()).decode() for file, _ in given]
        page.run(
            DROP, *[[file.name, kind, each] for (file, kind), each in zip(given, data, strict=True)]
        )
        page.until(lambda: len(page.all("#files li")) == 2)
        assert [each.text.split("\n")[0] for each in page.all("#files li")] == [
            PICTURE.name, CLIP.name,
        ]  # fmt: skip
        page.all("#files button")[0].click()  # the picture is taken away again
        page.until(lambda: len(page.all("#files li")) == 1)
        page.click("#open-settings")
        page.one("[name=temperature]").send_keys("0")
        page.press("Done", "#settings")
        sound = [{"role": "user", "content": [{"type": "audio", "audio": CLIP.read_bytes()}]}]
        expected = load("nano-multimodal").generate(sound, temperature=0).text
        page.click("#send")
        assert page.reply() == expected

    def test_reasoning_is_folded_and_code_has_colours(self, page: Page, say: Say) -> None:
        page.choose("#model", "nano")
        say("<think>Two and three.</think>So:\n\n```python\nx = 5  # five\n```\n\nThat is $x^2$.")
        page.say("What is 2 plus 3?")
        thoughts = page.one(".assistant details.reasoning")
        assert not thoughts.get_attribute("open")
        assert page.one(".assistant details.reasoning div").text == ""  # folded
        thoughts.find_element(By.CSS_SELECTOR, "summary").click()
        assert page.one(".assistant details.reasoning div").text == "Two and three."
        colours = {each.text: each.get_attribute("class") for each in page.all(".assistant code *")}
        assert colours == {"5": "n", "# five": "c"}
        assert page.all(".assistant math msup")
        page.press("Copy", ".assistant figure")
        page.until(lambda: page.one(".assistant figure button").text == "Copied")

    def test_a_persona_and_an_adapter(self, page: Page, adapter: Path) -> None:
        page.choose("#persona", "clerk")
        chosen = {name: page.one(f"#settings [name={name}]").get_attribute("value")
                  for name in ("system", "temperature", "max_tokens")}  # fmt: skip
        assert chosen == {"system": "Be brief.", "temperature": "0", "max_tokens": "12"}
        assert page.one("#model").get_attribute("value") == "nano:mine"
        messages = [{"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "What is 2 plus 3?"}]  # fmt: skip
        phi = load("nano", adapter=adapter)
        expected = phi.generate(messages, temperature=0, max_tokens=12).tokens
        page.say("What is 2 plus 3?")
        assert page.one(".assistant .figures").text.startswith(f"{len(expected)} tokens")
        assert page.one(".assistant h3").text == "nano:mine"

    def test_conversations_are_found_and_deleted(self, page: Page) -> None:
        page.choose("#model", "nano")
        page.say("What is 1 plus 7?")
        page.one("body").send_keys(Keys.CONTROL, Keys.SHIFT, "o")
        page.until(lambda: not page.all(".message"))
        page.one("#search").send_keys("plus 7")
        page.until(lambda: page.run(TITLES) == ["What is 1 plus 7?"])
        page.one("#conversations [aria-label^=Delete]").click()
        page.driver.switch_to.alert.accept()
        page.until(lambda: page.run(TITLES) == [])

    def test_a_recording_is_made(self, page: Page) -> None:
        page.choose("#model", "nano-multimodal")
        page.run("document.getElementById('model').dispatchEvent(new Event('change'))")
        page.click("#record")
        page.until(lambda: page.one("#record").get_attribute("aria-pressed") == "true")
        page.until(lambda: page.run("return performance.now()") > 0)
        page.click("#record")
        page.until(lambda: page.all("#files li"))
        assert "recording.wav" in page.one("#files li").text

    def test_a_file_becomes_subtitles(self, page: Page) -> None:
        page.click("#open-transcribe")
        page.one("#transcribe [name=file]").send_keys(str(CLIP))
        page.press("Transcribe", "#transcribe")
        page.until(lambda: "-->" in page.one("#transcript").text)
        assert page.one("#save-transcript").get_attribute("download") == "speech-00.srt"

    def test_themes_keys_and_narrow_screens(self, page: Page) -> None:
        ground = "return getComputedStyle(document.body).backgroundColor"
        before = page.run(ground)
        page.click("#theme")
        assert page.run(ground) != before
        page.driver.set_window_size(420, 800)
        assert not page.one("#side").is_displayed()
        page.click("#menu")
        page.until(lambda: page.one("#side").is_displayed())
        page.one("body").send_keys(Keys.ESCAPE)
        page.until(lambda: not page.one("#side").is_displayed())
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")

    def test_everything_has_a_name(self, page: Page) -> None:
        unnamed = page.run(
            """return [...document.querySelectorAll('button, input, select, textarea')]
            .filter((each) => !each.textContent.trim() && !each.labels?.length
                && !each.ariaLabel && !each.hidden)
            .map((each) => each.outerHTML)"""
        )
        assert unnamed == []

    def test_a_key_is_asked_for(self, driver: webdriver.Chrome) -> None:
        page = Page(driver)
        with running("secret") as server:
            driver.get(f"{server.url}/")
            page.until(lambda: page.one("#key").is_displayed())
            page.one("#key input").send_keys("secret" + Keys.ENTER)
            page.until(lambda: page.all("#model option"))
            server.app.token = "once"
            page.run("sessionStorage.clear()")
            page.open(f"{server.url}/#token=once")
            assert page.all("#model option")
            assert "token" not in driver.current_url
        driver.get_log("browser")  # the 401, which the browser notes

    @pytest.mark.parametrize(
        ("text", "html"),
        [
            ("**a** _b_ `c`", "<p><strong>a</strong> <em>b</em> <code>c</code></p>"),
            ("<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>"),
            ("[x](javascript:alert(1))", "<p><span>x</span>)</p>"),
            ("- a\n- b\n\n1. c", '<ul><li>a</li><li>b</li></ul><ol start="1"><li>c</li></ol>'),
            ("# a\n---", "<h3>a</h3><hr>"),
            ("a $5 and $6", "<p>a $5 and $6</p>"),
            ("> q\n\nw", "<blockquote><p>q</p></blockquote><p>w</p>"),
            ("snake_case_name 2 * 3 * 4", "<p>snake_case_name 2 * 3 * 4</p>"),
        ],
    )
    def test_markdown_becomes_nodes(self, page: Page, text: str, html: str) -> None:
        script = """const [text, done] = arguments;
        import('/ui/page/markdown.js').then(({ Drawing }) => {
          const place = document.createElement('div');
          const drawing = new Drawing(place);
          for (let end = 0; end <= text.length; end += 1) drawing.draw(text.slice(0, end));
          done(place.innerHTML);
        });"""
        assert page.driver.execute_async_script(script, text) == html

    @pytest.mark.parametrize(
        ("tex", "text"),
        [
            (r"\frac{1}{2}", ["mfrac", "12"]),
            (r"x_i^2", ["msubsup", "xi2"]),
            (r"\sqrt[3]{x}", ["mroot", "x3"]),
            (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", ["mrow", "(1234)"]),
            (r"\unknown{a}", ["mrow", r"\unknowna"]),
            ("{" * 500, ["mtext", "{" * 500]),
        ],
    )
    def test_tex_becomes_mathml(self, page: Page, tex: str, text: list[str]) -> None:
        script = """const [tex, done] = arguments;
        import('/ui/page/math.js').then(({ renderMath }) => {
          const made = renderMath(tex, true).firstChild;
          done([made.tagName, made.textContent]);
        });"""
        assert page.driver.execute_async_script(script, tex) == text

"""The clinician page as a clinician meets it, in headless Chromium."""

import os
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from sqlalchemy import text

from medray.clinicians.database import open_database
from medray.clinicians.import_export import judgement_rows
from tests.serving.conftest import NASTY

pytestmark = pytest.mark.ray


def screenshot(browser, name):
    """Kept where MEDRAY_SCREENSHOTS says, to be looked at."""
    if os.environ.get("MEDRAY_SCREENSHOTS"):
        browser.save_screenshot(str(Path(os.environ["MEDRAY_SCREENSHOTS"]) / f"{name}.png"))


class Page:
    def __init__(self, browser, address):
        self.browser, self.address = browser, address

    def open(self, token):
        self.browser.execute_cdp_cmd("Network.clearBrowserCookies", {})
        self.browser.get(self.address)
        self.until(lambda: self.at("token").is_displayed())
        self.at("token").send_keys(token, Keys.ENTER)
        self.ready()

    def at(self, name):
        return self.browser.find_element(By.ID, name)

    def until(self, condition):
        return WebDriverWait(self.browser, 120).until(lambda _: condition())

    def ready(self):
        """An item with its image, or the end, and no request under way."""
        self.until(
            lambda: (
                self.at("done").is_displayed()
                or (
                    self.at("work").is_displayed()
                    and not self.at("save").get_attribute("disabled")
                    and self.image_shown()
                )
            )
        )

    def image_shown(self):
        return self.pixel(0.9) > 200  # the ramp's bright end; black until there is an image

    def pixel(self, across):
        """The red value in the middle of the canvas's height, `across` of the image's width from its left
        (view reset).

        Read in a frame, after what the page draws in it.
        """
        return self.browser.execute_async_script(
            """
            const [across, answer] = arguments;
            requestAnimationFrame(() => {
              const canvas = document.getElementById("view");
              const scale = Math.min(canvas.width / 256, canvas.height / 128);
              const x = (canvas.width - 256 * scale) / 2 + (Math.floor(across * 256) + 0.5) * scale;
              const middle = Math.floor(canvas.height / 2);
              answer(canvas.getContext("2d").getImageData(Math.floor(x), middle, 1, 1).data[0]);
            });""",
            across,
        )

    def press(self, *keys):
        for key in keys:
            self.browser.switch_to.active_element.send_keys(key)

    def question(self):
        return self.at("question-text").text

    def answers(self):
        return [
            box.find_element(By.CLASS_NAME, "shown").text
            for box in self.browser.find_elements(By.CSS_SELECTOR, "fieldset.answer")
        ]

    def progress(self):
        return self.at("progress-text").text

    def saved(self, *keys):
        """Press keys that end in the next item."""
        before = self.question()
        self.press(*keys)
        self.until(lambda: self.question() != before or self.at("done").is_displayed())
        self.ready()


@pytest.fixture
def page(browser, served):
    yield Page(browser, served[0])
    # Nothing may have been refused by the page's own policy, and no script may have failed.
    browser.switch_to.default_content()
    problems = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not problems, problems


def stored(url, clinician):
    engine = open_database(url)
    rows = {row["item_id"]: row for row in judgement_rows(engine) if row["clinician"] == clinician}
    engine.dispose()
    return rows


def test_a_session_with_the_keyboard_alone(page, served):
    page.open(served[2]["key"])
    assert page.progress() == "0 judged, 0 skipped, 12 left"
    screenshot(page.browser, "item")
    page.press(Keys.ENTER)
    # nothing is stored while an answer is not judged
    page.until(lambda: "each answer" in page.at("status").text)
    first_question, first_answers = page.question(), page.answers()
    page.saved("1", Keys.ENTER)  # only the first
    assert page.browser.switch_to.active_element == page.at("question-text")
    page.saved("3", Keys.ENTER)
    page.saved("s")
    page.saved("n")
    assert page.progress() == "3 judged, 1 skipped, 8 left"
    rows = stored(served[1], "key")
    assert sorted(row["status"] for row in rows.values()) == ["judged", "judged", "not_answerable", "skipped"]
    (sided,) = [row for row in rows.values() if row["status"] == "judged" and row["good_a"] != row["good_b"]]
    assert (sided["item_id"], first_question) == ("nasty?&#", "What is wrong here?")
    assert ("neutrophil" in first_answers[0]) == (sided["first_shown"] == "a") == sided["good_a"]
    assert 0 < sided["seconds"] < 600

    page.press("u")  # not answerable
    page.until(lambda: page.progress() == "2 judged, 1 skipped, 9 left")
    page.ready()
    page.press("u")  # skipped
    page.until(lambda: page.progress() == "2 judged, 0 skipped, 10 left")
    page.ready()
    page.saved("4", Keys.ENTER)
    assert page.progress() == "3 judged, 0 skipped, 9 left"
    assert (
        sum(row["good_a"] is False and row["good_b"] is False for row in stored(served[1], "key").values())
        == 1
    )

    # A key that is held down says nothing of the items that come next.
    held = (
        "return document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], "
        "repeat: true, bubbles: true, cancelable: true}))"
    )
    left_alone = {
        key: page.browser.execute_script(held, key) for key in ("1", "s", "n", "u", "e", "Enter", "+")
    }
    assert left_alone == dict.fromkeys(("1", "s", "n", "u", "e", "Enter"), True) | {"+": False}

    # In a text, keys write.
    page.press("e")
    page.press("n2s")
    assert page.browser.switch_to.active_element.tag_name == "textarea" and page.at("work").is_displayed()
    page.press(Keys.ESCAPE)
    assert page.browser.switch_to.active_element == page.at("question-text")
    page.press("u")  # asks, for there are edits; the answer is no
    page.until(lambda: _alert(page.browser))
    page.browser.switch_to.alert.dismiss()
    assert page.answers()[0].endswith("n2s") or page.answers()[0].startswith("n2s")
    page.press("3")
    page.press("?")
    assert page.at("help").is_displayed()
    screenshot(page.browser, "help")
    page.press(Keys.ESCAPE)
    page.saved(Keys.CONTROL + Keys.ENTER)
    assert (
        sum(
            "n2s" in ((row["edited_a"] or "") + (row["edited_b"] or ""))
            for row in stored(served[1], "key").values()
        )
        == 1
    )


def _alert(browser):
    from selenium.common.exceptions import NoAlertPresentException

    try:
        return browser.switch_to.alert
    except NoAlertPresentException:
        return None


def test_window_and_level_are_linear(page, served):
    """The image is a ramp, so what a grey value is shown as can be read off: (v - (level - window / 2)) /
    window * 255.
    """
    page.open(served[2]["ann"])
    assert abs(page.pixel(0.5) - 128) <= 1
    page.browser.execute_script("""
        for (const [name, value] of [["level", 100], ["width", 50]]) {
          const slider = document.getElementById(name);
          slider.value = value;
          slider.dispatchEvent(new Event("input"));
        }""")
    page.until(lambda: page.pixel(0.25) == 0)  # 64 is below 75
    assert abs(page.pixel(100 / 256) - 128) <= 6 and page.pixel(0.6) == 255
    assert abs(page.pixel(85 / 256) - 51) <= 6  # (85 - 75) / 50 * 255
    page.press("i")
    page.until(lambda: page.pixel(0.25) == 255)
    assert abs(page.pixel(85 / 256) - 204) <= 6
    screenshot(page.browser, "window")
    page.press("0")
    page.until(lambda: abs(page.pixel(0.25) - 64) <= 1)
    page.press("+", "+")
    page.until(lambda: page.at("zoom-text").text == "1.6×")
    # Zoomed by 25/16 about its middle: what was at the share s of the width is at 0.5 + (s - 0.5) * 25/16.
    assert abs(page.pixel(0.5 + (0.75 - 0.5) * 25 / 16) - 192) <= 2


def test_html_and_sql_in_texts_are_inert(page, served):
    page.open(served[2]["html"])
    assert page.at("caption").text == NASTY
    page.at("question").find_element(By.CLASS_NAME, "edit").click()
    page.press(NASTY)
    page.press(Keys.ESCAPE)
    screenshot(page.browser, "html")
    assert page.browser.title != "owned" and not page.browser.find_elements(
        By.CSS_SELECTOR, "main img, main script"
    )
    page.saved("1", Keys.ENTER)
    page.press("u")
    page.until(lambda: NASTY in page.question())  # what was stored comes back as it was
    assert page.browser.title != "owned" and not page.browser.find_elements(
        By.CSS_SELECTOR, "main img, main script"
    )
    page.ready()
    page.press("1", Keys.ENTER)
    page.ready()
    # Nor can a script that got into the page run, were there one.
    page.browser.execute_script("""
        const script = document.createElement("script");
        script.textContent = "document.title = 'owned'";
        document.body.append(script);""")
    assert page.browser.title != "owned"
    assert any("Content Security Policy" in entry["message"] for entry in page.browser.get_log("browser"))
    assert any(NASTY in (row["edited_question"] or "") for row in stored(served[1], "html").values())


def test_a_save_without_an_answer_is_stored_once(page, served):
    """The network goes away for the answer of a save that the server has stored; the clinician saves
    again.
    """
    page.open(served[2]["down"])
    question = page.question()
    page.browser.execute_script("""
        const real = window.fetch;
        window.fetch = async (path, request) => {
          const answer = await real(path, request);
          if (String(path).includes("judgements")) {
            window.fetch = real;
            throw new TypeError("the network is gone");
          }
          return answer;
        };""")
    page.press("1", Keys.ENTER)
    page.until(lambda: page.at("problem").is_displayed())
    assert "Nothing is lost" in page.at("problem-text").text and page.question() == question
    screenshot(page.browser, "problem")
    page.at("retry").click()
    page.until(lambda: page.question() != question)
    page.ready()
    assert page.progress() == "1 judged, 0 skipped, 11 left"
    engine = open_database(served[1])
    with engine.connect() as connection:
        assert (
            connection.execute(text("select count(*) from judgement where clinician = 'down'")).scalar() == 1
        )
    engine.dispose()


def test_signed_out_in_the_middle_of_an_item(page, served):
    """The cookie is gone when a clinician saves: they sign in again, and their ticks and edits are still
    there.
    """
    page.open(served[2]["eve"])
    question = page.question()
    page.at("second").find_element(By.CLASS_NAME, "edit").click()
    page.press("Corrected. ")
    page.press(Keys.ESCAPE)
    page.browser.delete_all_cookies()
    page.press("2", Keys.ENTER)
    page.until(lambda: page.at("token").is_displayed())
    page.press("no such token", Keys.ENTER)
    page.until(lambda: "not known" in page.at("problem-text").text)
    screenshot(page.browser, "signin")
    page.press(served[2]["eve"], Keys.ENTER)
    page.until(lambda: page.at("work").is_displayed())
    assert page.question() == question and "Corrected." in page.answers()[1]
    page.at("save").click()
    page.until(lambda: page.question() != question)
    page.ready()
    (row,) = stored(served[1], "eve").values()
    assert "Corrected." in ((row["edited_a"] or "") + (row["edited_b"] or ""))
    messages = [entry["message"] for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert len(messages) == 2 and all("401" in message for message in messages)


def test_on_a_tablet(page, served):
    """A screen of 820 x 1180 touched with fingers: nothing overflows, everything is large enough to hit,
    two fingers zoom.
    """
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 820, "height": 1180, "deviceScaleFactor": 2, "mobile": True},
    )
    page.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 5})
    try:
        page.open(served[2]["tab"])
        screenshot(page.browser, "tablet")
        wide, shown = page.browser.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert wide <= shown
        for element in page.browser.find_elements(By.CSS_SELECTOR, "button, .ticks label, input[type=range]"):
            if element.is_displayed():
                assert element.size["height"] >= 44 and element.size["width"] >= 44, element.get_attribute(
                    "outerHTML"
                )
        box = page.at("view").rect
        middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

        def touch(kind, *points):
            page.browser.execute_cdp_cmd(
                "Input.dispatchTouchEvent",
                {
                    "type": kind,
                    "touchPoints": [
                        {"x": middle[0] + dx, "y": middle[1], "id": number}
                        for number, dx in enumerate(points)
                    ],
                },
            )

        touch("touchStart", -50, 50)
        for apart in (60, 80, 100):
            touch("touchMove", -apart, apart)
        touch("touchEnd")
        # From 50 to 100 pixels apart, or to 80: the emulation may hold the last movement back until the next
        # frame.
        page.until(lambda: page.at("zoom-text").text in ("1.6×", "2.0×"))
        for side in ("first", "second"):
            label = page.at(side).find_element(By.CSS_SELECTOR, ".ticks label")
            page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", label)
            label.click()
        page.at("save").click()
        page.until(lambda: page.progress().startswith("1 judged"))
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_everything_has_a_name_and_enough_contrast(page, served):
    """Against the browser's own accessibility tree, and WCAG 2's 4.5 to 1 computed from the styles, in
    both colour schemes.
    """
    page.open(served[2]["ben"])
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    wanted = {"button", "radio", "slider", "textbox", "image", "group", "progressbar", "checkbox", "link"}
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in wanted
    ]
    assert len(named) >= 17 and all(name for _, name in named), named
    assert {name for role, name in named if role == "group"} >= {"Answer 1", "Answer 2"}
    for scheme in ("light", "dark"):
        page.browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        low = page.browser.execute_script(CONTRAST)
        assert low["checked"] > 25 and not low["low"], (scheme, low)
    screenshot(page.browser, "dark")
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# Relative luminance and contrast as WCAG 2.2 defines them, for every element that shows text of its own.
CONTRAST = r"""
const parts = (colour) => colour.match(/[\d.]+/g).map(Number);
const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
const light = (c) => { const [r, g, b] = c.map((v) => v / 255).map(linear);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const c = parts(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
const low = []; let checked = 0;
for (const e of document.querySelectorAll("body *")) {
  const texts = [...e.childNodes].filter((n) => n.nodeType === 3 && n.textContent.trim());
  if (!e.checkVisibility() || !texts.length) continue;
  const [a, b] = [parts(getComputedStyle(e).color), behind(e)].map(light);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  checked += 1;
  if (ratio < 4.5) low.push([e.tagName, e.textContent, ratio]);
}
return {checked, low};"""


def test_a_lead_sees_agreement_and_may_export(page, served, client):
    for name in ("kim", "mob"):
        with client(name) as http:
            for number in range(3):
                shown = http.get("/api/next").json()["item"]
                said = {
                    "item_id": shown["item_id"],
                    "save_key": f"{number:032x}",
                    "status": "judged",
                    "good_first": True,
                    "good_second": number == 0,
                }
                assert http.post("/api/judgements", json=said).json() == {"stored": True}
    page.open(served[2]["kim"])
    assert not page.at("study").is_displayed()
    page.open(served[2]["head"])
    page.at("study").find_element(By.TAG_NAME, "summary").click()
    page.until(lambda: "kim" in page.at("study-body").text)
    page.browser.execute_script("arguments[0].scrollIntoView()", page.at("study"))
    assert "kim, mob" in page.at("study-body").text and "Fleiss" in page.at("study-body").text
    screenshot(page.browser, "study")
    assert (
        page.browser.find_element(
            By.LINK_TEXT, "Download judgements, preference pairs and demonstrations (zip of Parquet files)"
        )
        .get_attribute("href")
        .endswith("/api/export")
    )

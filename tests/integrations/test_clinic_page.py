"""The clinic's page in a real browser: answers stream, visitors share one batch, each sees only their own questions."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integrations.test_clinic_assistant import ASSISTANT, LLAMA_INDEX, needs

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
GATED_PAGE = Path(__file__).with_name("gated_page.py")
PATIENCE = 200_000  # milliseconds; nothing here depends on it

pytestmark = [
    needs(*LLAMA_INDEX, "streamlit"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="not installed: playwright"),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH (Debian: apt-get install chromium)"),
]

# What a visitor asks, and the words and the leaflet of the answer: of those that the bundled model answers rightly.
VISITS = (
    ("Where is the night entrance?", "Tanner Lane", "night_entrance.txt"),
    ("How many chairs does the dialysis unit have?", "eighteen chairs", "dialysis.txt"),
    ("How many evenings does the diabetes course have?", "five evenings", "diabetes_course.pdf"),
    ("How does the bedside safe open?", "four digits", "admission_day.pdf"),
)
UNANSWERABLE = "How tall is the highest mountain of the country?"


@dataclass(frozen=True)
class Site:
    """The running page; see `gated_page.py` for what its folder is for."""

    address: str
    folder: Path

    @contextmanager
    def together(self, visitors: int) -> Iterator[None]:
        """Within it, answers begin when so many visitors have asked."""
        (self.folder / "together").write_text(str(visitors))
        yield
        (self.folder / "together").unlink()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    os.mkfifo(folder / "pipe")
    command = [sys.executable, "-m", "streamlit", "run", str(GATED_PAGE), "--server.headless", "true"]
    command += ["--server.address", "127.0.0.1", "--server.port", "0", "--", str(folder)]
    # From the example's folder, because its settings are found there.
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, cwd=ASSISTANT, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            address = next((line.split()[-1] for line in process.stdout if "URL:" in line), None)
            assert address, (folder / "log").read_text()
            yield Site(address, folder)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


def visit(context, address: str):
    """A new visitor's page, ready for a question."""
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    question_box(page).wait_for()
    page.wait_for_selector("[data-name=largest]")
    return page


def question_box(page):
    return page.locator("[data-testid=stChatInput] textarea")


def ask(page, question: str) -> None:
    question_box(page).fill(question)
    question_box(page).press("Enter")


def answer(page, number: int = 1):
    """What a visitor sees of an answer, once it is complete."""
    shown = page.locator("[data-testid=stChatMessage]").nth(2 * number - 1)
    shown.get_by_text("Prefix cache").wait_for()
    return shown


def wait_for_largest(page, least: int) -> None:
    page.wait_for_function(f"Number(document.querySelector('[data-name=largest] b').textContent) >= {least}")


def test_visitors_who_ask_at_once_are_answered_in_one_batch(browser, site):
    pages = [visit(browser.new_context(), site.address) for _ in VISITS]
    with site.together(len(VISITS)):
        for page, (question, _, _) in zip(pages, VISITS, strict=True):
            ask(page, question)
        shown = [answer(page) for page in pages]
    for page, text, (question, words, leaflet) in zip(pages, shown, VISITS, strict=True):
        assert words in text.inner_text()
        assert leaflet in text.inner_text()
        text.get_by_text("Source:").click()
        text.locator("mark").get_by_text(words).wait_for()
        assert page.locator(".history li a").all_inner_texts() == [question], "nobody sees what others ask"
        wait_for_largest(page, len(VISITS))
        blocks = page.locator("img[alt^='KV blocks']").get_attribute("alt")
        assert re.search(r"\d+ used, [1-9]\d* cached, \d+ free", blocks)
        page.context.close()


def test_answers_stream_while_others_go_on(browser, site):
    from tests.integrations.gated_page import HELD

    slow, other = (visit(browser.new_context(), site.address) for _ in range(2))
    ask(slow, HELD)
    shown = slow.locator("[data-testid=stChatMessage]").nth(1)
    shown.get_by_text(re.compile("^A full .*▌")).wait_for()
    assert "forty minutes" not in shown.inner_text(), "the end of the answer is still to come"
    ask(other, VISITS[0][0])
    assert VISITS[0][1] in answer(other).inner_text()
    (site.folder / "pipe").write_text("go on")
    assert "forty minutes" in answer(slow).inner_text()
    for page in (slow, other):
        page.context.close()


def test_an_answer_can_be_stopped(browser, site):
    from tests.integrations.gated_page import HELD

    page = visit(browser.new_context(), site.address)
    ask(page, HELD)
    page.get_by_text(re.compile("^A full .*▌")).wait_for()
    page.locator("[data-testid=stChatInput] button").click()
    page.wait_for_selector("[data-testid=stChatInput] textarea:enabled")
    (site.folder / "pipe").write_text("go on")
    ask(page, VISITS[0][0])
    assert VISITS[0][1] in answer(page, 2).inner_text()
    assert "Stopped before its end." in page.locator("[data-testid=stChatMessage]").nth(1).inner_text()
    page.wait_for_function("document.querySelector('.history li').textContent.endsWith('stopped')")
    page.context.close()


def test_what_the_leaflets_do_not_say_is_said(browser, site):
    page = visit(browser.new_context(), site.address)
    ask(page, UNANSWERABLE)
    shown = answer(page)
    assert "The leaflets do not say." in shown.inner_text()
    assert "I don't know." in shown.inner_text()
    assert "Source:" not in shown.inner_text()
    page.context.close()


def test_the_history_keeps_the_questions_and_can_be_forgotten(browser, site):
    page = visit(browser.new_context(), site.address)
    page.get_by_role("button", name=VISITS[0][0]).click()  # an example
    answer(page)
    ask(page, UNANSWERABLE)
    answer(page, 2)
    entries = page.locator(".history li")
    page.wait_for_function("document.querySelectorAll('.history li').length == 2")
    assert VISITS[0][0] in entries.nth(0).inner_text()
    assert "The Night Entrance" in entries.nth(0).inner_text()
    assert "not in the leaflets" in entries.nth(1).inner_text()
    assert VISITS[0][1] in answer(page, 1).inner_text(), "the first answer is still there"
    page.get_by_role("button", name="Forget them").click()
    page.get_by_text("For example:").wait_for()
    assert page.locator(".history li").count() == 0
    page.context.close()


def test_a_failure_is_told_in_plain_words(browser, site):
    from tests.integrations.gated_page import FAILING

    page = visit(browser.new_context(), site.address)
    ask(page, FAILING)
    page.get_by_text("Something went wrong. Please try again").wait_for()
    assert "machine room" not in page.locator("body").inner_text()
    ask(page, VISITS[0][0])
    assert VISITS[0][1] in answer(page, 2).inner_text()
    page.context.close()


def test_sixteen_visitors_are_answered_in_one_batch(browser, site):
    context = browser.new_context()
    pages = [visit(context, site.address) for _ in range(16)]
    asked = [VISITS[number % len(VISITS)] for number in range(16)]
    with site.together(16):
        for page, (question, _, _) in zip(pages, asked, strict=True):
            ask(page, question)
        for page, (_, words, _) in zip(pages, asked, strict=True):
            assert words in answer(page).inner_text()
    wait_for_largest(pages[0], 16)
    context.close()


def test_a_visitor_who_leaves_ends_the_request(settled):
    from assistant import ClinicAssistant
    from shared import SharedAssistant

    from pagedllm_core import list_engines

    shared = SharedAssistant(ClinicAssistant())
    stream = shared.stream(VISITS[0][0])
    assert next(part for part in stream if part)
    stream.close()
    assert all(map(settled, list_engines()))
    *_, reply = shared.stream(VISITS[0][0])
    assert VISITS[0][1] in reply.answer
    assert shared.stats().max_batch_size == 1


def test_what_goes_wrong_is_named_without_technical_terms():
    import page

    from pagedllm_core.errors import ContextLengthError, RequestTimeoutError

    assert "fewer words" in page.in_plain_words(ContextLengthError(9000, 2048))
    assert "took too long" in page.in_plain_words(RequestTimeoutError("timeout"))


def test_texts_are_shown_as_they_are():
    import page

    assert page.plain("5 $ and *no* [link](x)") == r"5 \$ and \*no\* \[link\]\(x\)"


def test_a_page_without_its_qdrant_server_says_so(monkeypatch):
    import page
    from streamlit.testing.v1 import AppTest

    monkeypatch.setattr(sys, "argv", ["page.py", "--qdrant", "http://127.0.0.1:9"])
    shown = AppTest.from_file(str(ASSISTANT / "page.py"), default_timeout=200).run()
    assert not shown.exception
    assert [error.value for error in shown.error] == [page.NOT_SEARCHABLE]

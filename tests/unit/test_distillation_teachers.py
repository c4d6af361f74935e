import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from chat_server import ChatServer, chat_server
from distillation_fixtures import distill_section, student_directory, tiny_tokenizer
from tiny_models import reference

from finescope.distillation import server_writer, teachers
from finescope.distillation.rewrite import PROMPT_TOO_LONG, select_first
from finescope.distillation.server_writer import ServerWriter
from finescope.distillation.teachers import Server, rewriter_of
from finescope.distillation.writer import Task, Written, document_seed
from finescope.errors import ModelError, ResourceError, StepFailed


@pytest.fixture(name="server")
def _server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.delenv(server_writer.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(server_writer, "_BACKOFF_SECONDS", 0.01)
    with chat_server() as server:
        yield server


def writer(server: ChatServer, temperature: float = 0.0, model: str = "teacher") -> ServerWriter:
    return ServerWriter(Server(server.url, model), temperature, 5)


def tasks(*texts: str, budget: int = 10) -> list[Task]:
    return [Task(f"doc-{index}", text, budget) for index, text in enumerate(texts)]


def silent(amount: int) -> None:
    pass


def test_answers_are_in_order_and_a_budget_that_ran_out_is_not_finished(server: ChatServer) -> None:
    told: list[int] = []
    found = writer(server)(tasks("one two", "a b c d", "", "x" * 1001, budget=3), told.append)
    assert found == [Written("one two", True), Written("a b c", False), Written("", True), None]
    assert sum(told) == 4
    body = next(body for body in server.asked if body["messages"][0]["content"] == "one two")
    assert body == {
        "model": "teacher",
        "messages": [{"role": "user", "content": "one two"}],
        "max_tokens": 3,
        "temperature": 0.0,
    }


def test_sampling_has_the_documents_seed(server: ChatServer) -> None:
    writer(server, 0.7)(tasks("one"), silent)
    assert (server.asked[0]["temperature"], server.asked[0]["seed"]) == (0.7, document_seed(5, "doc-0"))


def test_several_requests_are_in_flight(server: ChatServer) -> None:
    # None is answered before four are there.
    server.barrier = threading.Barrier(4)
    assert len(writer(server)(tasks("a", "b", "c", "d"), silent)) == 4


@pytest.mark.parametrize("failures", [[500, 503, 429], [429], [502, 504]])
def test_a_server_that_is_busy_for_a_while_is_asked_again(server: ChatServer, failures: list[int]) -> None:
    server.failures = list(failures)
    assert writer(server)(tasks("one"), silent) == [Written("one", True)]
    assert len(server.asked) == len(failures) + 1


def test_a_server_that_stays_broken_fails_the_step(server: ChatServer) -> None:
    server.failures = [503] * 100
    with pytest.raises(StepFailed, match=rf"{server.url}/chat/completions.*answered 503: .*for a while.*after 9 attempts"):
        writer(server)(tasks("one"), silent)
    assert len(server.asked) == 9


def test_a_server_that_is_not_there_fails_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_writer, "_BACKOFF_SECONDS", 0.01)
    with socket.socket() as taken:
        # Bound and not listening: nobody else gets the port, and connections are refused.
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(StepFailed, match=f"{url}/chat/completions cannot be reached"):
            ServerWriter(Server(url, "teacher"), 0.0, 0)(tasks("one"), silent)


def test_the_key_comes_from_the_environment_and_a_wrong_one_is_the_users_error(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "right"
    for key in (None, "wrong"):
        if key is not None:
            monkeypatch.setenv(server_writer.KEY_VARIABLE, key)
        with pytest.raises(ModelError, match=r"answered 401: .*Incorrect API key.*FINESCOPE_TEACHER_API_KEY"):
            writer(server)(tasks("one"), silent)
    monkeypatch.setenv(server_writer.KEY_VARIABLE, "right")
    assert writer(server)(tasks("one"), silent) == [Written("one", True)]
    assert server.authorization == [None, "Bearer wrong", "Bearer right"]


def test_no_other_secret_of_the_user_is_sent(server: ChatServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    writer(server)(tasks("one"), silent)
    assert server.authorization == [None]


def test_a_model_that_is_not_served_is_the_users_error(server: ChatServer) -> None:
    with pytest.raises(ModelError, match=rf"{server.url}/chat/completions, model 'other', answered 404: .*does not exist"):
        writer(server, model="other")(tasks("one"), silent)


def test_another_protocol_is_the_users_error(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "answer", lambda *_: (200, {"text": "hello"}))
    with pytest.raises(ModelError, match=r"answered 200: .*hello.*expected a chat completion"):
        writer(server)(tasks("one"), silent)


def documents() -> pa.Table:
    rows = {"doc_id": ["a", "b"], "prompt": ["Say it.", "p" * 3000], "response": ["It is said.", "It is not."]}
    return select_first(pa.table(rows), 1.0)


def test_a_rewriter_over_a_server(server: ChatServer, tmp_path: Path) -> None:
    tokenizer = reference(Path(student_directory(tmp_path / "student")))
    rewriter = rewriter_of(Server(server.url, "teacher"), tokenizer, distill_section(rewrite_tokens=20), 100)
    table = rewriter(documents(), silent)
    # The server says the request again, as far as the budget goes.
    assert table.column("reason").to_pylist() == ["cut off before its end", PROMPT_TOO_LONG]
    messages = [body["messages"][0]["content"] for body in server.asked]
    assert any(message.endswith("### Reference response:\nIt is said.") for message in messages)


@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_a_rewriter_over_a_model(tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a GPU without vLLM, and of vLLM without a GPU, no use is made.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(teachers.importlib.util, "find_spec", lambda name: object())
    model = reference(Path(student_directory(tmp_path / "student")))
    section = distill_section(rewrite_tokens=20, rewrite_engine=engine, rewrite_temperature=0.5)
    once, again = (rewriter_of(model, model, section, 100)(documents(), silent) for _ in range(2))
    assert once.equals(again)
    assert once.column("reason").to_pylist()[1] == PROMPT_TOO_LONG


def test_vllm_that_is_not_there_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers.importlib.util, "find_spec", lambda name: None)
    model = reference(Path(student_directory(tmp_path / "student")))
    with pytest.raises(ResourceError, match=r"distill.rewrite_engine: vllm .*finescope\[vllm\]"):
        rewriter_of(model, model, distill_section(rewrite_engine="vllm"), 100)


@pytest.mark.parametrize("engine", ["auto", "vllm"])
def test_vllm_that_is_there_is_given_tokens_budgets_and_seeds(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Engine:
        """As far as it is used."""

        llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=512))

        def __init__(self, **settings):
            asked.append(settings)

        def generate(self, prompts, settings, use_tqdm):
            asked.extend(zip(prompts, settings, strict=True))
            words = [([*tokenizer.encode("It was said."), 2], "stop"), (tokenizer.encode("It was"), "length")]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason=why)]) for ids, why in words]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=dict))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(teachers.importlib.util, "find_spec", lambda name: object())
    tokenizer = tiny_tokenizer()
    model = reference(Path(student_directory(tmp_path / "student")))
    section = distill_section(rewrite_tokens=20, rewrite_engine=engine, rewrite_temperature=0.5, seed=3)
    two = select_first(
        pa.table({"doc_id": ["a", "b"], "prompt": ["Say it.", None], "response": ["It is said.", "It is not."]}), 1.0
    )
    table = rewriter_of(model, model, section, 100)(two, silent)
    assert table.column("reason").to_pylist() == ["", "cut off before its end"]
    assert table.column("response").to_pylist() == ["It was said.", "It is not."]
    settings, (first, parameters), _ = asked
    assert (settings["model"], settings["dtype"]) == (model.path, "float32")
    assert tokenizer.decode(first["prompt_token_ids"]).startswith("<s>user\nBelow are an instruction")
    assert (parameters["temperature"], parameters["seed"]) == (0.5, document_seed(3, "a"))
    assert parameters["max_tokens"] == 20


def test_a_teacher_of_another_tokenizer_is_given_its_own_tokens(tmp_path: Path) -> None:
    student, teacher = (Path(student_directory(tmp_path / name)) for name in ("student", "teacher"))
    tiny_tokenizer(chat=False).save_pretrained(teacher)
    (teacher / "chat_template.jinja").unlink()
    section = distill_section(rewrite_tokens=20)
    rewriter = rewriter_of(reference(teacher), reference(student), section, 100)
    assert rewriter._writer()._tokenizer.chat_template is None
    assert rewriter._tokenizer.chat_template is not None

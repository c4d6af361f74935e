"""A writer behind a server that speaks OpenAI's protocol: vLLM, llama.cpp, TGI, or a vendor's.

By `requests` and not by the client of `huggingface_hub`: that one sends the hub's token where no key is given, and sends nothing
under HF_HUB_OFFLINE.
"""

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import requests
from pydantic import BaseModel, ValidationError
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from finescope.distillation.writer import Task, Written, document_seed
from finescope.errors import ModelError, StepFailed

KEY_VARIABLE = "FINESCOPE_TEACHER_API_KEY"
_IN_FLIGHT = 16  # requests at once; a server batches them by itself
_RETRIES, _BACKOFF_SECONDS = 8, 0.5  # 0, 1, 2, 4 ... 64 seconds, or what the server's Retry-After says
_BUSY = (429, 500, 502, 503, 504)
_CONNECT_SECONDS, _ANSWER_SECONDS = 10, 600
# "maximum context length", "context_length_exceeded", "exceeds the available context size": of vLLM, OpenAI, llama.cpp.
_TOO_LONG = re.compile(r"context[ _](?:length|size|window)", re.IGNORECASE)


@dataclass(frozen=True)
class Server:
    """Where a teacher is served, and under which name."""

    url: str  # http(s)://HOST/v1
    model: str


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice]


class ServerWriter:
    """Asks for one chat completion a task, several at a time; the chat template is the server's."""

    def __init__(self, server: Server, temperature: float, seed: int) -> None:
        self._server, self._temperature, self._seed = server, temperature, seed
        self._url = f"{server.url.rstrip('/')}/chat/completions"
        self._session = requests.Session()
        self._session.auth = _with_key
        retry = Retry(
            total=_RETRIES,
            backoff_factor=_BACKOFF_SECONDS,
            status_forcelist=_BUSY,
            # A completion may be asked for twice.
            allowed_methods=None,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=_IN_FLIGHT))

    def __call__(self, tasks: Sequence[Task], progress: Callable[[int], Any]) -> list[Written | None]:
        """As in `Writer`.

        Raises:
            ModelError: the server refuses the request: a wrong key, a model that it does not have, another protocol.
            StepFailed: it cannot be reached, or is still busy or broken after several attempts.
        """
        answers: list[Written | None] = []
        with ThreadPoolExecutor(_IN_FLIGHT) as pool:
            for answer in pool.map(self._ask, tasks):
                answers.append(answer)
                progress(1)
        return answers

    def _ask(self, task: Task) -> Written | None:
        sampling: dict[str, Any] = {"temperature": self._temperature}
        if self._temperature:
            sampling["seed"] = document_seed(self._seed, task.doc_id)
        messages = [{"role": "user", "content": task.message}]
        body = {"model": self._server.model, "messages": messages, "max_tokens": task.budget, **sampling}
        try:
            response = self._session.post(
                self._url, json=body, timeout=(_CONNECT_SECONDS, _ANSWER_SECONDS), allow_redirects=False
            )
        except requests.RequestException as error:
            raise StepFailed(f"distill.teacher: {self._url} cannot be reached: {error}") from error
        if response.status_code in _BUSY:
            raise StepFailed(f"{self._said(response)} after {_RETRIES + 1} attempts")
        if response.status_code == 400 and _TOO_LONG.search(response.text):
            return None
        if response.status_code != 200:
            raise ModelError(
                f"{self._said(response)}; expected a URL that ends in /v1, a model that is served there, "
                f"and the key, where one is asked for, in the environment variable {KEY_VARIABLE}"
            )
        try:
            choice = _Completion.model_validate_json(response.content).choices[0]
        except (ValidationError, IndexError) as error:
            raise ModelError(f"{self._said(response)}; expected a chat completion of OpenAI's protocol") from error
        return Written(choice.message.content or "", choice.finish_reason != "length")

    def _said(self, response: requests.Response) -> str:
        text = " ".join(response.text.split())[:300]
        return f"distill.teacher: {self._url}, model '{self._server.model}', answered {response.status_code}: {text}"


def _with_key(request: requests.PreparedRequest) -> requests.PreparedRequest:
    # As `auth`, since a header alone would give way to what ~/.netrc has for the host.
    if key := os.environ.get(KEY_VARIABLE):
        request.headers["Authorization"] = f"Bearer {key}"
    return request

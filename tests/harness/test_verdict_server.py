"""An OpenAI-compatible server as a side: what is asked, and every way in which one may answer badly."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from harness.cli import app
from harness.errors import UsageError
from harness.verdict.server import Server, origin
from harness.verdict.streams import StreamError, StreamInfo, read_stream
from reports.records import read_report

Answer = Callable[["Fake", str, dict[str, Any]], Any]
"""(handler, path, body) -> JSON, or None where the handler has answered itself."""
KEY = "sk-very-secret"


def logprob(before: list[int], token_id: int, off: float = 0.0) -> float:
    """A made-up model: any function of what came before."""
    return -1.0 - ((31 * sum(before) + 7 * token_id) % 97) / 10 - off


def choice(ids: list[int], body: dict[str, Any], index: int, off: float) -> dict[str, Any]:
    values = [None if not at else logprob(ids[:at], ids[at], off) for at in range(len(ids))]
    if body.get("return_token_ids"):
        new = [(ids[-1] + number) % 50 for number in range(body["max_tokens"])]
        own = [logprob([*ids, *new[:at]], new[at], off) for at in range(len(new))]
        best = [{f"token_id:{token_id}": value, "token_id:49": 0.0} for token_id, value in zip(new, own, strict=True)]
        return {"index": index, "token_ids": new, "prompt_token_ids": ids, "prompt_logprobs": None,
                "logprobs": {"token_logprobs": own, "top_logprobs": best, "tokens": [f"token_id:{token_id}" for token_id in new]}}
    if body.get("echo"):
        return {"index": index, "logprobs": {"token_logprobs": values}}
    rows = [None if value is None else {str(token_id): {"logprob": value}} for token_id, value in zip(ids, values, strict=True)]
    return {"index": index, "text": "", "prompt_logprobs": rows}


def good(off: float = 0.0, *, knows_prompt_logprobs: bool = True) -> Answer:
    def answer(handler: Fake, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "tiny"}]}
        if not knows_prompt_logprobs:
            body.pop("prompt_logprobs", None)
            if not body.get("echo") and not body.get("return_token_ids"):
                return {"choices": [{"index": at, "text": "text"} for at in range(len(body["prompt"]))]}
        return {"choices": [choice(ids, body, at, off) for at, ids in enumerate(body["prompt"])][::-1]}

    return answer


class Fake(BaseHTTPRequestHandler):
    """Answers as its server's ``answer`` says, and notes what was asked."""

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict[str, Any]) -> None:
        server: Any = self.server
        server.asked.append((self.path, body, dict(self.headers)))
        found = server.answer(self, self.path.partition("?")[0], body)
        if found is not None:
            self.say(200, json.dumps(found).encode())

    def say(self, code: int, content: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(answer: Answer) -> Iterator[tuple[str, list[Any]]]:
    """(address, what was asked)"""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    server.daemon_threads, server.answer, server.asked = True, answer, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("knows", [True, False])
def test_prompts_are_sent_as_token_ids_together_and_come_back_in_order(knows: bool) -> None:
    batch = [(1, 2, 3), (4, 5)]
    with serving(good(knows_prompt_logprobs=knows)) as (url, asked):
        found = Server(url).score(batch, num_top=2)
    for ids, scored in zip(batch, found, strict=True):
        assert scored.token_ids == ids
        assert scored.logprobs == (None, *(logprob(list(ids[:at]), ids[at]) for at in range(1, len(ids))))
        assert scored.batch_size == 2
    path, body, _ = asked[-1]
    assert (path, body["prompt"], body["model"]) == ("/v1/completions", [[1, 2, 3], [4, 5]], "tiny")


def test_generated_tokens_come_with_their_ids(tmp_path: Path) -> None:
    with serving(good()) as (url, _):
        (found,) = Server(f"{url}/v1/").generate([(1, 2)], 3, num_top=0, seed=5)
    assert found.token_ids == (1, 2, 2, 3, 4)
    assert found.decoded_from == 2
    assert found.logprobs[:2] == (None, None)
    assert None not in found.logprobs[2:]
    assert found.top == ({}, {}, *({token_id: value, 49: 0.0} for token_id, value in
                                   zip(found.token_ids[2:], found.logprobs[2:], strict=True)))


@pytest.mark.parametrize("best", [None, [{"a": -1.0}] * 3, [{"token_id:1": -1.0}], "text"], ids=str)
def test_best_tokens_that_are_told_by_their_texts_or_not_for_each_place_are_left_out(best: Any) -> None:
    """The ids of the generated tokens are there all the same."""
    told = say(token_ids=[3, 4, 5], logprobs={"token_logprobs": [-1.0, -2.0, -3.0], "top_logprobs": best})
    with serving(told) as (url, _):
        (found,) = Server(url).generate([(1, 2)], 3, num_top=2, seed=0)
    assert (found.token_ids, found.top) == ((1, 2, 3, 4, 5), ())


def test_two_servers_are_compared_with_one_command_and_no_key_or_query_is_kept(tmp_path: Path,
                                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    common = ("--dtype", "bfloat16", "--key-env", "MY_KEY", "--generate", "4", "--out", tmp_path)
    with serving(good()) as (one, asked), serving(good(off=1.5)) as (other, _):
        monkeypatch.setattr("sys.argv", ["shardproof", "verdict", f"{one}/?user=me", other])
        result = run("verdict", f"{one}/?user=me", other, *common)
        assert result.exit_code == 1, result.output
        assert run("verdict", one, one, *common).exit_code == 0
        assert "would replace a file" in run("verdict", tmp_path / "B.jsonl", other, *common).stderr
    for name in ("A", "B"):  # what was answered is there, whatever comes next
        info = StreamInfo(source=f"{one}/v1, tiny", model="tiny", dtype="bfloat16")
        assert read_stream(tmp_path / f"{name}.jsonl").info == info
    assert run("verdict", tmp_path / "A.jsonl", tmp_path / "B.jsonl", "--out", tmp_path).exit_code == 0
    assert {headers["Authorization"] for _, _, headers in asked} == {f"Bearer {KEY}"}
    assert all(path in ("/v1/models?user=me", "/v1/completions?user=me", "/v1/models", "/v1/completions") for path, _, _ in asked)
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert KEY not in text
        assert "user=me" not in text
    row = read_report(tmp_path).verdict
    assert row is not None
    assert "decode steps" in row.comparison
    assert row.a == f"{one}/v1, tiny"


def refuse(code: int, content: bytes, **headers: str) -> Answer:
    def answer(handler: Fake, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": "tiny"}]}
        handler.say(code, content, **headers)
        return None

    return answer


def say(**changes: Any) -> Answer:
    """The good answer with other choices."""
    def answer(handler: Fake, path: str, body: dict[str, Any]) -> Any:
        found = good()(handler, path, body)
        for one in found.get("choices", ()):
            one.update(changes)
        return found

    return answer


def endless(handler: Fake, path: str, body: dict[str, Any]) -> Any:
    if path == "/v1/models":
        return {"data": [{"id": "tiny"}]}
    handler.send_response(200)
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" " * 64)
            time.sleep(0.02)
    except OSError:
        return None


def slow(handler: Fake, path: str, body: dict[str, Any]) -> Any:
    if path != "/v1/models":
        time.sleep(1.0)
    return good()(handler, path, body)


ONE = {"logprob": -1.0}
BAD: dict[str, tuple[Answer, str]] = {
    "redirect": (refuse(302, b"", Location="http://elsewhere.invalid/v1/completions"), r"redirects elsewhere \(302\)"),
    "no such model": (refuse(404, b'{"error": {"message": "no such model"}}'), "answers 404 Not Found: no such model"),
    "unauthorised": (refuse(401, f'{{"error": "bad key {KEY}"}}'.encode()), "answers 401 Unauthorized: bad key …"),
    "overloaded": (refuse(503, b"busy"), "answers 503"),
    "no JSON": (refuse(200, b"<html>hello</html>"), "something else than JSON"),
    "a list": (refuse(200, b"[]"), "JSON that is no object"),
    "no choices": (refuse(200, b"{}"), "returns no choices"),
    "text alone": (say(prompt_logprobs=None, logprobs=None, text="hello"), "text alone can't be compared"),
    "another token": (say(prompt_logprobs=[None, {"77": ONE}, {"3": ONE}]), "without token id 2 itself"),
    "tokens added": (say(prompt_logprobs=[None, *({"1": ONE} for _ in range(5))]), "6 prompt_logprobs for 3 tokens"),
    "no object": (say(prompt_logprobs=[None, [1], [2]]), "no object from token id to logprob"),
    "NaN": (say(prompt_logprobs=[None, {"2": {"logprob": math.nan}}, {"3": ONE}]), r"logprobs\[1\]=nan"),
    "minus infinity": (say(prompt_logprobs=[None, {"2": {"logprob": -9999.0}}, {"3": ONE}]), "minus infinity"),
    "endless": (endless, "did not answer within 0.3 s"),
    "slow": (slow, "did not answer within 0.3 s"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_server_that_answers_badly_is_told_in_a_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    answer, says = BAD[kind]
    timeout_s = 0.3 if "0.3 s" in says else 30.0
    with serving(answer) as (url, _), pytest.raises(StreamError, match=says) as caught:
        Server(url, key_env="MY_KEY", timeout_s=timeout_s, retries_s=()).score([(1, 2, 3)], num_top=2)
    assert KEY not in str(caught.value)


def test_generation_as_text_alone_is_refused() -> None:
    with serving(say(token_ids=None, logprobs=None, text="hello")) as (url, _), pytest.raises(StreamError, match="text alone"):
        Server(url).generate([(1, 2)], 3, num_top=0, seed=0)


def test_a_key_is_never_sent_after_a_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(good()) as (elsewhere, asked):
        with serving(refuse(307, b"", Location=f"{elsewhere}/v1/completions")) as (url, _), pytest.raises(StreamError):
            Server(url, key_env="MY_KEY", retries_s=()).score([(1, 2)], num_top=0)
        assert asked == []


def test_a_server_that_is_busy_once_is_asked_again() -> None:
    times: list[str] = []

    def answer(handler: Fake, path: str, body: dict[str, Any]) -> Any:
        times.append(path)
        if len(times) == 2:
            handler.say(503, b"")
            return None
        return good()(handler, path, body)

    with serving(answer) as (url, _):
        assert len(Server(url, retries_s=(0.01,)).score([(1, 2)], num_top=0)) == 1


def test_a_server_that_is_down_and_one_with_two_models_are_told() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(StreamError, match="can't be reached"):
            Server(url, retries_s=())
    with serving(lambda handler, path, body: {"data": [{"id": "one"}, {"id": "two"}]}) as (url, _):
        with pytest.raises(StreamError, match="serves 2 models: one, two: name one by --model"):
            Server(url)
        assert Server(url, model="two").model == "two"


@pytest.mark.parametrize(("url", "says"), [
    ("http://me:secret@host", "has a user in it"), ("http://", "a server's address is"),
    ("http://host:x", "a server's address is"),
])
def test_an_address_that_can_not_be_is_refused_without_showing_it(url: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        Server(url)
    assert "secret" not in str(caught.value)


def test_a_key_that_is_not_set_is_refused_by_its_name() -> None:
    with pytest.raises(UsageError, match="key_env='NO_SUCH_KEY'"):
        Server("http://127.0.0.1:9", key_env="NO_SUCH_KEY")


def test_what_may_be_shown_of_an_address() -> None:
    assert origin("https://me:secret@host:8000/v1/?key=secret#x") == "https://host:8000/v1"
    assert origin("http://[::1]:80/a") == "http://[::1]:80/a"


def test_collect_keeps_what_came_before_a_failure_and_goes_on_from_it(tmp_path: Path) -> None:
    path = tmp_path / "logprobs.jsonl"
    words = ("collect", "--count", "9", "--longest", "12", "--batch-sizes", "2,1", "--timeout", "5", "--out", path)

    def breaks(handler: Fake, where: str, body: dict[str, Any]) -> Any:
        if len(handler.server.asked) > 3:  # type: ignore[attr-defined]
            handler.say(400, b'{"message": "out of memory"}')
            return None
        return good()(handler, where, body)

    with serving(breaks) as (url, asked):
        result = run(*words, "--resume", url)
        assert result.exit_code == 3, result.output
        assert "out of memory" in result.stderr
        assert len(read_stream(path).sequences) == 3
        asked[:] = []
        result = run(*words, url)
        assert (result.exit_code, "--resume" in result.stderr) == (2, True)
        result = run(*words, "--resume", url)
        assert result.exit_code == 3
        assert len(read_stream(path).sequences) == 6
        handler_is_fine = good()
        asked[:] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{__name__}.Fake._answer", lambda self, body: self.say(200, json.dumps(
                handler_is_fine(self, self.path, body)).encode()))
            result = run(*words, "--resume", url)
    assert (result.exit_code, result.stdout) == (0, f"9 sequences in {path}\n"), result.output
    assert {one.batch_size for one in read_stream(path).sequences} == {1, 2}


def test_collect_of_prompts_from_a_file_and_of_what_is_a_file_already(tmp_path: Path) -> None:
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "logprobs.jsonl"
    prompts.write_text("[1, 2, 3]\n\n[4, 5]\n")
    with serving(good()) as (url, _):
        assert run("collect", url, "--prompts", prompts, "--out", path, "--quiet").exit_code == 0
        assert [one.token_ids for one in read_stream(path).sequences] == [(1, 2, 3), (4, 5)]
        assert run("collect", url, "--generate", "2", "--prompts", prompts, "--out", tmp_path / "g.jsonl").exit_code == 0
        assert read_stream(tmp_path / "g.jsonl").sequences[0].decoded_from == 3
        prompts.write_text("[1, 2, 3]\n[1, 2, 3]\n")
        assert "twice" in run("collect", url, "--prompts", prompts, "--out", tmp_path / "x.jsonl").stderr
        prompts.write_text('["text"]\n')
        assert "line 1: must be a list" in run("collect", url, "--prompts", prompts, "--out", tmp_path / "x.jsonl").stderr
    assert "is a file already" in run("collect", path, "--out", tmp_path / "x.jsonl").stderr

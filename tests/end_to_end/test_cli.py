"""The command line as a user types it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RunningServer
from quire import LLM, SamplingParams
from quire.cli import batch
from quire.cli.batch import run_batch
from quire.cli.batch_lines import Line
from quire.cli.main import main
from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter, ServerError

Make = Callable[[str], Path]


def quire(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quire.cli.main", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=240, check=False)


def within(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """In this process, which has imported already what a command needs: its status, output and errors."""
    capsys.readouterr()
    code = main(arguments)
    return code, *capsys.readouterr()


_SWALLOWING = """
import os, signal, sys, time
from quire.cli.main import main

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "quire_cluster.serve":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except BaseException:
                pass

sys.meta_path.insert(0, Finder())
sys.exit(main(["serve", "/no/model"]))
"""


def test_an_interrupt_while_modules_are_imported_is_not_lost() -> None:
    """Some of them catch whatever is raised in them."""
    done = subprocess.run([sys.executable, "-c", _SWALLOWING], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_run_batch(checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(checkpoint("qwen3"))
    chat = {"messages": [{"role": "user", "content": "w5 w17"}], "temperature": 0, "max_tokens": 9, "model": "m"}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": [5, 6], "n": 2, "seed": 1}},
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": chat | {"temperature": -1}},
        {"custom_id": "d", "method": "POST", "url": "/v1/embeddings", "body": {}},
        {"custom_id": "e", "method": "POST", "url": "/v1/completions", "body": {"prompt": [5] * 600}},
        {"custom_id": "f", "method": "POST", "url": "/v1/chat/completions", "body": chat | {"stream": True}},
        {"custom_id": "g", "method": "POST", "url": "/v1/completions", "body": {"prompt": [5], "logprobs": 0}},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\ufeff" + "\n".join(json.dumps(line) for line in lines) + "\n\nnot json\n")
    done = quire("run-batch", str(source), "-o", str(target), "--model", folder)
    assert done.returncode == 0, done.stderr
    assert "2 of 8 requests done" in done.stderr
    assert "Requests: 100%" in done.stderr
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert [result["custom_id"] for result in results] == ["a", "b", "c", "d", "e", "f", "g", "line-9"]
    assert [result["response"]["status_code"] for result in results] == [200, 200, 400, 400, 400, 400, 400, 400]
    with LLM(folder) as llm:
        [truth] = llm.generate("w5 w17", SamplingParams(temperature=0, max_tokens=9), use_tqdm=False)
    body = results[0]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == truth.outputs[0].text
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11}
    assert len(results[1]["response"]["body"]["choices"]) == 2
    assert results[2]["response"]["body"]["error"]["param"] == "temperature"
    stopped = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(stopped[:2]) + stopped[2][:40])
    code, _, errors = within(capsys, "run-batch", str(source), "-o", str(target), "--model", folder)
    assert code == 0, errors
    assert "0 of 6 requests done (2 had results already)" in errors
    assert target.read_bytes().splitlines(keepends=True)[:2] == stopped[:2]
    assert [json.loads(line)["custom_id"] for line in target.read_text().splitlines()] == [
        result["custom_id"] for result in results
    ]


def test_run_batch_says_before_it_works_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, other = tmp_path / "in.jsonl", tmp_path / "notes.txt"
    source.write_text('{"url": "/v1/completions", "body": {"prompt": [5]}}')
    other.write_text("my notes\n")
    for read, target, message in (
        (tmp_path / "none.jsonl", tmp_path / "out", "cannot be read"),
        (source, tmp_path / "nowhere/out", f"quire: {tmp_path}/nowhere/out cannot be written: "),
        (source, tmp_path, f"quire: {tmp_path} cannot be written: "),
        (source, source / "out", f"quire: {source}/out cannot be written: "),
        (source, other, "no result"),
    ):
        code, _, errors = within(
            capsys, "run-batch", str(read), "-o", str(target), "--model", "/no/model/is/looked/for"
        )
        assert code == 1
        assert message in errors
    assert other.read_text() == "my notes\n"


@pytest.mark.parametrize(
    "content", [b"my notes", b'{"id":"batch_results"}', b'{"custom_id": "a", "url": "u", "body": {}}', b"5", b"5\n"]
)
def test_run_batch_writes_into_nothing_but_its_own_results(tmp_path: Path, content: bytes) -> None:
    """Whether it ends with a line's end or not, and be it the input itself."""
    source, target = tmp_path / "in.jsonl", tmp_path / "precious"
    source.write_bytes(content)
    target.write_bytes(content)
    for output in (source, target):
        with pytest.raises(InvalidParameter, match=r"line 1 of .* is no result of a batch; name another output file"):
            run_batch(
                EngineConfig(model="/no/model/is/looked/for"), str(target if output is source else source), str(output)
            )
        assert output.read_bytes() == content


def test_run_batch_writes_to_what_is_no_file(checkpoint: Make, tmp_path: Path) -> None:
    source, config = tmp_path / "in.jsonl", EngineConfig(model=str(checkpoint("qwen3")))
    source.write_text('{"custom_id": "a", "url": "/v1/completions", "body": {"prompt": [5], "max_tokens": 1}}')
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as results:
        run_batch(config, str(source), f"/dev/fd/{writing}")
        os.close(writing)
        assert [json.loads(line)["response"]["status_code"] for line in results] == [200]
    run_batch(config, str(source), os.devnull)
    with pytest.raises(ServerError, match="/dev/full cannot be written: No space left on device"):
        run_batch(config, str(source), "/dev/full")


def test_a_batch_that_is_killed_keeps_what_it_has(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are in the file as soon as they are there, and are not computed again."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"custom_id": f"{n}", "url": "/v1/completions", "body": {"prompt": [5], "max_tokens": 1}} for n in range(5)
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    config = EngineConfig(model=str(checkpoint("qwen3")), max_model_len=64)
    plain, run = batch._run, list[str]()

    def counting(llm: LLM, share: list[Line]) -> None:
        if len(run) == 4:
            written = [json.loads(line)["custom_id"] for line in target.read_text().splitlines()]
            assert written == run
            run.clear()
            raise KeyboardInterrupt
        run.extend(line.custom_id for line in share)
        plain(llm, share)

    monkeypatch.setattr(batch, "_SHARE", 2)
    monkeypatch.setattr(batch, "_run", counting)
    with pytest.raises(KeyboardInterrupt):
        run_batch(config, str(source), str(target))
    run_batch(config, str(source), str(target))
    assert run == ["4"]
    assert [json.loads(line)["custom_id"] for line in target.read_text().splitlines()] == list("01234")


def test_run_batch_reads_any_line(checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each gets its own answer, and the good one beside them as well."""
    deep = b"[" * 900 + b"]" * 900
    bodies = (
        b'{"prompt": %s}' % deep,
        b'{"prompt": [5], "seed": 1%s}' % (b"0" * 400),
        b'{"prompt": [5], "n": 1e999}',
        b'{"prompt": [5], "allowed_token_ids": [5], "bad_words": ["w5"]}',  # found out when all lines are to run
    )
    template = b'{"messages": [{"role": "user", "content": "w5"}], "chat_template_kwargs": {"tokenize": false}}'
    bad = [
        b"\xff\xfe",
        b"caf\xe9",
        b"\x00",
        deep,
        b"[" * 100_000,
        b"null",
        b'{"custom_id": "\\ud800", "url": "/v1/completions", "body": {"prompt": [5]}}',
        b'{"url": "/v1/completions"}',
        b'{"url": ["/v1/completions"], "body": {"prompt": [5]}}',
        b'{"custom_id": %s, "url": "/v1/completions", "body": {"prompt": [5]}}' % deep,
        *(b'{"url": "/v1/completions", "body": %s}' % body for body in bodies),
        b'{"url": "/v1/chat/completions", "body": %s}' % template,
    ]
    good = b'{"custom_id": "good", "url": "/v1/completions", "body": {"prompt": [5], "max_tokens": 1}}'
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join([*bad, good]))
    code, _, errors = within(capsys, "run-batch", str(source), "-o", str(target), "--model", str(checkpoint("qwen3")))
    assert code == 0, errors
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert [result["response"]["status_code"] for result in results] == [400] * len(bad) + [200]


def test_chat_and_complete(two_replicas: RunningServer) -> None:
    complete = quire("complete", "w5 w17", "--address", two_replicas.grpc, "--temperature", "0", "--max-tokens", "5")
    assert complete.returncode == 0, complete.stderr
    assert complete.stdout.count("w") == 5
    address = ("--address", two_replicas.grpc, "--temperature", "0", "--max-tokens", "5")
    chat = quire("chat", "w5 w17", *address)
    assert chat.stdout == complete.stdout
    conversation = quire("chat", *address, stdin="w5 w17\nw6\n")
    assert conversation.returncode == 0, conversation.stderr
    assert complete.stdout.strip() in conversation.stdout
    nobody = quire("complete", "x", "--address", "127.0.0.1:1")
    assert nobody.returncode == 1
    assert "no server answers" in nobody.stderr


def test_plan(checkpoint: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(checkpoint("llama"))
    plan = quire("plan", folder, "--max-model-len", "256")
    assert plan.returncode == 0, plan.stderr
    assert "256 tokens" in plan.stdout
    refused = within(capsys, "plan", folder, "--memory-gib", "nan")
    assert refused == (1, "", "quire: memory_gib is nan; it must be a number of GiB above 0, at most 4096\n")
    code, _, errors = within(capsys, "plan", folder, "--memory-gib", "0.000001")
    assert code == 1
    assert "the weights take" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max-num-seqs 1000000", "max_num_seqs is 1000000; it must be a whole number of requests from 1 to 65536"),
        ("--max-num-batched-tokens 1000000000", "it must be a whole number of tokens from 1 to 2^24"),
        ("--memory-gib 0.01 --max-num-seqs 65536 --max-num-batched-tokens 16777216", "lower --max-num-batched-tokens"),
        ("-tp 1000000", "cannot be split"),
        ("-pp 1000000", "cannot be split"),
        (
            "--gpu H100 --attention-backend native",
            "attention_backend is native, the C kernels: they are for float32 on a CPU",
        ),
        ("--gpu A100-80GB --attention-backend flash", "it runs on sm_90"),
        ("--gpu H100 --device cpu", "leave one of them out"),
        ("--gpu H101", "known are"),
        (
            "--dtype float16 --attention-backend native",
            "attention_backend is native, the C kernels: they are for float32 on a CPU",
        ),
    ],
)
def test_what_cannot_be_planned(
    checkpoint: Make, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(checkpoint("llama")), *arguments.split()]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "guesses"), [("{}", "suffix"), ('{"method": "ngram"}', "ngram"), (None, "")])
def test_a_plan_says_what_guesses(
    checkpoint: Make, asked: str | None, guesses: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `auto` comes to as well."""
    given = [] if asked is None else ["--speculative-config", asked]
    assert main(["plan", str(checkpoint("llama")), *given]) == 0
    rows = [line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines() if "guessed ahead by" in line]
    assert rows == ([guesses] if guesses else [])


def test_a_plan_has_no_markup(checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "[red]:smile:[_red]"
    shutil.copytree(checkpoint("llama"), folder)
    assert main(["plan", str(folder)]) == 0
    assert "[red]:smile:[_red], per worker" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["a" * 5000, "a/" + "b" * 5000, "~nobody-of-this-name/x", "__main__", "torch", "é/b"])
def test_a_model_that_cannot_be(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("plan", "serve"):
        code, _, errors = within(capsys, command, model)
        assert code == 1
        assert "give a checkpoint folder" in errors or "neither a path nor a hub id" in errors


def test_too_little_memory_is_said_by_serve(checkpoint: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """By the worker alone, after all of it was started."""
    ports = ("--port", "0", "--grpc-port", "0")
    code, _, errors = within(capsys, "serve", str(checkpoint("llama")), "--kv-cache-memory-bytes", "100000", *ports)
    assert code == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("quire: one request of 512 tokens takes")
    assert "--max-model-len" in last


def test_an_occupied_port_is_named(checkpoint: Make, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, errors = within(capsys, "serve", str(checkpoint("llama")), "--port", str(port))
    assert code == 1
    assert re.search(rf"quire: cannot listen on 127.0.0.1:{port} .*--port", errors), errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "port is 99999; it must be a whole number from 0 to 65535"),
        (["--host", "a" * 70], "cannot listen on"),
        (["--served-model-name", "a,,b"], "holds an empty name"),
        (["-dp", "0"], "data_parallel_size is 0; it must be a whole number of replicas from 1 to 4096"),
        (["--block-size", "1000"], "block_size is 1000; it must be a whole number of tokens from 1 to 64"),
        (["-tp", "3"], "cannot be split over 3 ranks"),
        (["--load-format", "gguf"], "load_format is gguf"),
        (["--device", "cuda"], "device is 'cuda'"),
        (["--ray-address", "127.0.0.1:1"], "no Ray cluster answers"),
        (["--api-key", ""], "api_key is ''"),
    ],
)
def test_bad_options(checkpoint: Make, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(checkpoint("llama")), "--port", "0", "--grpc-port", "0", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_that_is_too_long_for_sockets(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / ("a" * 110)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert main(["serve", str(checkpoint("llama")), "--port", "0", "--grpc-port", "0"]) == 1
    error = capsys.readouterr().err
    assert str(long) in error
    assert "cannot exceed 107 bytes" in error
    assert "Traceback" not in error
    assert not list(long.iterdir())


def test_a_config_file(checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "quire.yaml"
    file.write_text("block-size: 1000\n")
    assert main(["serve", str(checkpoint("llama")), "--config", str(file)]) == 1
    assert "block_size is 1000" in capsys.readouterr().err
    file.write_text("no-such-option: 1\n")
    assert main(["serve", str(checkpoint("llama")), "--config", str(file)]) == 1
    assert "unknown option: no_such_option" in capsys.readouterr().err

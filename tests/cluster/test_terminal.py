"""`quire chat` and `quire complete` at a terminal, against a server that repeats what it is sent."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from quire_protos.v1 import inference_pb2 as pb
from quire_protos.v1 import inference_pb2_grpc

NASTY = "[bold red]x[/] [/nothing] :smile: \\u4f60 \x1b[31m 你好 ﷽ \r\t\U0001f600 [1, 2] {'a': None}"


class Echo(inference_pb2_grpc.InferenceServicer):
    """Chat: the last message. Generate: the prompt, without end."""

    def Chat(self, request: pb.ChatRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        key = dict(context.invocation_metadata()).get("authorization")
        for character in request.messages[-1].content:
            yield pb.GenerateResponse(text=character)
        yield pb.GenerateResponse(text=f"({key})" if key else "", finish_reason="stop")

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        while context.is_active():
            yield pb.GenerateResponse(text=request.text)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServicer_to_server(Echo(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def start(*arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"} | options.pop("environment", {})
    command = [sys.executable, "-m", "quire.cli.main", *arguments]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, env=environment, **streams)


def run(*arguments: str, stdin: bytes = b"", **options: Any) -> tuple[int | None, bytes, bytes]:
    process = start(*arguments, **options)
    out, err = process.communicate(stdin, timeout=120)
    assert b"Traceback" not in (err or b""), err.decode()
    return process.returncode, out, err


def test_text_comes_out_as_it_is(address: str) -> None:
    code, out, err = run("chat", NASTY, "--address", address)
    assert (code, out.decode(), err) == (0, NASTY + "\n", b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_a_terminal_cannot_show_is_escaped(address: str, encoding: str) -> None:
    code, out, err = run("chat", NASTY, "--address", address, environment={"PYTHONIOENCODING": encoding})
    assert (code, out, err) == (0, NASTY.encode(encoding, "backslashreplace") + b"\n", b"")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_was_not_typed_in_the_encoding(address: str, encoding: str) -> None:
    """It is U+FFFD to the model, and the conversation goes on."""
    stdin = b"caf\xe9\n\n  \nsecond\n"
    code, out, err = run("chat", "--address", address, stdin=stdin, environment={"PYTHONIOENCODING": encoding})
    assert (code, err) == (0, b"")
    assert "caf\ufffd\n".encode(encoding, "backslashreplace") in out
    assert b"second\n" in out


def test_the_key_of_the_environment(address: str) -> None:
    assert run("chat", "x", "--address", address, environment={"QUIRE_API_KEY": "k"})[1] == b"x(Bearer k)\n"
    command = ("chat", "x", "--address", address, "--api-key", "other")
    assert run(*command, environment={"QUIRE_API_KEY": "k"})[1] == b"x(Bearer other)\n"
    code, _, err = run("chat", "x", "--address", address, environment={"QUIRE_API_KEY": "\udcff"})
    assert code == 1
    assert err.startswith(b"quire: api_key holds")


def test_arguments_that_are_no_utf8(address: str) -> None:
    for arguments in (["chat", os.fsdecode(b"caf\xe9")], ["complete", "x", "--model", os.fsdecode(b"\xff")]):
        code, _, err = run(*arguments, "--address", address)
        assert code == 1
        assert re.fullmatch(rb"quire: the argument '.*' is not in UTF-8\n", err)


def test_a_reader_that_leaves(address: str) -> None:
    process = start("complete", "word ", "--address", address)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(5) == b"word "
    process.stdout.close()
    assert process.wait(120) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_help_for_nobody() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code, _, err = run("serve", "--help", stdout=writing)
    os.close(writing)
    assert code in (0, 141)  # 0: argparse itself lets what it cannot print be
    assert err == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's full device")
def test_a_proxy_does_not_lead_back_to_this_machine(address: str) -> None:
    environment = {"http_proxy": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1", "no_proxy": ""}
    for name in (address, address.replace("127.0.0.1", "localhost")):
        assert run("chat", "x", "--address", name, environment=environment) == (0, b"x\n", b"")


def test_an_input_that_was_closed(address: str) -> None:
    """It is at its end."""
    command = f"exec {shlex.quote(sys.executable)} -m quire.cli.main chat --address {address} <&-"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_an_output_that_cannot_be_written(address: str) -> None:
    with Path("/dev/full").open("wb") as full:
        for arguments in (["chat", "x", "--address", address], ["--help"]):
            code, _, err = run(*arguments, stdout=full)
            assert (code, err) == (1, b"quire: the output cannot be written: No space left on device\n")


def test_interrupted_while_it_answers(address: str) -> None:
    process = start("complete", "word ", "--address", address)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(5) == b"word "
    drain = threading.Thread(target=process.stdout.read)
    drain.start()
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    drain.join()
    assert process.stderr.read() == b""
    for stream in (process.stdin, process.stdout, process.stderr):
        assert stream is not None
        stream.close()

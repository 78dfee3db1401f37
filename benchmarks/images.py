"""What images cost: how soon the first and the second turn of a conversation about an image start, beside the same
turns with as many tokens of text in the image's place. Over HTTP, in turns, on a model of random weights.

python benchmarks/images.py [--family qwen2_5_vl] [--side 448] [--conversations 15] [--output FILE]
"""

import argparse
import base64
import dataclasses
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import vlms

_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
    "initializer_range": 0.02,
}
_VISION = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "depth": 12,
    "num_heads": 8,
    "out_hidden_size": 768,
    "patch_size": 14,
    "fullatt_block_indexes": [3, 7, 11],
    "window_size": 112,
}
_NEW = 16  # tokens of an answer
# In place of the model's own: random weights write bytes that are no text, more of them here and fewer there.
_ANSWER = "It is what it is, and nothing else."


def checkpoint(folder: Path, family: str) -> None:
    """One of a size at which computing is what takes the time."""
    vlm = vlms.VLMS[family]
    files = json.loads(json.dumps(vlm.files))
    for file in files.values():
        file.pop("max_pixels", None)
        if "size" in file:
            file["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}
    vlms.VLMS[family] = dataclasses.replace(vlm, text=vlm.text | _TEXT, vision=vlm.vision | _VISION, files=files)
    vlms.make_vlm(family, folder)


def image_url(seed: int, side: int) -> dict[str, Any]:
    written = BytesIO()
    vlms.picture(seed, side, side).save(written, "PNG")
    url = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


class Server:
    """`quire serve` of a folder, with all its threads."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        command = [sys.executable, "-m", "quire.cli.main", "serve", str(folder), "--device", "cpu"]
        command += ["--port", str(port), "--grpc-port", "0"]
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self._http = httpx.Client(timeout=600)
        while True:
            try:
                if self._http.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                assert self._process.poll() is None, "the server ended"
            time.sleep(0.2)

    def turn(self, messages: list[dict[str, Any]]) -> tuple[float, dict[str, Any]]:
        """Seconds to the first token, and the usage."""
        body = {
            "messages": messages,
            "max_tokens": _NEW,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        begun, first, usage = time.monotonic(), 0.0, {}
        with self._http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    if choice.get("token_ids") and not first:
                        first = time.monotonic() - begun
        return first, usage

    def metric(self, name: str) -> float:
        text = self._http.get(f"{self.url}/metrics").text
        return sum(map(float, re.findall(rf"^quire:{name}_total\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


def conversation(server: Server, shown: dict[str, Any], number: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds to the first token of two turns."""
    messages = [{"role": "user", "content": [shown, {"type": "text", "text": f"What is this, number {number}?"}]}]
    first, usage = server.turn(messages)
    messages += [
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": "And what is behind it, further away? Say what you see."},
    ]
    second, _ = server.turn(messages)
    return [first, second], usage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="qwen2_5_vl", choices=("qwen2_5_vl",))
    parser.add_argument("--side", type=int, default=448, help="of an image, in pixels")
    parser.add_argument("--conversations", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(Path(folder), arguments.family)
        server = Server(Path(folder))
        try:
            _, usage = conversation(server, image_url(0, arguments.side), 0)
            tokens = usage["prompt_tokens_details"]["image_tokens"]
            text = {"type": "text", "text": "x" * tokens}
            conversation(server, text, 0)
            seen: list[list[float]] = []
            read: list[list[float]] = []
            encoded = server.metric("encoder_images"), server.metric("encoder_seconds")
            for number in range(1, arguments.conversations + 1):
                seen.append(conversation(server, image_url(number, arguments.side), number)[0])
                letters = {"type": "text", "text": chr(97 + number % 26) * tokens}
                read.append(conversation(server, letters, number)[0])
            time.sleep(1)
            images = server.metric("encoder_images") - encoded[0]
            seconds = server.metric("encoder_seconds") - encoded[1]
        finally:
            server.stop()
    found: dict[str, Any] = {
        "cores": len(os.sched_getaffinity(0)),
        "family": arguments.family,
        "tokens_of_an_image": tokens,
        "images_encoded": images,
        "seconds_of_encoding_an_image": seconds / images,
    }
    for turn, name in enumerate(("first", "second")):
        ratios = [a[turn] / b[turn] for a, b in zip(seen, read, strict=True)]
        found[name] = {
            "with_image_s": statistics.median(times[turn] for times in seen),
            "with_text_s": statistics.median(times[turn] for times in read),
            "median_ratio": statistics.median(ratios),
        }
    print(json.dumps(found, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

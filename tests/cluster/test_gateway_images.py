"""Images on their way through a gateway: keys, bounds, and what is read once."""

import asyncio
import base64
import gc
import threading
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateways import TOKENS, expected, gateway, tokens, until
from PIL import Image
from quire_cluster.config import MediaConfig
from quire_cluster.gateway import images as module
from quire_cluster.gateway.generation import Generation, RequestFacts
from quire_cluster.gateway.images import GatewayImage, Images, SeenImages
from quire_cluster.gateway.media import Media
from quire_cluster.wire import image_from_bytes
from quire_engine.errors import EngineFailure, InvalidParameter, QueueFull, Unavailable
from quire_engine.multimodal.pictures import PictureLimits
from quire_engine.multimodal.processor import ProcessedImage
from quire_engine.request import EngineSampling, ImageSpan
from quire_engine.text.output import OutputText
from quire_engine.text.params import SamplingParams
from quire_engine.text.tokenizer import Tokenizer
from quire_protos.v1 import engine_pb2 as pb


class Processor:
    """Of a model whose images are always four tokens. It waits until it may go on."""

    placeholder, image_token_id = "<image>", 5

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def process(self, image: Image.Image) -> ProcessedImage:
        self.may_go_on.wait()
        self.seen.append(image.size)
        return ProcessedImage("<image>" * 4, {"pixel_values": np.full((1, 2), image.size[0], np.float32)}, 4, 2, 2)


def png(width: int) -> bytes:
    written = BytesIO()
    Image.new("RGB", (width, 9)).save(written, "PNG")
    return written.getvalue()


def message(*files: bytes | str) -> list[dict[str, Any]]:
    """Files, or URLs."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": file}
                if isinstance(file, bytes)
                else {"type": "image_url", "image_url": {"url": file}}
                for file in files
            ],
        }
    ]


def images_for(processor: Processor, folder: Path | None = None, most: int = 4) -> Images:
    config = MediaConfig(allowed_local_media_path=None if folder is None else str(folder))
    made: Any = processor
    return Images(made, Media(config, PictureLimits()), most)


def test_one_file_has_one_key_however_it_comes(tmp_path: Path) -> None:
    processor, file = Processor(), png(8)
    (tmp_path / "a.png").write_bytes(file)
    url = "data:image/jpeg;base64," + base64.b64encode(file).decode()

    async def run() -> None:
        images = images_for(processor, tmp_path)
        sent = message(file, url, (tmp_path / "a.png").as_uri())
        [found] = await images.found(sent, b"")
        keys = {part["image"].key for part in found["content"]}
        assert len(keys) == 1
        assert len(processor.seen) == 1  # though they came at the same time
        assert sent == message(file, url, (tmp_path / "a.png").as_uri())  # what the caller has is left alone
        [other] = await images.found(message(file), b"salt")
        assert other["content"][0]["image"].key not in keys
        pixels = image_from_bytes(await found["content"][0]["image"].pixels())
        assert pixels["pixel_values"].tolist() == [[8.0, 8.0]]

    asyncio.run(run())


def test_pixels_are_made_again_where_they_are_gone() -> None:
    processor = Processor()

    async def run() -> None:
        images = images_for(processor)
        [found] = await images.found(message(png(8)), b"")
        images._library._made.clear()
        assert image_from_bytes(await found["content"][0]["image"].pixels())["pixel_values"].shape == (1, 2)
        assert len(processor.seen) == 2

    asyncio.run(run())


def test_what_is_wrong_is_said_of_its_part() -> None:
    async def run() -> None:
        images = images_for(Processor(), most=2)
        with pytest.raises(InvalidParameter, match="part 1 of message 0"):
            await images.found(message(png(8), b"no"), b"")
        with pytest.raises(InvalidParameter, match=r"at most 2 are taken.*--limit-mm-per-prompt"):
            await images.found(message(png(8), png(9), png(10)), b"")

    asyncio.run(run())


def test_an_image_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = Processor()
    processor.may_go_on.clear()
    monkeypatch.setattr(module, "_SECONDS", 0.01)

    async def run() -> None:
        images = images_for(processor)
        with pytest.raises(Unavailable, match="part 0 of message 0: it was not read within"):
            await images.found(message(png(8)), b"")
        processor.may_go_on.set()
        monkeypatch.setattr(module, "_SECONDS", 300.0)
        await images.found(message(png(8)), b"")
        assert len(processor.seen) == 1  # it was begun, and read on meanwhile

    asyncio.run(run())


def test_files_of_requests_under_way_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        gc.collect()  # what other tests have left
        images = images_for(Processor())
        kept = await images.found(message(png(8)), b"")
        monkeypatch.setattr(module, "_FILES", module._File.held)
        with pytest.raises(QueueFull):
            await images.found(message(png(9)), b"")
        del kept
        gc.collect()
        await images.found(message(png(9)), b"")

    asyncio.run(run())


def test_what_nobody_waits_for_any_more_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = Processor()
    processor.may_go_on.clear()
    monkeypatch.setattr(module, "_THREADS", 1)

    async def run() -> None:
        images = images_for(processor)
        first = asyncio.ensure_future(images.found(message(png(8)), b""))
        left = asyncio.ensure_future(images.found(message(png(9)), b""))
        while len(images._under_way) < 2:
            await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        assert len(images._under_way) == 1
        again = asyncio.ensure_future(images.found(message(png(9)), b""))  # whoever comes at once after has it read
        processor.may_go_on.set()
        await first
        await again
        await images.found(message(png(10)), b"")
        assert [width for width, _ in processor.seen] == [8, 9, 10]

    asyncio.run(run())


@pytest.mark.parametrize("error", [Unavailable("so many images come"), MemoryError()])
def test_pixels_that_cannot_be_brought_cost_their_request_alone(tokenizer: Tokenizer, error: Exception) -> None:
    """Whatever kept them, the replica that wants them serves on."""

    class Lost(GatewayImage):
        async def pixels(self) -> bytes:
            raise error

    async def run() -> None:
        async with gateway(tokenizer, 1) as g:
            [replica] = g.replicas
            replica.holds = lambda submit: bool(submit.images)
            nothing: Any = None
            image = Lost(what="part 0", key=b"k", replacement="", num_tokens=1, file=nothing, maker=nothing)
            seen = SeenImages((ImageSpan(b"k", 0, 1),), (image,))
            facts = RequestFacts("request", [5, 6], 0, 0.0, b"", time.monotonic(), seen)
            texts = [OutputText(tokenizer, SamplingParams(), [5, 6])]
            generation = Generation(facts, [EngineSampling(max_tokens=TOKENS)], texts)
            g.dispatcher.submit(generation)
            await until(lambda: len(replica.submitted) == 1)
            [wire_id] = [submit.id for submit in replica.submitted]
            replica._sessions[0].put_nowait(pb.SessionUpdate(wanted=[pb.WantedImage(id=wire_id, key=b"k")]))
            while await generation.deltas():
                pass
            assert isinstance(generation.choices[0].error, Unavailable | EngineFailure)
            await until(lambda: replica.aborted == [wire_id])
            assert await tokens(g.start([7, 8])) == expected([7, 8])

    asyncio.run(run())

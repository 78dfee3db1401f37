"""libFuzzer over what a gateway may send to a replica: `python fuzz_submit.py MODEL -runs=N …` ends with a status other
than 0 at the first message that an engine neither refuses nor computes, or beside which another request changes."""

import sys
import time

import atheris
from google.protobuf.message import DecodeError
from quire_cluster.convert import request_from_proto
from quire_engine.config import EngineConfig
from quire_engine.engine import Engine
from quire_engine.errors import QuireError
from quire_engine.execution.runner import ModelRunner
from quire_engine.request import EngineSampling, Request
from quire_engine.weights.resolve import find_model
from quire_protos.v1 import engine_pb2 as pb

CANARY = EngineSampling(max_tokens=5, temperature=1.0, seed=3)


class Fuzzer:
    def __init__(self, model: str) -> None:
        config = EngineConfig(model=model, device="cpu", max_model_len=64, kv_cache_memory_bytes=1 << 20)
        self._engine = Engine(ModelRunner(config, find_model(config)))
        self._next = 0
        self._alone = self._canary(None)

    def _id(self) -> int:
        self._next += 1
        return self._next

    def _canary(self, beside: pb.Submit | None) -> list[int]:
        canary = Request(self._id(), [9, 8, 7], 3, CANARY)
        self._engine.add(canary)
        if beside is not None:
            try:
                self._engine.add(request_from_proto(beside, self._id(), time.monotonic()))
            except QuireError as error:
                assert len(str(error)) < 500
        while self._engine.has_work:
            self._engine.step()
        self._engine.scheduler.check_integrity()
        return canary.tokens[3:]

    def one(self, data: bytes) -> None:
        """Bytes of a message, or values for its fields."""
        if data[:1] == b"\0":
            try:
                message = pb.Submit.FromString(data[1:])
            except DecodeError:  # not a message
                return
        else:
            message = fields(atheris.FuzzedDataProvider(data))
        assert self._canary(message) == self._alone, message


def fields(values: atheris.FuzzedDataProvider) -> pb.Submit:
    """Small and likely ones mostly, and now and then what the type can say at all."""

    def number(likely: int) -> int:
        return values.ConsumeIntInRange(0, likely if values.ConsumeIntInRange(0, 20) else 2**32 - 1)

    def ids() -> list[int]:
        return [number(310) for _ in range(values.ConsumeIntInRange(0, 12))]

    def real() -> float:
        return values.ConsumeFloat() if values.ConsumeIntInRange(0, 9) == 0 else values.ConsumeFloatInRange(-2.5, 2.5)

    names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    sampling = pb.EngineSampling(max_tokens=number(6), temperature=1.0, top_p=1.0, repetition_penalty=1.0)
    for _ in range(values.ConsumeIntInRange(0, 4)):
        setattr(sampling, values.PickValueInList(list(names)), real())
    if values.ConsumeBool():
        sampling.min_tokens, sampling.stop_token_ids[:] = number(6), ids()
    if values.ConsumeBool():
        sampling.logprobs, sampling.prompt_logprobs = number(21), number(21)
    if values.ConsumeBool():
        sampling.logit_bias.update({token: real() for token in ids()})
        sampling.top_k = values.ConsumeIntInRange(-(2**31), 2**31 - 1)
    if values.ConsumeBool():
        sampling.allowed_token_ids = values.ConsumeBytes(40)
        sampling.bad_words.extend(pb.TokenSequence(ids=ids()) for _ in range(values.ConsumeIntInRange(0, 3)))
    return pb.Submit(
        prompt=ids(),
        output=ids() if values.ConsumeBool() else [],
        sampling=sampling,
        time_left=real(),
        age=real(),
        resumed=values.ConsumeBool(),
    )


def main() -> None:
    fuzzer = Fuzzer(sys.argv[1])
    atheris.Setup([sys.argv[0], *sys.argv[2:]], fuzzer.one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

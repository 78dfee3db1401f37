"""Between the internal protocol's messages and the engine's objects. Torch-free: replicas and gateways both use it."""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from quire_engine.errors import BY_NAME, EngineFailure, QuireError
from quire_engine.request import EngineSampling, ImageSpan, Request, TokenSet
from quire_engine.step import TokenLogprobs
from quire_protos.v1 import engine_pb2 as pb

MESSAGE_BYTES = 64 << 20  # of a session, at most
BATCH_BYTES = 1 << 20  # from which on nothing more is put into a message
KEEPALIVE = [  # of both ends: one that vanished without a word, or stopped, is found in 10 s
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),  # for TCP's acknowledgement
    ("grpc.http2.ping_timeout_ms", 5000),  # for the other end's answer, which else has a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
]
_SCALARS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)


def sampling_to_proto(params: EngineSampling) -> pb.EngineSampling:
    """Every field."""
    message = pb.EngineSampling(
        **{name: getattr(params, name) for name in _SCALARS},
        stop_token_ids=params.stop_token_ids,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        logit_bias=params.logit_bias,
        allowed_token_ids=params.allowed_token_ids.bits,
        guidance=params.guidance,
    )
    for word in params.bad_words:
        message.bad_words.add(ids=word)
    return message


@lru_cache(32)
def _the_same(guidance: str) -> str:
    """Requests that have the same description share one string, which a plan then holds once. (What sys.intern is given
    stays for good before Python 3.12.7.)"""
    return guidance


def sampling_from_proto(message: pb.EngineSampling) -> EngineSampling:
    """Every field."""
    return EngineSampling(
        **{name: getattr(message, name) for name in _SCALARS},
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
        logit_bias=dict(message.logit_bias) or None,
        allowed_token_ids=TokenSet(message.allowed_token_ids),
        bad_words=tuple(tuple(word.ids) for word in message.bad_words),
        guidance=_the_same(message.guidance),
    )


def request_from_proto(message: pb.Submit, request_id: int, now: float) -> Request:
    """A request with what an earlier replica already generated. `now`: in time.monotonic() seconds."""
    return Request(
        id=request_id,
        tokens=[*message.prompt, *message.output],
        num_prompt=len(message.prompt),
        params=sampling_from_proto(message.sampling),
        priority=message.priority,
        arrival=now - message.age,
        deadline=now + message.time_left if message.time_left else 0.0,
        cache_salt=message.cache_salt,
        images=tuple(ImageSpan(i.key, i.start, i.length, i.rows, i.columns) for i in message.images),
        resumed=message.resumed,
        waiting_since=now if message.resumed else 0.0,
        tenant=message.tenant,
        weight=message.weight if message.HasField("weight") else 1.0,
    )


def logprobs_to_proto(
    request_id: int, scores: TokenLogprobs, *, prompt: bool = False, first: int = 0
) -> pb.TopLogprobs:
    """Flattened: one message for all positions."""
    return pb.TopLogprobs(
        id=request_id,
        prompt=prompt,
        first=first,
        chosen=scores.chosen.tolist(),
        logprob=scores.logprobs.tolist(),
        rank=scores.ranks.tolist(),
        width=scores.top_ids.shape[1],
        top_ids=scores.top_ids.ravel().tolist(),
        top_logprobs=scores.top_logprobs.ravel().tolist(),
    )


def logprobs_from_proto(message: pb.TopLogprobs) -> TokenLogprobs:
    """The inverse."""
    positions, width = len(message.chosen), message.width
    return TokenLogprobs(
        chosen=_array(message.chosen, np.int32),
        logprobs=_array(message.logprob, np.float32),
        ranks=_array(message.rank, np.int32),
        top_ids=_array(message.top_ids, np.int32).reshape(positions, width),
        top_logprobs=_array(message.top_logprobs, np.float32).reshape(positions, width),
    )


def _array(values: Iterable[float], dtype: type) -> np.ndarray:
    return np.array(list(values), dtype)


def error_from_proto(kind: str, message: str) -> QuireError:
    """The error of an ending."""
    return BY_NAME.get(kind, EngineFailure)(message)

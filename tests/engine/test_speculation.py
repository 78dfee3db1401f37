"""Drafts change no token: whatever is asked for, however good or bad they are, and whatever happens meanwhile."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drafters import Everything, speculation, told
from guided import Guided, finished
from guided import request as guided_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire_engine.config import EngineConfig, SpeculativeConfig
from quire_engine.engine import Engine
from quire_engine.errors import DeadlineExceeded, InvalidParameter
from quire_engine.execution.runner import ModelRunner
from quire_engine.guidance.spec import Thinking
from quire_engine.guidance.structure import StructuredOutputs
from quire_engine.request import EngineSampling, Request, TokenSet
from quire_engine.speculation.draft import Draft, Drafter
from quire_engine.speculation.ngram import NgramDrafter
from quire_engine.speculation.speculation import Speculation
from quire_engine.speculation.suffix import SuffixDrafter
from quire_engine.step import TokenLogprobs
from quire_engine.weights.resolve import find_model

Make = Callable[[str], Path]
Seen = tuple[list[int], str | None, list[bytes]]  # tokens, the ending, log-probabilities' bits: how they come is free
BLOCKS = [list(range(40, 56)), list(range(60, 76))]  # that prompts have in common
PROMPTS = [
    BLOCKS[0] + [5, 6, 7],
    [9],
    BLOCKS[0] + BLOCKS[1] + [8, 9, 8, 9],
    [5, 6, 7, 5, 6, 7, 5, 6],
    np.random.default_rng(1).integers(4, 300, 50).tolist(),
]
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.8},
    "penalties": {"temperature": 0.7, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "logit_bias": {"logit_bias": {5: 4.0, 9: -100.0, 17: 3.0}},
    "min_p": {"min_p": 0.1},
    "top_k": {"top_k": 5, "top_p": 0.8},
    "logprobs": {"temperature": 0.5, "logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2, "logprobs": 0},
    "stop ids": {"temperature": 0.0, "stop_token_ids": tuple(range(4, 60))},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": tuple(range(4, 120))},
    "allowed": {"allowed_token_ids": TokenSet.of(range(4, 24))},
    "bad words": {"temperature": 0.3, "bad_words": ((5,), (6, 7), tuple(range(40, 60)), (8, 9, 8))},
    "short": {"max_tokens": 2},
}
WRONG = {"right": 0.0, "mixed": 0.3, "garbage": 1.0}


class Model:
    """One loaded model, on which engine after engine may run."""

    def __init__(self, folder: Path, **options: Any) -> None:
        sizes = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 48}
        given = sizes | {"kv_cache_memory_bytes": 1 << 21}
        config = EngineConfig(model=str(folder), device="cpu", **(given | options))
        self.runner = ModelRunner(config, find_model(config))

    def engine(self, guesses: Speculation | None = None, **limits: Any) -> Engine:
        """With nothing in its cache. Without `guesses` nothing is guessed."""
        self.runner.limits = replace(self.limits, **limits)
        if guesses is None:
            self.runner.limits = replace(self.runner.limits, speculation=None)
        return Engine(self.runner, guesses)

    @property
    def limits(self) -> Any:
        known = self.__dict__.setdefault("_limits", self.runner.limits)
        other = SpeculativeConfig(method="suffix", num_speculative_tokens=4)
        return replace(known, speculation=known.speculation or other)


def requests(asked: Sequence[dict[str, Any]], prompts: Sequence[list[int]] = PROMPTS) -> list[Request]:
    """One for each prompt; what is asked for goes round."""
    made = []
    for number, prompt in enumerate(prompts):
        params = EngineSampling(**({"max_tokens": 24, "seed": number + 7} | asked[number % len(asked)]))
        made.append(Request(number, list(prompt), len(prompt), params))
    return made


def run(engine: Engine, asked: list[Request]) -> list[Seen]:
    scores: dict[int, list[TokenLogprobs]] = {request.id: [] for request in asked}
    prompts: dict[int, list[TokenLogprobs]] = {request.id: [] for request in asked}
    counts = dict.fromkeys(scores, 0)
    for request in asked:
        engine.add(request)
    while engine.has_work:
        outcome = engine.step()
        for request, index, token in zip(outcome.requests, outcome.indexes, outcome.tokens, strict=True):
            assert request.tokens[request.num_prompt + index] == token
            assert index == counts[request.id], "a token is told twice, or left out"
            counts[request.id] += 1
        for request, found in outcome.logprobs:
            scores[request.id].append(found)
        for request, _, found in outcome.prompt_logprobs:
            prompts[request.id].append(found)
        engine.scheduler.check_integrity()
    assert engine.scheduler.pool.num_used == 0
    for request in asked:
        if request.params.logprobs is not None:
            assert len(scores[request.id]) == request.num_output
    return [(r.tokens[r.num_prompt :], r.finish_reason, bits(scores[r.id]) + bits(prompts[r.id])) for r in asked]


def bits(parts: list[TokenLogprobs]) -> list[bytes]:
    """Of all positions, field by field."""
    return [b"".join(getattr(part, name).tobytes() for part in parts) for name in TokenLogprobs.__slots__]


def drafters(plain: list[Seen], prompts: Sequence[list[int]] = PROMPTS) -> dict[str, Drafter]:
    outputs = [tokens for tokens, _, _ in plain]
    made: dict[str, Drafter] = {name: told(prompts, outputs, wrong) for name, wrong in WRONG.items()}
    return made | {"ngram": NgramDrafter(1, 3), "suffix": SuffixDrafter()}


@pytest.fixture(scope="module")
def llama(checkpoint: Make) -> Model:
    return Model(checkpoint("llama"), deterministic=True)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_with_every_drafter(llama: Model, feature: str) -> None:
    asked = [FEATURES[feature]]
    plain = run(llama.engine(), requests(asked))
    for name, drafter in drafters(plain).items():
        engine = llama.engine(speculation(drafter))
        assert run(engine, requests(asked)) == plain, name
        stats = engine.scheduler.stats
        if feature != "short" and name in WRONG:
            assert stats.draft_tokens > 0
        if name == "right":
            assert stats.accepted_tokens == stats.draft_tokens or feature in ("stop ids", "min_tokens")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(st.lists(st.sampled_from(sorted(FEATURES)), min_size=1, max_size=3), min_size=5, max_size=5),
    wrong=st.sampled_from([0.0, 0.1, 0.5]),
    most=st.integers(1, 7),
    limits=st.fixed_dictionaries(
        {},
        optional={
            "num_pages": st.just(9),
            "max_num_batched_tokens": st.sampled_from([1, 5, 17]),
            "max_num_seqs": st.sampled_from([1, 3]),
            "steps_in_flight": st.just(1),
            "enable_prefix_caching": st.just(False),
        },
    ),
)
def test_all_together(llama: Model, asked: list[list[str]], wrong: float, most: int, limits: dict[str, Any]) -> None:
    """Several features in a request, other ones in each; pages and budgets short, overlap on and off."""
    each = [{key: value for name in names for key, value in FEATURES[name].items()} for names in asked]
    for params in each:
        if params.get("max_tokens", 24) < params.get("min_tokens", 0):
            del params["min_tokens"]
    plain = run(llama.engine(), requests(each))
    drafter = told(PROMPTS, [tokens for tokens, _, _ in plain], wrong, seed=most)
    assert run(llama.engine(speculation(drafter, most), **limits), requests(each)) == plain


@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("qwen3_5", "auto"),
        ("lfm2", "auto"),
        ("granite_hybrid", "auto"),
        ("gemma3", "auto"),
        ("deepseek_v3", "auto"),
        ("llama", "fp8"),
    ],
)
def test_families(checkpoint: Make, family: str, cache: str) -> None:
    """Recurrent states, sliding windows, latent keys, an FP8 cache: in chunks, from the prefix cache, and preempted."""
    model = Model(checkpoint(family), kv_cache_dtype=cache)
    asked = [{"temperature": 0.0, "max_tokens": 40}, {"temperature": 0.7, "max_tokens": 40}]
    plain = [seen[:2] for seen in run(model.engine(), requests(asked))]
    for number, wrong in enumerate((0.0, 0.3)):
        drafter = told(PROMPTS, [tokens for tokens, _ in plain], wrong)
        engine = model.engine(speculation(drafter), steps_in_flight=1 + number % 2)
        assert [seen[:2] for seen in run(engine, requests(asked))] == plain
        again = requests(asked)
        for request in again:
            request.id += 100
        assert [seen[:2] for seen in run(engine, again)] == plain, "from the prefix cache"
        chunked = model.engine(speculation(drafter), max_num_batched_tokens=13)
        assert [seen[:2] for seen in run(chunked, requests(asked))] == plain, "in chunks"
        tight: dict[str, Any] = {"num_pages": 8}
        if model.limits.num_states:
            tight["num_states"] = 3 + number
        engine = model.engine(speculation(drafter), **tight)
        assert [seen[:2] for seen in run(engine, requests(asked))] == plain, "preempted"
        assert engine.scheduler.stats.preemptions > 0


def test_grammars(byte_level_folder: Path) -> None:
    """Reasoning with a budget, then JSON; sections of free text; drafts cross every boundary, and break every rule."""
    guided = Guided(byte_level_folder)
    delimiters = guided.tokenizer.delimiters
    think, end = (delimiters["<think>"],), (delimiters["</think>"],)
    grammar = StructuredOutputs(regex="[a-f]{4,9}( [0-9]+){2}").spec(delimiters)
    schema = StructuredOutputs(json={"type": "object", "properties": {"a": {"type": "integer"}}}).spec(delimiters)
    thinking = replace(schema, thinking=Thinking(begin=think, end=end, inside=True, budget=9, closing=end))
    specs = [grammar, schema, thinking]
    prompts = [[60, 61, 62], [70], [80, 81]]

    def made() -> list[Request]:
        return [
            guided_request(number, prompts[number % 3], specs[number % 3], max_tokens=40, temperature=1.0 + number % 2)
            for number in range(6)
        ]

    plain = [one.tokens for one in finished(guided.engine(), made())]
    outputs = {tuple(prompts[n % 3]): plain[n][len(prompts[n % 3]) :] for n in range(6)}
    for wrong in (0.0, 0.3, 1.0):
        drafter = told(outputs.keys(), outputs.values(), wrong)
        engine = guided.engine(speculation=SpeculativeConfig(num_speculative_tokens=4))
        engine.scheduler.speculation = speculation(drafter)
        assert [one.tokens for one in finished(engine, made())] == plain
        assert engine.scheduler.stats.draft_tokens > 20


@pytest.mark.parametrize("seeds", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_distribution_is_that_of_plain_sampling(llama: Model, seeds: int) -> None:
    """Each seed draws what it would have drawn."""
    few = TokenSet.of(range(4, 16))

    def made() -> list[Request]:
        asked = [EngineSampling(max_tokens=3, seed=n, allowed_token_ids=few) for n in range(seeds)]
        return [Request(n, [5, 6, 7], 3, params) for n, params in enumerate(asked)]

    plain = run(llama.engine(max_num_queued_reqs=seeds), made())
    assert len({tuple(tokens) for tokens, _, _ in plain}) > 50, "the seeds are alike"
    drafts = Everything()
    engine = llama.engine(Speculation(Common(plain), drafts, 2), max_num_queued_reqs=seeds)
    drafted = made()  # as many at once as there are rows: drafts are not made while others wait
    assert [seen for at in range(0, seeds, 8) for seen in run(engine, drafted[at : at + 8])] == plain
    outputs = [tokens for tokens, _, _ in plain]
    likely = Common(plain).propose(Request(0, [5], 1, EngineSampling()), 3).tokens
    assert drafts.accepted == sum(tokens[1] == likely[1] for tokens in outputs) > seeds / 12, "as often as it is drawn"


class Common:
    """Drafts what followed most often: a guess that knows nothing of seeds."""

    reads_logs = True

    def __init__(self, seen: list[Seen]) -> None:
        outputs = [tokens for tokens, _, _ in seen]
        self._common = [max(set(column), key=column.count) for column in zip(*outputs, strict=True)]

    def propose(self, request: Request, most: int) -> Draft:
        tokens = self._common[request.num_output : request.num_output + most]
        return Draft(tokens, [0.5] * len(tokens))

    def forget(self, request: Request) -> None:
        pass


def test_resumed(llama: Model) -> None:
    """At every place of the output, with a drafter that knows nothing of what came before."""
    asked = [FEATURES["penalties"], FEATURES["logprobs"], FEATURES["bad words"]]
    plain = run(llama.engine(), requests(asked))
    for at in range(1, 20, 3):
        resumed = requests(asked)
        for request, (tokens, _, _) in zip(resumed, plain, strict=True):
            request.tokens.extend(tokens[:at])
            request.resumed = True
        engine = llama.engine(speculation(told(PROMPTS, [tokens for tokens, _, _ in plain], 0.2)))
        for request in resumed:
            engine.add(request)
        while engine.has_work:
            engine.step()
        assert [request.tokens[request.num_prompt :] for request in resumed] == [tokens for tokens, _, _ in plain]


def test_ended_amid_drafts(llama: Model) -> None:
    """Aborted, or past the deadline, while a step with their drafts is in flight: pages are free, neighbours go on."""
    asked = [FEATURES["greedy"]]
    plain = run(llama.engine(), requests(asked))
    engine = llama.engine(speculation(told(PROMPTS, [tokens for tokens, _, _ in plain], 0.1)))
    made = requests(asked)
    made[1].deadline = time.monotonic() + 3600
    for request in made:
        engine.add(request)
    while not (engine.scheduler.num_in_flight and engine.scheduler._in_flight[-1][2].drafted):
        engine.step()
    engine.abort(0)
    engine.scheduler._deadlines._heap[0] = (0.0, 1, made[1])
    while engine.has_work:
        engine.step()
        engine.scheduler.check_integrity()
    assert (made[0].finish_reason, type(made[1].error)) == ("abort", DeadlineExceeded)
    assert engine.scheduler.pool.num_used == 0
    for request, (tokens, _, _) in list(zip(made, plain, strict=True))[2:]:
        assert request.tokens[request.num_prompt :] == tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ngram", "must be a JSON object"),
        ('{"method": "medusa"}', "method is 'medusa'; it must be one of"),
        ('{"tokens": 4}', "'tokens'; known are method, model, revision, num_speculative_tokens"),
        ('{"num_speculative_tokens": 0}', "num_speculative_tokens is 0; it must be a whole number"),
        ('{"method": "ngram", "prompt_lookup_min": 9}', "prompt_lookup_min is 9, above prompt_lookup_max"),
        ('{"prompt_lookup_max": 4}', "prompt_lookup_max are for ngram, and method is auto"),
        ('{"method": "ngram", "method": "suffix"}', "says 'method' twice"),
    ],
)
def test_options_are_checked(text: str, message: str) -> None:
    with pytest.raises(InvalidParameter, match=message) as error:
        EngineConfig(model="any", speculative_config=text)
    assert error.value.parameter in ("speculative_config", "prompt_lookup_min")


def test_options_may_be_a_mapping() -> None:
    given: Any = {"method": "ngram", "num_speculative_tokens": 3}
    config = EngineConfig(model="any", speculative_config=given)
    assert config.speculation == SpeculativeConfig(method="ngram", num_speculative_tokens=3)

"""Images beside text: equal to transformers' whole models, given the same messages through its own processors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from greedy import engine_for, prompts, run
from quire_engine.engine import Engine
from quire_engine.errors import InvalidParameter
from quire_engine.request import Request
from shown import NEW_TOKENS, Parts, Shower, Shown, finish, logits_of, request_of, run_shown, truth
from vlms import VLMS, make_vlm, picture

WIDE, TALL, SMALL = picture(1, 96, 60), picture(2, 50, 120), picture(3, 64, 64)
CONVERSATIONS: dict[str, Parts] = {
    "first": [WIDE, "What is this?"],
    "middle": ["Look at ", TALL, " and say what it is."],
    "last": ["What is in it: ", SMALL],
    "several": ["One: ", WIDE, " two: ", TALL, " and three: ", WIDE, " differ in?"],
}
FEW = "qwen2_5_vl", "gemma3", "idefics3"  # one with M-RoPE, one that sees its images both ways, one in pieces
EACH = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in VLMS]


class Family:
    """A checkpoint, transformers' model of it, and what is shown to it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.model = make_vlm(name, folder)
        self.shower = Shower(folder)
        self.shown = {kind: self.shower.show(parts) for kind, parts in CONVERSATIONS.items()}
        self.truth = {kind: truth(self.model, shown) for kind, shown in self.shown.items()}

    def tokens(self, kinds: list[str]) -> list[list[int]]:
        return [self.truth[kind][1] for kind in kinds]


_families: dict[str, Family] = {}


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    def made(name: str) -> Family:
        if name not in _families:
            _families[name] = Family(name, tmp_path_factory.mktemp(name))
        return _families[name]

    yield made
    _families.clear()


def budget(family: Family, least: int) -> dict[str, Any]:
    """Of a step: so little that images are cut, where the family lets them."""
    if family.name == "gemma3":
        return {"max_num_seqs": 4, "max_num_batched_tokens": 20}
    return {"max_num_batched_tokens": least}


@pytest.mark.parametrize("name", VLMS)
def test_logits_and_tokens(name: str, family_of: Any) -> None:
    family = family_of(name)
    engine = engine_for(family.folder)
    for kind, shown in family.shown.items():
        assert shown.theirs["input_ids"][0].tolist() == shown.ids
        logits, _ = family.truth[kind]
        assert (logits_of(engine, shown) - logits[:-1]).abs().max() < 1e-4, kind
    kinds = list(family.shown)
    texts = prompts()
    alone = run(engine, texts, 500, max_tokens=24)
    assert run_shown(engine, list(family.shown.values())) == family.tokens(kinds)
    again = run_shown(engine, list(family.shown.values()), 10)  # from the prefix cache
    assert again == family.tokens(kinds)
    assert run(engine, texts, 600, max_tokens=24) == alone


@pytest.mark.parametrize("name", EACH)
def test_cut_up(name: str, family_of: Any) -> None:
    """A prompt is computed in pieces that end amid images, beside others, without a prefix cache."""
    family = family_of(name)
    engine = engine_for(family.folder, enable_prefix_caching=False, **budget(family, 7))
    kinds = list(family.shown)
    assert run_shown(engine, list(family.shown.values())) == family.tokens(kinds)


@pytest.mark.parametrize("name", EACH)
def test_preempted(name: str, family_of: Any) -> None:
    """There are not pages enough for all: some lose theirs, and compute their images' tokens again."""
    family = family_of(name)
    batch = [family.shown[kind] for kind in ("several", "middle", "several", "first")]
    probe: Any = engine_for(family.folder)._executor
    pages = sum(-(-len(shown.ids) // 16) for shown in batch) + len(batch)
    engine = engine_for(
        family.folder,
        max_model_len=min(16 * pages, 512),
        max_num_seqs=4,
        kv_cache_memory_bytes=pages * probe.memory.page_bytes + 9 * probe.memory.state_bytes,
        enable_prefix_caching=False,
    )
    wanted = family.tokens(["several", "middle", "several", "first"])
    found = run_shown(engine, batch, max_tokens=60)
    assert [tokens[:NEW_TOKENS] for tokens in found] == wanted
    assert engine.scheduler.stats.preemptions


@pytest.mark.parametrize("name", FEW)
def test_little_room_for_embeddings(name: str, family_of: Any) -> None:
    """No more than the largest image finds room: what one request needs next costs others theirs."""
    family = family_of(name)
    size = max(len(p) for s in family.shown.values() for p in _places(family, s))
    per_token = family.model.config.get_text_config().hidden_size * 4
    engine = engine_for(family.folder, encoder_cache_memory_bytes=size * per_token, **budget(family, 16))
    kinds = ["several", "middle", "first", "last"]
    assert run_shown(engine, [family.shown[kind] for kind in kinds]) == family.tokens(kinds)
    images: Any = engine.scheduler.images
    assert sum(image.size for image in images._images.values()) <= size


def _places(family: Family, shown: Shown) -> list[Any]:
    tokens = torch.tensor(shown.ids)
    return [(tokens[span.start : span.end] == family.shower.processor.image_token_id).nonzero() for span in shown.spans]


def test_an_image_is_encoded_once(family_of: Any) -> None:
    """However many questions there are about it, and however they begin."""
    family = family_of("qwen2_5_vl")
    engine = engine_for(family.folder)
    encoded = _count_encoded(engine)
    shower = family.shower
    batch = [shower.show([text, WIDE, " what?"]) for text in ("a", "bc", "def")]
    run_shown(engine, batch)
    assert len(encoded) == 1
    run_shown(engine, [shower.show(["a", WIDE, " what else?"])], 10)
    assert len(encoded) == 1


def test_pixels_are_not_wanted_where_the_prompt_is_cached(family_of: Any) -> None:
    family = family_of("qwen2_5_vl")
    engine = engine_for(family.folder)
    shown = family.shower.show([WIDE, "x" * 40])
    first = run_shown(engine, [shown])
    images: Any = engine.scheduler.images
    images._images.clear()
    images._free = images._limits.room
    request = request_of(shown, 7)
    engine.add(request)
    while engine.has_work:
        assert not engine.step().wanted
    assert request.tokens[request.num_prompt :] == first[0]
    assert request.num_cached >= shown.spans[0].end


@pytest.mark.parametrize("name", FEW)
def test_other_images_under_the_same_text_share_no_page(name: str, family_of: Any) -> None:
    """Of equal sizes, so that all tokens are equal."""
    family = family_of(name)
    one, other = (family.shower.show(["See ", picture(seed, 90, 90), " now?"]) for seed in (5, 6))
    assert one.ids == other.ids
    wanted = [truth(family.model, shown)[1] for shown in (one, other)]
    assert wanted[0] != wanted[1]
    engine = engine_for(family.folder)
    for number, (shown, tokens) in enumerate(zip((one, other, one), [*wanted, wanted[0]], strict=True)):
        request = request_of(shown, number)
        engine.add(request)
        finish(engine, {number: shown})
        assert request.tokens[request.num_prompt :] == tokens
        if number == 1:
            assert request.num_cached <= shown.spans[0].start


@pytest.mark.parametrize("name", EACH)
def test_resumed(name: str, family_of: Any) -> None:
    """Another engine goes on from the log."""
    family = family_of(name)
    shown, tokens = family.shown["several"], family.truth["several"][1]
    engine = engine_for(family.folder)
    request = request_of(shown, 1)
    request.tokens += tokens[:9]
    request.resumed = True
    engine.add(request)
    finish(engine, {1: shown})
    assert request.tokens[request.num_prompt :] == tokens


@pytest.mark.parametrize("overlapping", [True, False])
def test_while_pixels_are_on_their_way_others_go_on(overlapping: bool, family_of: Any) -> None:
    family = family_of("qwen2_5_vl")
    engine = engine_for(family.folder, async_scheduling=overlapping)
    shown = family.shown["first"]
    waiting, text = request_of(shown, 1), Request(2, [5, 6, 7], 3, request_of(shown, 0).params)
    engine.add(waiting)
    engine.add(text)
    wanted = []
    while not text.finish_reason:
        wanted += engine.step().wanted
    assert [(request.id, key) for request, key in wanted] == [(1, shown.spans[0].key)]
    assert not waiting.finish_reason
    assert not engine.has_work  # and whoever steps it need not spin
    [reason] = engine.scheduler.explain([waiting])
    assert reason.reason is not None
    assert reason.reason.value == "an image of its prompt"
    engine.scheduler.provide(*next(iter(shown.inputs.items())))
    finish(engine, {1: shown})
    assert waiting.tokens[waiting.num_prompt :] == family.truth["first"][1]


def test_another_brings_what_an_aborted_one_was_to_bring(family_of: Any) -> None:
    family = family_of("qwen2_5_vl")
    engine = engine_for(family.folder)
    shown = family.shown["first"]
    for number in (1, 2):
        engine.add(request_of(shown, number))
    asked = [request.id for request, _ in engine.step().wanted]
    assert asked == [1]
    engine.step()
    engine.abort(1)
    asked = [request.id for request, _ in engine.step().wanted]
    assert asked == [2]
    request = engine.scheduler.requests[2]
    engine.scheduler.provide(*next(iter(shown.inputs.items())))
    finish(engine, {2: shown})
    assert request.tokens[request.num_prompt :] == family.truth["first"][1]


def test_an_image_that_cannot_be_encoded_costs_its_requests_alone(family_of: Any) -> None:
    family = family_of("qwen2_5_vl")
    engine = engine_for(family.folder)
    shown, other = family.shown["first"], family.shown["middle"]
    [key] = shown.inputs
    broken = Shown(shown.ids, shown.spans, {key: {"pixel_values": shown.inputs[key]["pixel_values"]}}, {})
    requests = {number: request_of(one, number) for number, one in enumerate((broken, other, shown))}
    for request in requests.values():
        engine.add(request)
    finish(engine, {0: broken, 1: other, 2: shown})
    for number in (0, 2):  # which show the same
        assert requests[number].finish_reason == "error"
        assert "an image could not be encoded" in str(requests[number].error)
    assert requests[1].tokens[requests[1].num_prompt :] == family.truth["middle"][1]
    assert run_shown(engine, [shown], 10) == family.tokens(["first"])


def test_what_never_can_be_seen_is_refused(family_of: Any) -> None:
    family = family_of("qwen2_5_vl")
    engine = engine_for(family.folder)
    shown = family.shown["first"]
    [span] = shown.spans
    for spans, why in (
        ((span, span), "one after another"),
        ((type(span)(span.key, 0, 1),), "no token in the prompt"),
        ((type(span)(span.key, span.start, 10_000),), "within the prompt"),
        ((type(span)(span.key, span.start, span.length, 7, 7),), "rows and columns"),
    ):
        request = request_of(shown, 1)
        request.images, request.images_end = spans, spans[-1].end
        with pytest.raises(InvalidParameter, match=why):
            engine.add(request)
    small = engine_for(family.folder, encoder_cache_memory_bytes=2 * 64 * 4)
    with pytest.raises(InvalidParameter, match="encoder-cache-memory-bytes"):
        small.add(request_of(shown, 1))
    texts = engine_for(family.folder, limit_mm_per_prompt='{"image": 0}')
    with pytest.raises(InvalidParameter, match="takes no images"):
        texts.add(request_of(shown, 1))
    assert run(texts, prompts()) == run(engine, prompts())


def _count_encoded(engine: Engine) -> list[Any]:
    runner: Any = engine._executor
    images = runner._images
    seen: list[Any] = []
    usual = images._tower.encode
    images._tower.encode = lambda inputs: seen.append(inputs) or usual(inputs)
    return seen

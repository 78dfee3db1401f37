"""Heads that guess tokens ahead give what plain torch computes of the published tensors, without a cache."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from families import LAYERS
from greedy import engine_for, prompt_logits, prompts
from heads import (
    CACHE,
    DRAFT_VOCABULARY,
    GUESSES,
    HIDDEN,
    MTP,
    VOCABULARY,
    Mtp,
    as_speculators,
    builder,
    built,
    eagle_folder,
    guesses,
    mtp_folders,
    places,
    serve,
    with_embeddings,
)
from layouts import Tensors, rewritten
from quire_engine.errors import InvalidParameter, ModelError
from quire_engine.layers.caches import empty_caches
from quire_engine.layers.linear import Builder
from quire_engine.models.decoder import Decoder
from quire_engine.models.draft_heads import eagle_head, has_mtp, mtp_head
from quire_engine.models.eagle import eagle_spec
from quire_engine.models.families import spec_of
from quire_engine.parallel import ParallelGroup
from quire_engine.quantization.config import Quantization
from quire_engine.weights.hf_config import completed
from quire_engine.weights.random import RandomWeights
from quire_engine.weights.resolve import ModelFiles
from quire_kernels.torch_backend import TorchBackend
from safetensors.torch import load_file
from test_quantization import FORMATS
from torch import Tensor
from transformers import AutoModelForCausalLM

TOKENS = [(7 * i) % 290 + 5 for i in range(21)]
ALONE = ParallelGroup()
Make = Callable[[str], Path]


@dataclasses.dataclass
class Reference:
    """A head over whole texts."""

    states: Callable[[Tensor, Tensor], Tensor]  # tokens [T], states [T, H] → states for the next guess
    logits: Callable[[Tensor], Tensor]
    vocabulary: Tensor | None = None

    @torch.no_grad()
    def guesses(self, tokens: list[int], states: Tensor) -> Tensor:
        """[T + GUESSES, vocabulary]: of the text, then of each guess, computed anew from the beginning."""
        tokens = list(tokens)
        out = self.states(torch.tensor(tokens), states)
        logits = self.logits(out)
        for _ in range(GUESSES):
            best = int(logits[-1].argmax())
            tokens.append(best if self.vocabulary is None else int(self.vocabulary[best]))
            states = torch.cat((states, out[-1:]))
            out = self.states(torch.tensor(tokens), states)
            logits = torch.cat((logits, self.logits(out[-1:])))
        return logits


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + offset)


def in_full(model: Any, layer: Any, x: Tensor, **options: Any) -> Tensor:
    """A layer of transformers (or its attention) over a whole text."""
    length = x.shape[0]
    places = torch.arange(length)[None]
    mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    turns = model.model.rotary_emb(x[None], places)
    out = layer(x[None], position_embeddings=turns, attention_mask=mask, position_ids=places, **options)
    return (out[0] if isinstance(out, tuple) else out).view(length, -1)


def mtp_reference(mtp: Mtp, plain: Path, tensors: Tensors) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    layer = model.model.layers[LAYERS]
    eps, offset = model.config.rms_norm_eps, float(mtp.unit_offset)

    def norm(name: str, x: Tensor) -> Tensor:
        return rms_norm(x, tensors[f"{name}.weight"], eps, offset)

    def states_of(tokens: Tensor, states: Tensor) -> Tensor:
        embedded = norm(mtp.embedding_norm, tensors["model.embed_tokens.weight"][tokens])
        states = norm(mtp.hidden_norm, states)
        both = (states, embedded) if mtp.hidden_first else (embedded, states)
        x = in_full(model, layer, torch.cat(both, -1) @ tensors[f"{mtp.projection}.weight"].T)
        return norm(mtp.norm, x)

    def logits_of(states: Tensor) -> Tensor:
        return F.linear(states, tensors["lm_head.weight"])

    return Reference(states_of, logits_of)


@pytest.mark.parametrize("name", MTP)
def test_mtp(tmp_path: Path, name: str) -> None:
    plain, folder = mtp_folders(tmp_path, name)
    truth = mtp_reference(MTP[name], plain, load_file(folder / "model.safetensors"))
    states = torch.randn(len(TOKENS), HIDDEN)
    wanted = truth.guesses(TOKENS, states)
    head = built(folder, ALONE)[1]
    for cut in (0, 8):
        found = torch.cat(guesses(head, ALONE, TOKENS, states, cut))
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() < 1e-4


def test_what_is_stored_twice_is_held_once(tmp_path: Path) -> None:
    """Where the copies are copies; else each is what the checkpoint has."""
    plain, folder = mtp_folders(tmp_path, "deepseek_v3")
    model, head = built(folder, ALONE)
    assert head._embedding is model.embedding

    def changed(tensors: Tensors) -> Tensors:
        for _, copy in MTP["deepseek_v3"].copies:
            tensors[f"{copy}.weight"] = 0.25 * torch.randn(VOCABULARY, HIDDEN)
        return tensors

    other = rewritten(folder, tmp_path / "other", changed)
    tensors = load_file(other / "model.safetensors")
    own = {original: tensors[f"{copy}.weight"] for original, copy in MTP["deepseek_v3"].copies}
    truth = mtp_reference(MTP["deepseek_v3"], plain, tensors | {f"{name}.weight": table for name, table in own.items()})
    states = torch.randn(len(TOKENS), HIDDEN)
    found = torch.cat(guesses(built(other, ALONE)[1], ALONE, TOKENS, states, 0))
    assert (found - truth.guesses(TOKENS, states)).abs().max() < 1e-4


def test_checkpoints_without_the_layer(tmp_path: Path) -> None:
    """The config speaks of it all the same."""
    _, folder = mtp_folders(tmp_path, "glm4_moe")

    def without(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"model.layers.{LAYERS}.")}

    bare = rewritten(folder, tmp_path / "bare", without)
    for one, there in ((folder, True), (bare, False)):
        files = ModelFiles(one.name, one)
        spec = spec_of(files.config)
        assert spec.mtp is not None
        assert has_mtp(spec, files.checkpoint().names()) is there
    with pytest.raises(ModelError, match=r"has no tensor model.layers.3.eh_proj.weight"):
        built(bare, ALONE)


def test_what_a_layer_has_too_much(tmp_path: Path) -> None:
    _, folder = mtp_folders(tmp_path, "mimo")
    more = rewritten(folder, tmp_path / "more", lambda t: t | {"model.mtp_layers.0.gate.weight": torch.ones(2)})
    with pytest.raises(ModelError, match=r"does not use: model.mtp_layers.0.gate.weight"):
        built(more, ALONE)


@pytest.mark.parametrize("projection", ["plain", "quantized"])
@pytest.mark.parametrize("kind", ["awq", "compressed int4"])
def test_quantized_checkpoints(tmp_path: Path, kind: str, projection: str) -> None:
    """Their settings do not say that the projection before the layer is left as it is, which it often is."""
    settings, write, _ = FORMATS[kind]
    plain, folder = mtp_folders(tmp_path, "mimo", intermediate_size=128)
    meant = {}

    def quantized(tensors: Tensors) -> Tensors:
        out = {}
        for name, tensor in tensors.items():
            meant[name] = tensor
            if not name.endswith("_proj.weight") or (projection == "plain" and "input_proj" in name):
                out[name] = tensor
                continue
            stored, meant[name] = write(tensor)
            out |= {name.removesuffix("weight") + end: part.contiguous() for end, part in stored.items()}
        return out

    left = {"ignore": ["lm_head"]} if "ignore" in settings else {}
    small = rewritten(folder, tmp_path / "small", quantized, quantization_config=settings | left)
    behind = f"model.layers.{LAYERS}."
    same = rewritten(
        plain, tmp_path / "same", lambda t: {n: meant[n.replace(behind, "model.mtp_layers.0.")] for n in t}
    )
    states = torch.randn(len(TOKENS), HIDDEN)
    wanted = mtp_reference(MTP["mimo"], same, meant).guesses(TOKENS, states)
    assert (torch.cat(guesses(built(small, ALONE)[1], ALONE, TOKENS, states, 0)) - wanted).abs().max() < 1e-4


# --- EAGLE ---


def eagle_reference(plain: Path, tensors: Tensors, target: Tensors) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    layer = model.model.layers[0]
    layer.input_layernorm = torch.nn.Identity()
    table = tensors.get("embed_tokens.weight", target["model.embed_tokens.weight"])

    def states_of(tokens: Tensor, states: Tensor) -> Tensor:
        x = torch.cat((table[tokens], states), -1) @ tensors["fc.weight"].T + tensors["fc.bias"]
        return in_full(model, layer, x)

    return Reference(states_of, lambda states: F.linear(states, target["lm_head.weight"]))


def eagle_3_reference(plain: Path, tensors: Tensors, target: Tensors, normed_residual: bool = False) -> Reference:
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    attention, eps = model.model.layers[0].self_attn, model.config.rms_norm_eps
    at = "midlayer" if "midlayer.hidden_norm.weight" in tensors else "layers.0"
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).weight = torch.nn.Parameter(tensors[f"{at}.self_attn.{name}.weight"])
    table = tensors.get("embed_tokens.weight", target["model.embed_tokens.weight"])

    def norm(name: str, x: Tensor) -> Tensor:
        return rms_norm(x, tensors[f"{name}.weight"], eps)

    def projected(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{at}.mlp.{name}.weight"])

    def states_of(tokens: Tensor, states: Tensor) -> Tensor:
        normed = norm(f"{at}.hidden_norm", states)
        both = torch.cat((norm(f"{at}.input_layernorm", table[tokens]), normed), -1)
        x = (normed if normed_residual else states) + in_full(model, attention, both)
        y = norm(f"{at}.post_attention_layernorm", x)
        return x + projected("down_proj", F.silu(projected("gate_proj", y)) * projected("up_proj", y))

    def logits_of(states: Tensor) -> Tensor:
        return F.linear(norm("norm", states), tensors["lm_head.weight"])

    vocabulary = torch.arange(DRAFT_VOCABULARY) + tensors["d2t"] if "d2t" in tensors else None
    return Reference(states_of, logits_of, vocabulary)


def test_eagle(checkpoint: Make, tmp_path: Path) -> None:
    target, folder = checkpoint("qwen3"), eagle_folder(tmp_path, 1)
    tables = load_file(target / "model.safetensors")
    model, head = built(target, ALONE, folder)
    assert head.vocabulary is None
    assert head._embedding is model.embedding
    states = torch.randn(len(TOKENS), HIDDEN)
    truth = eagle_reference(tmp_path / "plain", load_file(folder / "model.safetensors"), tables)
    wanted = truth.guesses(TOKENS, states)
    for cut in (0, 8):
        assert (torch.cat(guesses(head, ALONE, TOKENS, states, cut)) - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["first", "embedded", "speculators"])
def test_eagle_3(checkpoint: Make, tmp_path: Path, kind: str) -> None:
    """embedded: with embeddings of its own. speculators: also with that library's names, of tensors and in the
    config."""
    target, folder = checkpoint("qwen3"), eagle_folder(tmp_path, 3)
    if kind != "first":
        folder = rewritten(folder, tmp_path / "own", with_embeddings)
    if kind == "speculators":
        folder = as_speculators(folder, tmp_path / "speculators")
    tensors, tables = (load_file(each / "model.safetensors") for each in (folder, target))
    model, head = built(target, ALONE, folder)
    assert head.taps == (0, 1, 3) if kind == "speculators" else head.taps == (0, 1, 2)
    assert (head._embedding is model.embedding) == (kind == "first")
    assert head.vocabulary is not None
    ids = tensors["t2d"].nonzero().flatten().tolist()
    assert head.vocabulary.tolist() == ids
    truth = eagle_3_reference(tmp_path / "plain", tensors, tables, kind == "speculators")
    states = torch.randn(len(TOKENS), 3 * HIDDEN)
    wanted = truth.guesses(TOKENS, F.linear(states, tensors["fc.weight"]))
    for cut in (0, 8):
        found = torch.cat(guesses(head, ALONE, TOKENS, states, cut))
        assert found.shape == (len(TOKENS) + GUESSES, DRAFT_VOCABULARY)
        assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "phi", "gpt2"])
def test_taps(checkpoint: Make, family: str) -> None:
    """What goes into a layer, in whatever form it comes there; and what comes out of the last one."""
    folder = checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inner = model.transformer.h if family == "gpt2" else model.model.layers
    seen: list[Tensor] = []
    for layer in inner:
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].clone()))
    inner[-1].register_forward_hook(
        lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out).view(len(TOKENS), -1))
    )
    with torch.no_grad():
        model(torch.tensor([TOKENS]))
    decoder = decoder_of(folder)
    run_model(decoder)
    assert decoder.tapped is None
    for taps in ((0, 1, 2), (1,), (0, LAYERS)):
        decoder.taps = taps
        run_model(decoder)
        assert decoder.tapped is not None
        assert (decoder.tapped - torch.cat([seen[tap] for tap in taps], 1)).abs().max() < 1e-4


def decoder_of(folder: Path) -> Decoder:
    files = ModelFiles(folder.name, folder)
    spec = spec_of(files.config)
    return Decoder(builder(files, ALONE), spec, spec.max_position)


@torch.inference_mode()
def run_model(decoder: Decoder) -> None:
    caches = empty_caches(decoder.spec, ALONE, decoder.layers, num_states=1, **CACHE)
    decoder(torch.tensor(TOKENS, dtype=torch.int32), places(0, len(TOKENS)), caches)


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"num_hidden_layers": 2}, "has 2 layers; served are EAGLE heads of one"),
        ({"hidden_size": 32}, "hidden_size is 32, and the model's 64"),
        ({"draft_vocab_size": 90, "target_hidden_size": 32}, "target_hidden_size is 32, and the model's 64"),
        ({"draft_vocab_size": 90, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 40]}}, "2, 41 of a model"),
        ({"draft_vocab_size": 90, "eagle_aux_hidden_state_layer_ids": [1, 1]}, "reads the layers 1, 1 of a model"),
        ({"speculators_model_type": "hass", "transformer_layer_config": {}}, "'hass'; served is 'eagle3'"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
    ],
)
def test_heads_that_do_not_fit(checkpoint: Make, facts: dict[str, Any], why: str) -> None:
    target = spec_of(ModelFiles("target", checkpoint("qwen3")).config)
    with pytest.raises(InvalidParameter, match=f"speculative_config: .*{why}"):
        eagle_spec(completed(LLAMA | facts), target)


def test_which_layers_a_head_reads(checkpoint: Make) -> None:
    """Of a published head on 94 layers: within `eagle_config` are those whose outputs it reads."""
    target = dataclasses.replace(spec_of(ModelFiles("target", checkpoint("qwen3")).config), num_layers=94)
    head = completed(LLAMA | {"draft_vocab_size": 90})
    published = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 46, 90], "use_aux_hidden_state": True}}
    assert eagle_spec(head, target).taps == eagle_spec(head | published, target).taps == (2, 47, 91)
    assert eagle_spec(head | {"eagle_aux_hidden_state_layer_ids": [3, 94]}, target).taps == (3, 94)
    assert eagle_spec(head | {"eagle_config": {"use_aux_hidden_state": False}}, target).taps == ()


def test_what_a_head_has_too_much(checkpoint: Make, tmp_path: Path) -> None:
    folder = eagle_folder(tmp_path, 3)
    more = rewritten(folder, tmp_path / "more", lambda t: t | {"midlayer.self_attn.q_norm.weight": torch.ones(16)})
    with pytest.raises(ModelError, match=r"does not use: midlayer.self_attn.q_norm.weight"):
        built(checkpoint("qwen3"), ALONE, more)


@pytest.mark.parametrize("change", ["too many", "beyond"])
def test_tokens_that_the_model_does_not_have(checkpoint: Make, tmp_path: Path, change: str) -> None:
    def changed(tensors: Tensors) -> Tensors:
        offsets = tensors["d2t"]
        return tensors | {"d2t": torch.cat((offsets, offsets[-1:])) if change == "too many" else offsets + VOCABULARY}

    head = rewritten(eagle_folder(tmp_path, 3), tmp_path / "changed", changed)
    with pytest.raises(InvalidParameter, match="d2t gives tokens that the model does not have"):
        built(checkpoint("qwen3"), ALONE, head)


def test_weights_from_nowhere(checkpoint: Make, tmp_path: Path) -> None:
    """Memory is planned with them: shapes alone, as many as the checkpoints have."""
    for folder, head in (
        (mtp_folders(tmp_path / "mtp", "deepseek_v3")[1], None),
        (checkpoint("qwen3"), eagle_folder(tmp_path, 3)),
    ):
        files = ModelFiles(folder.name, folder)
        spec = spec_of(files.config)
        build = Builder(RandomWeights(torch.float32, torch.device("meta")), ALONE, TorchBackend(), Quantization())
        model = Decoder(build, spec, spec.max_position)
        weights = RandomWeights(torch.float32, torch.device("meta"))
        build = dataclasses.replace(build, weights=weights)
        if head is None:
            mtp_head(build, spec, model, spec.max_position, False)
            stored = load_file(folder / "model.safetensors")
            wanted = sum(
                tensor.numel()
                for name, tensor in stored.items()
                if name.startswith(f"model.layers.{LAYERS}.") and not name.endswith(("head.weight", "tokens.weight"))
            )
            wanted -= stored[
                f"model.layers.{LAYERS}.mlp.gate.e_score_correction_bias"
            ].numel()  # of any shape, not counted
        else:
            config = ModelFiles(head.name, head).config
            eagle_head(build, config, spec, model, spec.max_position, False)
            stored = load_file(head / "model.safetensors")
            wanted = sum(tensor.numel() for name, tensor in stored.items() if name not in ("d2t", "t2d"))
        assert weights.num_parameters == wanted


def test_mimo(tmp_path: Path) -> None:
    """Qwen2's model of the same tensors."""
    plain, folder = mtp_folders(tmp_path, "mimo")
    short = rewritten(
        plain,
        tmp_path / "short",
        lambda tensors: {name: t for name, t in tensors.items() if f"layers.{LAYERS}." not in name},
        num_hidden_layers=LAYERS,
        layer_types=["full_attention"] * LAYERS,
    )
    model = AutoModelForCausalLM.from_pretrained(short, dtype=torch.float32)
    batch = prompts()[2:4]
    for prompt, ours in zip(batch, prompt_logits(engine_for(folder), batch), strict=True):
        with torch.no_grad():
            assert (ours - model(torch.tensor([prompt])).logits[0]).abs().max() < 1e-4


def test_the_last_of_two_stages(checkpoint: Make, tmp_path: Path) -> None:
    """It has no embedding of its own: a head reads that of the checkpoint, or needs one in its folder."""
    last = ParallelGroup(stage=1, stages=2)
    states = torch.randn(len(TOKENS), HIDDEN)
    for name in ("deepseek_v3", "mimo"):
        _, folder = mtp_folders(tmp_path / name, name)
        wanted, found = (guesses(built(folder, group)[1], ALONE, TOKENS, states, 0) for group in (ALONE, last))
        assert torch.equal(torch.cat(wanted), torch.cat(found))
    target, head = checkpoint("qwen3"), eagle_folder(tmp_path, 1)
    with pytest.raises(InvalidParameter, match="has no embed_tokens, and the model's are on another stage"):
        built(target, last, head)
    own = rewritten(head, tmp_path / "own", with_embeddings)
    wanted, found = (guesses(built(target, group, own)[1], ALONE, TOKENS, states, 0) for group in (ALONE, last))
    assert torch.equal(torch.cat(wanted), torch.cat(found))


@pytest.mark.slow
def test_two_ranks(checkpoint: Make, tmp_path: Path) -> None:
    """They give what one gives."""
    orders: list[tuple[Path, Path | None, Tensor]] = [
        (mtp_folders(tmp_path / name, name)[1], None, torch.randn(len(TOKENS), HIDDEN))
        for name in ("deepseek_v3", "qwen3_next", "mimo")
    ]
    for version, width in ((1, HIDDEN), (3, 3 * HIDDEN)):
        states = torch.randn(len(TOKENS), width)
        orders.append((checkpoint("qwen3"), eagle_folder(tmp_path / str(version), version), states))
    store = ParallelGroup.host_store(2)
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(2)]
    workers = [context.Process(target=serve, args=(rank, store.port, pairs[rank][1])) for rank in range(2)]
    for worker in workers:
        worker.start()
    for folder, head, states in orders:
        alone = guesses(built(folder, ALONE, head)[1], ALONE, TOKENS, states, 0)
        for ours, _ in pairs:
            ours.send((folder, head, TOKENS, states.numpy()))
        found, others = (ours.recv() if ours.poll(60) else pytest.fail("a rank does not answer") for ours, _ in pairs)
        assert not isinstance(found, str), found
        assert others == []
        assert (torch.cat([torch.from_numpy(logits) for logits in found]) - torch.cat(alone)).abs().max() < 1e-4
    for ours, _ in pairs:
        ours.send(None)
    for worker in workers:
        worker.join(20)
        worker.kill()

"""The families that are served, by the `architectures` entry of their config."""

import dataclasses
from collections.abc import Callable

from quire_engine.errors import ModelError
from quire_engine.layers.rotary import cos_sin_table
from quire_engine.models import (
    arcee,
    bert,
    bloom,
    cohere,
    deepseek,
    dots1,
    ernie,
    exaone4,
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    helium,
    hunyuan,
    internlm2,
    lfm2,
    llama,
    mamba2,
    mimo,
    minimax_m2,
    mistral,
    mixtral,
    mpt,
    nemotron,
    olmo,
    opt,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from quire_engine.models.base import with_sections
from quire_engine.models.fallback import fallback_spec
from quire_engine.models.vision import whole_config
from quire_engine.multimodal.processor import image_token_of
from quire_engine.pooling import Pooling
from quire_engine.spec import Config, DecoderSpec, ImagesSpec
from quire_engine.weights.text_parts import TEXT_PARTS, TextPart

FAMILIES: dict[str, Callable[[Config], DecoderSpec]] = {
    "ArceeForCausalLM": arcee.spec,
    "BambaForCausalLM": mamba2.bamba,
    "BloomForCausalLM": bloom.spec,
    "CohereForCausalLM": cohere.cohere,
    "Cohere2ForCausalLM": cohere.cohere2,
    "CwmForCausalLM": mistral.spec,
    "DeepseekV2ForCausalLM": deepseek.deepseek_v2,
    "DeepseekV3ForCausalLM": deepseek.deepseek_v3,
    "Dots1ForCausalLM": dots1.spec,
    "Ernie4_5ForCausalLM": ernie.ernie,
    "Ernie4_5_MoeForCausalLM": ernie.ernie_moe,
    "Exaone4ForCausalLM": exaone4.spec,
    "FalconForCausalLM": falcon.spec,
    "GPT2LMHeadModel": gpt2.gpt2,
    "GPTBigCodeForCausalLM": gpt2.gpt_bigcode,
    "GPTNeoXForCausalLM": gpt_neox.spec,
    "GemmaForCausalLM": gemma.gemma,
    "Gemma2ForCausalLM": gemma.gemma2,
    "Gemma3ForCausalLM": gemma.gemma3,
    "GlmForCausalLM": glm.glm,
    "Glm4ForCausalLM": glm.glm4,
    "Glm4MoeForCausalLM": glm.glm4_moe,
    "GptOssForCausalLM": gpt_oss.spec,
    "GraniteForCausalLM": granite.granite,
    "GraniteMoeForCausalLM": granite.granite_moe,
    "GraniteMoeHybridForCausalLM": mamba2.granite_hybrid,
    "GraniteMoeSharedForCausalLM": granite.granite_moe,
    "GPTJForCausalLM": gptj.spec,
    "HeliumForCausalLM": helium.spec,
    "HunYuanDenseV1ForCausalLM": hunyuan.spec,
    "InternLM2ForCausalLM": internlm2.spec,
    "Lfm2ForCausalLM": lfm2.lfm2,
    "Lfm2MoeForCausalLM": lfm2.lfm2_moe,
    "LlamaForCausalLM": llama.spec,
    "Mamba2ForCausalLM": mamba2.mamba2,
    "MiMoForCausalLM": mimo.spec,
    "MiniMaxM2ForCausalLM": minimax_m2.spec,
    "MinistralForCausalLM": mistral.spec,
    "Ministral3ForCausalLM": mistral.ministral3,
    "MistralForCausalLM": mistral.spec,
    "MixtralForCausalLM": mixtral.spec,
    "MptForCausalLM": mpt.spec,
    "NemotronForCausalLM": nemotron.spec,
    "NemotronHForCausalLM": mamba2.nemotron_h,
    "OPTForCausalLM": opt.spec,
    "OlmoForCausalLM": olmo.olmo,
    "Olmo2ForCausalLM": olmo.olmo2,
    "Olmo3ForCausalLM": olmo.olmo3,
    "OlmoeForCausalLM": olmo.olmoe,
    "PhiForCausalLM": phi.spec,
    "Phi3ForCausalLM": phi3.spec,
    "Qwen2ForCausalLM": qwen2.spec,
    "Qwen2MoeForCausalLM": qwen2_moe.spec,
    "Qwen3ForCausalLM": qwen3.spec,
    "Qwen3MoeForCausalLM": qwen3_moe.spec,
    "Qwen3NextForCausalLM": qwen3_next.qwen3_next,
    "Qwen3_5ForCausalLM": qwen3_next.qwen3_5,
    "Qwen3_5MoeForCausalLM": qwen3_next.qwen3_5_moe,
    "SeedOssForCausalLM": seed_oss.spec,
    "SmolLM3ForCausalLM": smollm3.spec,
    "StableLmForCausalLM": stablelm.spec,
    "Starcoder2ForCausalLM": starcoder2.spec,
}
ENCODERS: dict[str, Callable[[Config], DecoderSpec]] = {
    "Bert": bert.bert,
    "Roberta": bert.roberta,
    "XLMRoberta": bert.roberta,
}
_HEADLESS = ("Model", "ForSequenceClassification")
# Raised for values of fields that transformers' class takes as they come.
_WRONG_VALUE = (ArithmeticError, AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def spec_of(config: Config, pooling: Pooling | None = None, *, images: bool = True) -> DecoderSpec:
    """Of a config that is made whole (`weights.hf_config.completed`), of a model that pools where `pooling` says so,
    and takes `images` where it can. Raises ModelError for what is not served."""
    try:
        spec = _family_spec(config)
        if spec.experts is not None:
            spec.experts.check()
        for rope in (spec.rope, spec.local_rope):
            if rope is not None:
                cos_sin_table(rope, 1)  # whether its numbers are numbers
    except KeyError as error:
        raise ModelError(f"config.json lacks {error.args[0]}") from error
    except _WRONG_VALUE as error:
        raise ModelError(f"config.json has a value that its family cannot have: {error}") from error
    if (whole := config.get("text_part_of")) is not None:
        spec = _within(spec, whole)
        if images and pooling is None:
            spec = dataclasses.replace(spec, images=_images_of(config["whole"], TEXT_PARTS[whole]))
    if pooling is None:
        return spec
    if spec.fallback is not None:
        raise ModelError("transformers' code computes this family, which is served for generation alone")
    return dataclasses.replace(spec, pooling=pooling)


def _images_of(whole: Config, part: TextPart) -> ImagesSpec | None:
    """None: the checkpoint's config names no token that stands for images."""
    token = image_token_of(whole)
    made = whole_config(whole)
    levels = getattr(made.vision_config, "deepstack_visual_indexes", None) or ()
    at_once = made.mm_tokens_per_image if part.bidirectional_images else 1
    if token is None:
        return None
    return ImagesSpec(
        config=whole,
        token=token,
        bidirectional=part.bidirectional_images,
        at_once=at_once,
        deepstack=len(levels),
    )


def _within(spec: DecoderSpec, whole: str) -> DecoderSpec:
    """The same decoder in a checkpoint with more in it. Where in it, `models.tied.as_stored` finds out."""
    part, rope = TEXT_PARTS[whole], spec.rope
    scaled = spec.embedding_scale != 1.0 or spec.logits_scale != 1.0 or spec.logits_soft_cap
    if part.family is None and scaled:  # of images too, or not; and transformers' heads of the whole do neither
        raise ModelError(f"the text of {whole} scales its embeddings or its logits; served is text that does not")
    if part.sections is not None and rope is not None:
        rope = with_sections(rope, part.sections, part.sections_interleaved)
    return dataclasses.replace(spec, rope=rope, extra_tensors=spec.extra_tensors + part.others)


def _family_spec(config: Config) -> DecoderSpec:
    """Of a family of the decoder's or, where it knows none, of transformers' own code. Raises ModelError for what
    neither serves."""
    architectures = config.get("architectures") or []
    if (whole := config.get("text_part_of")) is not None and not FAMILIES.keys() & set(architectures):
        raise ModelError(f"the text of {whole} is of {architectures[0]}; served is that of {', '.join(FAMILIES)}")
    for name in architectures:
        if name in FAMILIES:
            return FAMILIES[name](config)
        for ending in _HEADLESS:  # the same family without a head for tokens
            base = name.removesuffix(ending)
            if base != name and base in ENCODERS:
                return ENCODERS[base](config)
            if base != name and f"{base}ForCausalLM" in FAMILIES:
                return FAMILIES[f"{base}ForCausalLM"](config)
    if (spec := fallback_spec(config)) is not None:
        return spec
    raise ModelError(
        f"architectures is {architectures or 'missing'}; served are {', '.join(FAMILIES)}, the text part of "
        f"{', '.join(TEXT_PARTS)}, and what else transformers has for causal language models"
    )

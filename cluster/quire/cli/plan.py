"""`quire plan`: what a model needs per worker, from its config alone."""

from dataclasses import replace

import torch
from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter
from quire_engine.execution.checks import check_served
from quire_engine.memory.dry_run import DryGroup, allocated
from quire_engine.memory.plan import (
    GIB,
    Target,
    dry_limits,
    gpu_target,
    plan_memory,
    resolve_device,
    resolve_dtype,
    usable_bytes,
)
from quire_engine.models.draft_heads import with_stored_mtp
from quire_engine.models.drafts import draft_source, guesses_by
from quire_engine.models.families import spec_of
from quire_engine.pooling import pooling_of
from quire_engine.quantization.config import quantization_of
from quire_engine.weights.resolve import find_model
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quire.cli.config import PlanConfig
from quire.cli.terminal import say


def show_plan(config: EngineConfig, wanted: PlanConfig) -> None:
    """Prints the plan. Raises OutOfMemory when the model does not fit, InvalidParameter for an unknown GPU."""
    files = find_model(config)
    spec = spec_of(files.config, pooling_of(files, config.task), images=config.images_per_prompt > 0)
    spec = with_stored_mtp(spec, files)
    spec.check_parallel(
        config.tensor_parallel_size, config.pipeline_parallel_size, experts_apart=config.enable_expert_parallel
    )
    if wanted.gpu is None:
        device = resolve_device(config)
        target, free = Target.of(device), usable_bytes(config, device)
    else:
        if config.device == "cpu":
            raise InvalidParameter(f"gpu is {wanted.gpu}, and device is cpu; leave one of them out", "gpu")
        target, total = gpu_target(wanted.gpu)
        device, free = torch.device(target.kind), int(total * config.gpu_memory_utilization)
    if wanted.memory_gib is not None:
        free = int(wanted.memory_gib * GIB)
    dtype = resolve_dtype(config, files.config.get("dtype") or files.config.get("torch_dtype"), device)
    quantization = quantization_of(files.config, config.quantization)
    check_served(config, spec, target, dtype, quantization)
    stages = range(config.pipeline_parallel_size)
    draft = draft_source(config, files, spec, quantization)
    plans = [plan_memory(config, spec, quantization, target, dtype, free, stage=stage, draft=draft) for stage in stages]
    plan = min(plans, key=lambda plan: plan.num_pages)
    limits = replace(dry_limits(config, spec, target.kind == "cpu"), max_num_seqs=1)
    whole = allocated(spec, quantization, DryGroup(), limits, chip=target.chip, dtype=dtype)
    guesses = guesses_by(limits.speculation, draft)
    table = Table(title=Text(f"{files.name}, per worker ({config.num_workers} in all)"), show_header=False)
    for name, value in (
        ("device, dtype", f"{target.name}, {str(dtype).removeprefix('torch.')}"),
        ("quantization, cache", f"{quantization.name}, {config.kv_cache_dtype}"),
        ("parameters of the model", f"{whole.parameters / 1e6:,.1f} M"),
        *([("guessed ahead by", guesses)] if guesses else []),
        ("weights", f"{plan.weight_bytes / GIB:.3f} GiB"),
        ("activations", f"{plan.activation_bytes / GIB:.3f} GiB"),
        *(
            [
                ("of these the vision tower", f"{images.weights / GIB:.3f} GiB"),
                ("of these for images", f"{(images.step + images.embeddings) / GIB:.3f} GiB"),
            ]
            if (images := max((one.images for one in plans), key=lambda one: one.weights)).weights
            else []
        ),
        ("cache", f"{plan.cache_bytes / GIB:.3f} GiB: {plan.num_pages:,} pages of {plan.block_size} tokens"),
        *(
            [("recurrent states", f"{plan.num_states:,} of {plan.state_bytes / 2**20:.1f} MiB, one per request")]
            if plan.num_states
            else []
        ),
        ("context", f"{plan.max_model_len:,} tokens"),
        ("requests of that length", f"{plan.full_length_requests:.1f} at once"),
        ("memory to use", f"{free / GIB:.3f} GiB"),
    ):
        table.add_row(name, Text(value))
    console = Console()
    with console.capture() as shown:
        console.print(table)
    say(shown.get(), end="")

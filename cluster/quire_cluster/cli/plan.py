"""`quire plan`: what a model needs per worker, from its config alone."""

from quire_engine.config import EngineConfig
from quire_engine.models.families import spec_of
from quire_engine.plan import GIB, plan_memory, resolve_device, resolve_dtype, usable_bytes
from quire_engine.weights.resolve import find_model
from rich.console import Console
from rich.table import Table


def show_plan(config: EngineConfig, memory_bytes: int | None) -> None:
    """Prints the plan. Raises OutOfMemory when the model does not fit."""
    files = find_model(config)
    spec = spec_of(files.config)
    spec.check_parallel(config.tensor_parallel_size)
    device = resolve_device(config)
    dtype = resolve_dtype(config, files.config.get("dtype") or files.config.get("torch_dtype"), device)
    free = memory_bytes if memory_bytes is not None else usable_bytes(config, device)
    plan = plan_memory(config, spec, device, dtype, free)
    table = Table(title=f"{files.name}, per worker ({config.tensor_parallel_size} in all)", show_header=False)
    for name, value in (
        ("device, dtype", f"{device.type}, {str(dtype).removeprefix('torch.')}"),
        ("parameters", f"{spec.num_parameters / 1e6:,.1f} M"),
        ("weights", f"{plan.weight_bytes / GIB:.3f} GiB"),
        ("activations", f"{plan.activation_bytes / GIB:.3f} GiB"),
        ("cache", f"{plan.cache_bytes / GIB:.3f} GiB: {plan.num_pages:,} pages of {plan.block_size} tokens"),
        ("context", f"{plan.max_model_len:,} tokens"),
        ("requests of that length", f"{plan.full_length_requests:.1f} at once"),
        ("memory to use", f"{free / GIB:.3f} GiB"),
    ):
        table.add_row(name, value)
    Console().print(table)

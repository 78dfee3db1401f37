"""The rules of the house that can be read off the source."""

import ast
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from grpc._cython import cygrpc

ROOT = Path(__file__).parent.parent
ROOMS = {
    "quire_protos": "protos",
    "quire_kernels": "kernels",
    "quire_engine": "engine",
    "quire_cluster": "cluster",
    "quire": "cluster",
}
MAY_IMPORT = {
    "quire_protos": set(),
    "quire_kernels": set(),
    "quire_engine": {"quire_kernels"},
    "quire_cluster": {"quire_protos", "quire_engine"},
    "quire": {"quire_protos", "quire_engine", "quire_cluster"},
}
ENGINE_FLOORS = (  # lowest first; a room imports from those before it
    "errors",
    "config",
    "request",
    "fairness",
    "turns",
    "waiting",
    "step",
    "guidance",
    "outcome",
    "one_shot",
    "parallel",
    "upload",
    "allocator",
    "weights",
    "pooling",
    "spec",
    "text",
    "multimodal",
    "quantization",
    "sampling",
    "batch",
    "speculation",
    "cache",
    "scheduler",
    "engine",
    "layers",
    "models",
    "memory",
    "execution",
)
FORBIDDEN = {"quire_kernels": {"ray", "grpc"}, "quire_engine": {"ray", "grpc"}}


def sources(package: str) -> list[Path]:
    folder = ROOT / ROOMS[package] / package
    return [path for path in folder.rglob("*.py") if "_pb2" not in path.name]


def imports(path: Path) -> set[str]:
    """Every module a file imports, by its full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module or "")
    return found


def rooms_of(package: str) -> dict[str, dict[str, set[str]]]:
    """The rooms (folders and modules right in a package), each with those it imports from and the files that do.
    Imports inside functions count."""
    folder = ROOT / ROOMS[package] / package
    rooms: dict[str, dict[str, set[str]]] = {}
    for path in sources(package):
        room = rooms.setdefault(path.relative_to(folder).parts[0].removesuffix(".py"), {})
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for top, _, rest in (name.partition(".") for name in names):
                if top == package:
                    inner = rest.split(".")[0]
                    known = (folder / inner).is_dir() or (folder / f"{inner}.py").exists()
                    room.setdefault(inner if inner and known else "__init__", set()).add(str(path.relative_to(ROOT)))
    return {name: {other: files for other, files in room.items() if other != name} for name, room in rooms.items()}


@pytest.mark.parametrize("package", ROOMS)
def test_no_knots_between_rooms(package: str) -> None:
    rooms = rooms_of(package)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            knot = [*path[path.index(name) :], name]
            arrows = [f"{a} → {b} ({', '.join(sorted(rooms[a][b]))})" for a, b in pairwise(knot)]
            raise AssertionError(f"{package} has a knot: {'; '.join(arrows)}")
        if name not in done:
            for following in rooms.get(name, {}):
                visit(following, (*path, name))
            done.add(name)

    for name in rooms:
        visit(name, ())


def test_the_engine_has_floors() -> None:
    rooms = rooms_of("quire_engine")
    assert set(rooms) - {"__init__"} == set(ENGINE_FLOORS), "a room is on no floor, or a floor has no room"
    for place, name in enumerate(ENGINE_FLOORS):
        for other, files in rooms[name].items():
            assert other in ENGINE_FLOORS[:place], f"{', '.join(sorted(files))}: {name} lies below {other}"


def test_imports_go_one_way() -> None:
    for package, allowed in MAY_IMPORT.items():
        files = sources(package)
        assert files, package
        for path in files:
            tops = {name.split(".")[0] for name in imports(path)}
            ours = tops & MAY_IMPORT.keys() - {package}
            assert ours <= allowed, f"{path.relative_to(ROOT)} imports {ours - allowed}"
            banned = tops & FORBIDDEN.get(package, set())
            assert not banned, f"{path.relative_to(ROOT)} imports {banned}"


def test_no_cycles_between_modules() -> None:
    graph: dict[str, set[str]] = {}
    for package, folder in ROOMS.items():
        for path in sources(package):
            name = ".".join(path.relative_to(ROOT / folder).with_suffix("").parts).removesuffix(".__init__")
            top_level = ast.parse(path.read_text()).body
            graph[name] = set()
            for node in top_level:
                if isinstance(node, ast.ImportFrom):
                    graph[name].add(node.module or "")
                elif isinstance(node, ast.Import):
                    graph[name] |= {alias.name for alias in node.names}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path, name])
        if name in done or name not in graph:
            return
        for following in graph[name]:
            visit(following, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_the_engine_runs_without_ray_and_grpc() -> None:
    code = (
        "import sys; sys.modules['ray'] = sys.modules['grpc'] = sys.modules['gguf'] = None\n"
        "import quire_engine.engine, quire_engine.execution.runner\n"
        "import quire_engine.text.tokenizer, quire_engine.text.output"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_client_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['ray'] = None\nfrom quire import Client, AsyncClient"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generated_protos_are_up_to_date(tmp_path: Path) -> None:
    folder = ROOT / "protos/quire_protos/v1"
    protos = [str(path) for path in sorted(folder.glob("*.proto"))]
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "grpc_python_out", "pyi_out")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", *outputs, *protos], check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "quire_protos/v1").iterdir()}
    kept = {
        path.name: path.read_text()
        for path in folder.iterdir()
        if "_pb2" in path.name and path.suffix in (".py", ".pyi")
    }
    assert made == kept, "run `make protos`"


def test_pickle_is_only_in_the_step_channel() -> None:
    """Which is memory of one host; what goes between hosts is in wire.py's closed list of types. torch pickles too."""
    picklers = ("pickle", "cloudpickle", "dill", "marshal", "shelve")
    network = {"socket", "grpc", "torch", "asyncio", "ray"}
    torch_s = re.compile(r"\b(\w+_object_list|(gather|all_gather|scatter)_object\w*|torch\.(load|save)|rpc_\w+)\(")
    for package in ROOMS:
        for path in sources(package):
            tops = {name.split(".")[0] for name in imports(path)}
            if path.name == "channel.py":
                assert not tops & network, f"{path.relative_to(ROOT)} imports {tops & network}"
            else:
                assert not tops & set(picklers), f"{path.relative_to(ROOT)} imports {tops & set(picklers)}"
            found = torch_s.search(path.read_text())
            assert not found, f"{path.relative_to(ROOT)} calls {found and found[0]}, which pickles"


def test_grpc_knows_every_option_that_is_set() -> None:
    """It passes over names that it does not know, and says nothing."""
    library = Path(cygrpc.__file__).read_bytes()
    named = {
        name
        for package in ("quire", "quire_cluster")
        for path in sources(package)
        for name in re.findall(r'"(grpc\.[a-z0-9_.]+)"', path.read_text())
    }
    assert len(named) > 10
    assert [name for name in sorted(named) if name.encode() not in library] == []


def test_no_file_grows_beyond_500_lines() -> None:
    for package in ROOMS:
        for path in sources(package):
            assert len(path.read_text().splitlines()) <= 500, path.relative_to(ROOT)


@pytest.mark.parametrize("name", ["on-premise", "aws", "gcp"])
def test_ray_accepts_the_deployment(name: str) -> None:
    """As far as it reads the file without asking the cloud. A head without GPUs, whose workers come and go, but for
    machines of one's own."""
    import yaml
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / f"deploy/ray/{name}.yaml").read_text())
    if name == "on-premise":
        config["provider"] |= {"head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}
    filled = prepare_config(config)
    validate_config(filled)
    commands = " ".join(filled["head_setup_commands"])
    assert not re.search(r"(?<!\.venv/bin/)pip install", commands), "Ray's own defaults, for its own Python"
    if name != "on-premise":
        for kind, node in filled["available_node_types"].items():
            is_head = kind == filled["head_node_type"]
            assert (node["min_workers"], node["max_workers"]) == (0, 0 if is_head else 8)

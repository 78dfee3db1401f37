"""Deployments: the file that an operator writes, what of it is kept, and what a change of it replaces."""

import typing
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quire.cli.deployments import read_deployments
from quire_cluster.admin import deployment_of
from quire_cluster.deployment import Deployment, DeploymentConfig, make_deployment
from quire_engine.config import EngineConfig, kind_of
from quire_engine.errors import InvalidParameter
from quire_protos.v1 import control_pb2 as pb

NAME = "org/qwen2.5-7b_x"


def refused(folder: Path, text: str | bytes) -> str:
    path = folder / "models.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InvalidParameter) as error:
        read_deployments(str(path))
    said = str(error.value)
    assert "\n" not in said.strip() or "line" in said
    assert str(path) in said
    return said.replace(str(path), "FILE")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{NAME}:\n  model: m\n  max-sequences: 4\n", f"FILE, line 3: {NAME} has an unknown option: max_sequences"),
        (f"{NAME}:\n  model: m\n\n  max-num-seqs: many\n", f"FILE, line 4: {NAME}: max_num_seqs is 'many'; it must be"),
        (f"# x\n{NAME}:\n  max_num_seqs: 4.5\n  model: m\n", f"FILE, line 3: {NAME}: max_num_seqs is 4.5; it must be"),
        (f"{NAME}:\n  model: m\n  min-replicas: -1\n", f"FILE, line 3: {NAME}: min_replicas is -1; it must be"),
        (f"{NAME}:\n  model: [m]\n", f"FILE, line 2: {NAME}: model is a list; it must be"),
        ("a:\n  model: m\nb:\n  dtype: auto\n", "FILE, line 3: b has no model; give a checkpoint folder"),
        ("a:\n  model: m\nb:\n", "FILE, line 3: b is no mapping of options to values"),
        ("a: m\n", "FILE, line 1: a is no mapping of options to values"),
        ("yes:\n  model: m\n", "FILE: YAML reads the name True as bool, no text; put it into quotes"),
        ("a:\n  model: m\n  min-replicas: 3\n  max-replicas: 2\n", "FILE, line 4: a: max_replicas is 2, which is less"),
        ("a:\n  model: m\n  aliases: x,,y\n", "FILE, line 3: a: '' is no name for a model"),
        ("a:\n  model: m\n  aliases: [x, 5]\n", "FILE, line 3: a: aliases is a list; it must be"),
        ('"a,b":\n  model: m\n', "FILE, line 1: a,b: 'a,b' is no name for a model"),
        ("a:\n  model: m\n  chat-template: none.jinja\n", "FILE, line 3: a: chat_template cannot be read"),
        ("a:\n  model: m\nb:\n  model: n\na:\n  model: o\n", "FILE cannot be read: line 5 has a for the second time"),
        ("a:\n  model: m\n  max-num-seqs: 4\n  max_num_seqs: 5\n", "FILE cannot be read: line 4 has max_num_seqs for"),
        ("a:\n  model: m\n b: c\n", "line 3"),
        ("a:\n  model: 'm\n", "line 3"),
        ("a:\n  model: !!python/name:os.system x\n", "line 2"),
        ("- a\n- b\n", "FILE is no mapping of names to options"),
        ("", "FILE is no mapping of names to options"),
        (b"a: \xff", "FILE cannot be read"),
        (b"# " + b"x" * (1 << 20), "FILE cannot be read: it has more than 1048576 bytes"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    found = refused(tmp_path, text)
    assert found.startswith(said) if said.startswith("FILE") else said in found


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text("abé:-\n #[]{}\"'&*!|>?%@1. ", max_size=60).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    try:
        read_deployments(str(path))
    except InvalidParameter as error:
        assert len(str(error)) < 2000


def test_what_the_cluster_refuses_is_located(tmp_path: Path) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(f"{NAME}:\n  model: m\n  aliases: [x, y]\nother:\n  model: n\n")
    file = read_deployments(str(path))
    for parameter, line in ((f"{NAME}.aliases", 3), (f"{NAME}.dtype", 1), ("other.model", 5), ("other.name", 4)):
        located = file.located(InvalidParameter("it cannot be", parameter))
        assert (str(located), located.parameter) == (f"{path}, line {line}: it cannot be", parameter)
    assert str(file.located(InvalidParameter("why", None))) == f"{path}: why"


def test_what_lies_beside_the_file_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    (folder / "weights").mkdir(parents=True)
    (folder / "talk.jinja").write_text("{{ messages }} é")
    (folder / "models.yaml").write_text(
        "a:\n  model: weights\n  chat-template: talk.jinja\n  aliases: [b, c/d]\n  max-num-seqs: 4\n"
        "'7':\n  model: org/of-the-hub\n  gpu-memory-utilization: 0.5\n"
    )
    monkeypatch.chdir(tmp_path)
    first, second = read_deployments("here/models.yaml").deployments
    assert (first.names, first.chat_template) == (("a", "b", "c/d"), "{{ messages }} é")
    assert first.engine == EngineConfig(model=str(folder / "weights"), max_num_seqs=4)
    assert (second.name, second.engine) == ("7", EngineConfig(model="org/of-the-hub", gpu_memory_utilization=0.5))


def test_what_is_sent_is_what_was_written(tmp_path: Path) -> None:
    """Numbers go as JSON has them, without integers."""
    path = tmp_path / "models.yaml"
    path.write_text(
        "a:\n  model: m\n  aliases: [b]\n  max-num-seqs: 4\n  enable-prefix-caching: false\n  min_replicas: 0"
    )
    file = read_deployments(str(path))
    spec = pb.DeploymentSpec(name="a", chat_template="x")
    spec.options.update(file.options["a"])
    sent = deployment_of(pb.DeploymentSpec.FromString(spec.SerializeToString()))
    assert sent == replace(file.deployments[0], chat_template="x")
    spec.options.update({"max_num_seqs": 4.5})
    with pytest.raises(InvalidParameter, match=r"a: max_num_seqs is 4\.5; it must be") as error:
        deployment_of(spec)
    assert error.value.parameter == "a.max_num_seqs"


def options(config: type, f: Any) -> st.SearchStrategy[Any]:
    """Of a field: any value that is good by itself."""
    kind = kind_of(typing.get_type_hints(config)[f.name])
    if kind is bool:
        return st.booleans()
    if kind is str:
        return st.sampled_from(f.metadata.get("choices") or ("some", "other é"))
    least, most = f.metadata["least"], min(f.metadata["most"], 2.0**50)
    if f.metadata["above"] > -1e300:
        least = f.metadata["above"] + 1e-3
    least = max(least, -(2.0**50))
    return st.integers(int(least), int(most)) if kind is int else st.floats(least, most)


def taken(config: type, changes: dict[str, Any], base: dict[str, Any]) -> Any:
    """The configuration; of values that do not go together the last ones are left out."""
    while True:
        try:
            return config(**(base | changes))
        except InvalidParameter:
            changes = dict(list(changes.items())[:-1])


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    made = []
    for config, base in ((EngineConfig, {"model": "m"}), (DeploymentConfig, {})):
        chosen = draw(st.lists(st.sampled_from(fields(config)), max_size=4, unique_by=lambda f: f.name))
        made.append(taken(config, {f.name: draw(options(config, f)) for f in chosen}, base))
    return Deployment(draw(st.sampled_from(("a", "org/é 1"))), *made, draw(st.none() | st.text(max_size=5)))


@settings(max_examples=200, deadline=None)
@given(deployments())
def test_what_is_kept_is_read_again(deployment: Deployment) -> None:
    read = Deployment.from_json(deployment.to_json())
    assert read == deployment
    assert read.engine_revision == deployment.engine_revision
    assert read.model_revision == deployment.model_revision


# What the tokens of an answer depend on.
TOKENS = {
    "model",
    "tokenizer",
    "task",
    "revision",
    "load_format",
    "quantization",
    "kv_cache_dtype",
    "dtype",
    "max_model_len",
}


def another(f: Any, config: Any) -> Any:
    """A value that this field does not have."""
    now, kind = getattr(config, f.name), kind_of(typing.get_type_hints(type(config))[f.name])
    if kind is bool:
        return not now
    if kind is str:
        other = '{"image": 2}' if f.name == "limit_mm_per_prompt" else "other"
        other = "{}" if f.name == "speculative_config" else other
        return next((one for one in f.metadata.get("choices") or () if one != now), other)
    candidates: list[float] = [f.metadata["least"], f.metadata["most"], 1, 2, 0.5, 64]
    for one in candidates:
        if one != now and abs(one) < 2**60 and f.metadata["above"] < one <= f.metadata["most"]:
            try:
                return getattr(replace(config, **{f.name: kind(one)}), f.name)
            except InvalidParameter:
                continue
    raise AssertionError(f"no other value for {f.name}")


@pytest.mark.parametrize("f", fields(EngineConfig), ids=lambda f: f.name)
def test_any_option_of_the_engine_replaces_replicas(f: Any) -> None:
    """Where tokens depend on it, what one had begun is not gone on with by the other."""
    plain = Deployment("a", EngineConfig(model="m"), DeploymentConfig())
    changed = replace(plain, engine=replace(plain.engine, **{f.name: another(f, plain.engine)}))
    assert changed.engine_revision != plain.engine_revision
    assert (changed.model_revision != plain.model_revision) == (f.name in TOKENS)


@pytest.mark.parametrize("f", fields(DeploymentConfig), ids=lambda f: f.name)
def test_no_option_of_the_deployment_does(f: Any) -> None:
    plain = Deployment("a", EngineConfig(model="m"), DeploymentConfig())
    changed = replace(plain, config=replace(plain.config, **{f.name: another(f, plain.config)}))
    assert changed != plain
    assert (changed.engine_revision, changed.model_revision) == (plain.engine_revision, plain.model_revision)


def test_a_chat_template_is_the_gateways() -> None:
    """No replica is replaced for it, and those that are there serve what is new."""
    plain = Deployment("a", EngineConfig(model="m"), DeploymentConfig())
    changed = replace(plain, chat_template="x")
    assert changed != plain
    assert (changed.engine_revision, changed.model_revision) == (plain.engine_revision, plain.model_revision)


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_deployment("", {"model": "m"}, None),
        lambda: make_deployment(" a", {"model": "m"}, None),
        lambda: make_deployment("a\n", {"model": "m"}, None),
        lambda: make_deployment("a" * 201, {"model": "m"}, None),
    ],
)
def test_what_no_client_could_name_is_refused(make: Callable[[], Deployment]) -> None:
    with pytest.raises(InvalidParameter, match="is no name for a model"):
        make()

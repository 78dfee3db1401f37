"""Operators' commands: `quire deploy`, `status`, `scale`, `drain`, `delete`, `why`, `shutdown`: calls of the Control
service."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format
from quire_cluster.deployment import MOST_REPLICAS
from quire_cluster.keys import bearer
from quire_engine.errors import InvalidParameter, ServerError
from quire_protos.v1 import control_pb2 as pb
from quire_protos.v1 import control_pb2_grpc
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from quire.cli.config import AdminConfig
from quire.cli.deployments import DeploymentFile, read_deployments
from quire.cli.terminal import say

PARAMETER = "quire-parameter"  # trailing metadata: what was wrong, as deployment.option
_DEPLOY, _CALL = 600.0, 30.0  # seconds; a model's files may have to be fetched before they can be looked at
_REFRESH = 1.0  # seconds between two looks of `status --watch`


def operator_file() -> Path:
    """Where `quire start` writes the address and the key."""
    return Path(os.environ.get("QUIRE_HOME") or Path.home() / ".quire") / "admin.json"


class Control:
    """A connection of an operator. Calls raise QuireError with what the cluster said."""

    def __init__(self, config: AdminConfig) -> None:
        """Raises ServerError where no cluster is known here."""
        known = {} if config.admin_address and self._key(config) else _known()
        self._address = config.admin_address or known["address"]
        self._metadata = bearer(self._key(config) or known["key"])
        self._channel = grpc.insecure_channel(self._address, options=[("grpc.enable_http_proxy", 0)])
        self._stub: Any = control_pb2_grpc.ControlStub(self._channel)

    @staticmethod
    def _key(config: AdminConfig) -> str | None:
        return config.admin_key or os.environ.get("QUIRE_ADMIN_KEY")

    def __enter__(self) -> "Control":
        return self

    def __exit__(self, *exception: object) -> None:
        self._channel.close()

    def call(self, method: str, request: Any, timeout: float = _CALL) -> Any:
        """Raises InvalidParameter for what the cluster refuses, ServerError for everything else."""
        try:
            return getattr(self._stub, method)(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            call: Any = error
            code, details = call.code(), str(call.details())
            if code is grpc.StatusCode.UNAVAILABLE:
                raise ServerError(
                    f"no controller answers at {self._address} ({details}); one that died is back in seconds; where "
                    "there is none, start a cluster with `quire start`"
                ) from error
            if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
                parameter = dict(call.trailing_metadata() or ()).get(PARAMETER)
                raise InvalidParameter(details, str(parameter) if parameter else None) from error
            raise ServerError(details) from error


def _known() -> dict[str, str]:
    path = operator_file()
    try:
        found: dict[str, str] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ServerError(
            f"no cluster is known here: {path} is not there; `quire start` writes it, or give --admin-address and "
            "--admin-key"
        ) from error
    except (OSError, ValueError) as error:
        raise ServerError(f"{path} cannot be read: {error}") from error
    return found


# ---- deploy ---------------------------------------------------------------------------------------------------------


def deploy(path: str, config: AdminConfig) -> None:
    """Makes what a file says what is served."""
    file = read_deployments(path)
    request = pb.DeployRequest()
    for deployment in file.deployments:
        spec = request.deployments.add(name=deployment.name, chat_template=deployment.chat_template)
        spec.options.update(file.options[deployment.name])
    with Control(config) as control:
        try:
            done = control.call("Deploy", request, _DEPLOY).done
        except InvalidParameter as error:
            raise file.located(error) from error
        for deployment in file.deployments:
            say(f"{deployment.name}: {done[deployment.name]}")
        _say_others(control, file)


def _say_others(control: Control, file: DeploymentFile) -> None:
    named = {deployment.name for deployment in file.deployments}
    others = [one.name for one in control.call("Status", pb.StatusRequest()).deployments if one.name not in named]
    if others:
        say(f"left as they are: {', '.join(others)} (not in {file.path}; `quire delete` ends one)")


# ---- one call each --------------------------------------------------------------------------------------------------


def scale(name: str, replicas: str, config: AdminConfig) -> None:
    """To a number of replicas, or `auto`."""
    if replicas != "auto" and not (replicas.isdecimal() and int(replicas) <= MOST_REPLICAS):
        raise InvalidParameter(
            f"replicas is {replicas!r:.80}; give a number up to {MOST_REPLICAS}, or auto", "replicas"
        )
    count = None if replicas == "auto" else int(replicas)
    with Control(config) as control:
        control.call("Scale", pb.ScaleRequest(name=name, replicas=count))
    say(f"{name}: {'by load' if count is None else count} from now on")


def drain(what: str, config: AdminConfig) -> None:
    """A replica, as DEPLOYMENT/SLOT, or a node."""
    deployment, slash, slot = what.rpartition("/")
    with Control(config) as control:
        if slash and slot.isdecimal():
            control.call("Drain", pb.DrainRequest(replica=pb.ReplicaName(deployment=deployment, slot=int(slot))))
        else:
            control.call("Drain", pb.DrainRequest(node=what))
    say(f"{what} drains; `quire status` shows how far it is")


def delete(name: str, config: AdminConfig) -> None:
    """A deployment."""
    with Control(config) as control:
        control.call("Delete", pb.DeleteRequest(name=name))
    say(f"{name}: deleted; what runs there ends")


def shutdown(config: AdminConfig) -> None:
    """The whole cluster, once its gateways have finished what runs."""
    with Control(config) as control:
        control.call("Shutdown", pb.ShutdownRequest(), timeout=86400.0)
    operator_file().unlink(missing_ok=True)
    say("the cluster has ended")


# ---- what is seen ---------------------------------------------------------------------------------------------------


def status(config: AdminConfig, *, watch: bool, as_json: bool) -> None:
    """Once, or again and again."""
    with Control(config) as control:

        def look() -> pb.StatusResponse:
            found: pb.StatusResponse = control.call("Status", pb.StatusRequest())
            return found

        if as_json:
            say(
                json_format.MessageToJson(
                    look(), preserving_proto_field_name=True, always_print_fields_with_no_presence=True
                )
            )
        elif watch:
            _watch(lambda: shown(look()))
        else:
            Console(highlight=False).print(shown(look()))


def _watch(look: Callable[[], Group]) -> None:
    with Live(look(), auto_refresh=False, screen=True) as live:
        while True:
            time.sleep(_REFRESH)
            live.update(look(), refresh=True)


def shown(found: pb.StatusResponse) -> Group:
    """A page for a terminal."""
    deployments: list[Group | str] = [_deployment(one, found) for one in found.deployments]
    nothing = "nothing is deployed yet: `quire deploy FILE`\n"
    return Group(*(deployments or [nothing]), _gateways(found), "", _nodes(found))


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))


def _deployment(one: pb.DeploymentStatus, found: pb.StatusResponse) -> Group:
    names = ", ".join((one.name, *one.aliases))
    serving = sum(replica.phase == "serving" for replica in one.replicas)
    title = f"{names}: {one.state}, {serving} of {one.wanted} replicas ({one.why_wanted})"
    title += f", {one.tokens_per_second:.0f} tokens/s"
    waits = dict(one.waiting_for)
    if waits:
        title += "\nwaiting: " + ", ".join(f"{count} for {reason}" for reason, count in sorted(waits.items()))
    table = _table("replica", "phase", "since", "nodes", "running", "waiting", "cache", "")
    addresses = {node.id: node.address for node in found.nodes}
    for replica in one.replicas:
        nodes = sorted({addresses.get(node, node[:8]) for node in replica.nodes})
        notes = [replica.failure] if replica.failure else []
        notes += ["to be replaced"] if replica.outdated and replica.phase != "draining" else []
        table.add_row(
            f"{one.name}/{replica.slot}",
            replica.phase,
            ago(replica.seconds),
            ", ".join(nodes) or "-",
            str(replica.running),
            str(replica.waiting),
            f"{replica.usage:.0%}",
            "; ".join(notes),
        )
    return Group(Text(title, style="bold"), *([table] if one.replicas else []), "")


def _gateways(found: pb.StatusResponse) -> Table:
    table = _table("gateway: HTTP", "gRPC", "ready", "requests", "node")
    for one in found.gateways:
        table.add_row(one.http, one.grpc, "yes" if one.ready else "no", str(one.open_requests), one.node[:8])
    return table


def _nodes(found: pb.StatusResponse) -> Table:
    table = _table("node", "address", "CPUs", "GPUs", "")
    for one in found.nodes:
        notes = ["head"] if one.head else []
        notes += ["leaving"] if one.leaving else []
        table.add_row(one.id[:8], one.address, f"{one.cpus:g}", f"{one.gpus:g}", ", ".join(notes))
    return table


def ago(seconds: float) -> str:
    """As people say it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def why(request_id: str, config: AdminConfig) -> None:
    """What a request waits for, or all that wait."""
    with Control(config) as control:
        found = control.call("Why", pb.WhyRequest(request_id=request_id)).requests
    if not found:
        say(f"no request {request_id} is open" if request_id else "nothing waits")
        return
    table = _table("request", "model", "for", "since", "estimate", "tokens")
    for one in found:
        about = ago(one.estimate) if one.HasField("estimate") else "-"
        name = f"{one.request_id}/{one.index}"
        table.add_row(name, one.deployment, one.reason or "it runs", ago(one.since), about, str(one.tokens))
    Console(highlight=False).print(table)

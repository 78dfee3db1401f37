"""Configurations of load balancers: what reads them accepts them."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from quire_cluster.load_balancer import KINDS, GatewayAddress, Listens, configuration

GATEWAYS = [
    GatewayAddress(name="gateway-a-0", host="10.0.0.1", http_port=8000, grpc_port=50051),
    GatewayAddress(name="gateway-b-0", host="fd00::2", http_port=8001, grpc_port=50052),
]
CHECKS = {"haproxy": ["haproxy", "-c", "-f"], "nginx": ["nginx", "-t", "-q", "-c"]}


def made(kind: str, folder: Path, *gateways: GatewayAddress) -> str:
    listens = Listens(host="127.0.0.1", port=8080, grpc_port=50050, socket=str(folder / "socket"))
    return configuration(kind, gateways, listens)


@pytest.mark.parametrize("kind", CHECKS)
def test_it_is_accepted(kind: str, tmp_path: Path) -> None:
    if shutil.which(kind) is None:
        pytest.skip(f"{kind} is not installed here; Debian's package is called {kind}")
    path = tmp_path / kind
    path.write_text(made(kind, tmp_path, *GATEWAYS))
    done = subprocess.run([*CHECKS[kind], str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_envoys_structure(tmp_path: Path) -> None:
    """Its program is no package here: what is shown is that both ways lead to both gateways, by their health."""
    clusters = yaml.safe_load(made("envoy", tmp_path, *GATEWAYS))["static_resources"]["clusters"]
    assert [one["name"] for one in clusters] == ["http", "grpc"]
    for one, ports in zip(clusters, ((8000, 8001), (50051, 50052)), strict=True):
        [endpoints] = one["load_assignment"]["endpoints"]
        found = [entry["endpoint"] for entry in endpoints["lb_endpoints"]]
        assert [entry["address"]["socket_address"]["port_value"] for entry in found] == list(ports)
        assert [entry["health_check_config"]["port_value"] for entry in found] == [8000, 8001]
        assert one["health_checks"][0]["http_health_check"]["path"] == "/ready"
    [none] = yaml.safe_load(made("envoy", tmp_path))["static_resources"]["clusters"][0]["load_assignment"]["endpoints"]
    assert none["lb_endpoints"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_gateways_that_share_ports_are_one(kind: str, tmp_path: Path) -> None:
    first = GATEWAYS[0]
    twin = GatewayAddress(name="gateway-a-1", host=first.host, http_port=8000, grpc_port=50051)
    assert made(kind, tmp_path, first, twin) == made(kind, tmp_path, twin, first) == made(kind, tmp_path, first)

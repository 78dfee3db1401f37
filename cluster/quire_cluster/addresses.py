"""Hosts and ports, as they are written and as they are meant."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether `host` means this machine, and nobody else reaches it by that."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def with_port(host: str, port: int) -> str:
    """host:port, where an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_of(address: str) -> str:
    """The host of host:port, without the brackets of IPv6."""
    return address.rpartition(":")[0].removeprefix("[").removesuffix("]")

"""The hosts that a server may fetch from: which names and addresses a URL may hold, and where names may lead.

What decides is never the name alone, which anybody may point anywhere, but each address that a connection is made to.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from yarl import URL

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_USUAL_PORTS = frozenset((80, 443))
_ANY = "*"
_LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_NUMBER_AT_END = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")  # which libraries read as an address, however written
_GLOBAL = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NOT_PUBLIC: tuple[Network, ...] = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # between carriers and customers; some clouds' metadata
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # Azure's own services
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocols; Oracle's metadata
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved; broadcast
        "2001::/23",  # protocols; Teredo, which tunnels to an IPv4 address
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
    )
)


def canonical(host: str) -> str | Address:
    """A URL's host as an address, or as a name in ASCII and lower case. Raises ValueError for what is neither, as for
    an address in an unusual spelling (127.1, 0x7f000001).
    """
    if "%" in host:
        raise ValueError(f"{host!r:.80} holds a %")  # an escape, or one of this machine's networks after an address
    if ":" in host:
        return unwrapped(ipaddress.IPv6Address(host))
    if not host.isascii():
        host = URL.build(scheme="http", host=host).raw_host or ""
    host = host.lower().removesuffix(".")
    if _NUMBER_AT_END.fullmatch(host):
        return ipaddress.IPv4Address(host)
    if not _NAME.fullmatch(host):
        raise ValueError(f"{host!r:.80} is no name of a host")
    return host


def unwrapped(address: Address) -> Address:
    """The IPv4 address that an IPv6 one is another spelling of."""
    return getattr(address, "ipv4_mapped", None) or address


def is_public(address: Address) -> bool:
    """Whether it is a host's on the internet, as IANA gives them out, and no cloud's own service."""
    address = unwrapped(address)
    if any(address in network for network in _NOT_PUBLIC):
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return True
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if address.sixtofour is not None:
        return is_public(address.sixtofour)
    return address in _GLOBAL


@dataclass(frozen=True)
class _Entry:
    """A name, * or a network, and its ports; None: any."""

    name: str | None
    network: Network | None
    ports: frozenset[int] | None

    def has(self, port: int) -> bool:
        return self.ports is None or port in self.ports


class Hosts:
    """Of a list of entries: names (example.org), addresses and networks (10.1.2.3, 10.0.0.0/8, fd00::/8), or * for any.

    An entry is for the ports 80 and 443, or for the one it ends with (example.org:8080, [fd00::/8]:8080; :* for any).
    Names, and *, lead to public addresses alone, and to those that have entries of their own; localhost is this
    machine's loopback. Raises ValueError for an entry that is none of these.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self._entries = [_entry(text) for text in entries]

    def __bool__(self) -> bool:
        return bool(self._entries)

    def may_be_asked(self, host: str | Address, port: int) -> bool:
        """Whether a URL may hold such a host."""
        if isinstance(host, str):
            return any(entry.name in (_ANY, host) and entry.has(port) for entry in self._entries)
        anybody = any(entry.name == _ANY and entry.has(port) for entry in self._entries)
        return self._has(host, port) or (anybody and is_public(host))

    def may_lead_to(self, name: str, address: Address, port: int) -> bool:
        """Whether a name that may be asked may do so by this address."""
        own = name == "localhost" and unwrapped(address).is_loopback
        return (
            is_public(address)
            or self._has(address, port)
            or (own and any(entry.name == name and entry.has(port) for entry in self._entries))
        )

    def _has(self, address: Address, port: int) -> bool:
        address = unwrapped(address)
        return any(
            entry.network is not None and address in entry.network and entry.has(port) for entry in self._entries
        )


def _entry(text: str) -> _Entry:
    if text.startswith("[") and "]" in text:
        host, _, port = text[1:].partition("]")
    elif text.count(":") > 1:
        host, port = text, ""
    else:
        host, colon, port = text.partition(":")
        port = colon + port
    if port == ":*":
        ports = None
    elif not port:
        ports = _USUAL_PORTS
    elif re.fullmatch(":[0-9]{1,5}", port, re.ASCII) and 1 <= int(port[1:]) <= 65535:
        ports = frozenset((int(port[1:]),))
    else:
        raise ValueError(f"{text!r:.80} does not end with a port")
    if host == _ANY:
        return _Entry(_ANY, None, ports)
    if (":" in host or "/" in host) and "%" not in host:
        return _Entry(None, ipaddress.ip_network(host), ports)
    known = canonical(host)
    return _Entry(known, None, ports) if isinstance(known, str) else _Entry(None, ipaddress.ip_network(known), ports)

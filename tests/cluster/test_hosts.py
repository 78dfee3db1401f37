"""Which addresses are public ones, and how hosts are spelled."""

import ipaddress
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quire_cluster.config import MediaConfig
from quire_cluster.hosts import Hosts, canonical, is_public
from quire_engine.errors import InvalidParameter

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "11.0.0.1",
    "100.63.255.255",
    "100.128.0.1",
    "172.32.0.1",
    "168.63.129.17",
    "223.255.255.255",
    "2606:4700::1111",
    "2a00:1450:4001::1",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2002:808:808::1",
]
INSIDE = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.255",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:10.0.0.1",
    "::ffff:0:127.0.0.1",
    "64:ff9b::a00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::808:808",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:a00:1::1",
    "2002:7f00:1::",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize(("text", "public"), [*((t, True) for t in PUBLIC), *((t, False) for t in INSIDE)])
def test_public_addresses(text: str, public: bool) -> None:
    assert is_public(ip_address(text)) is public


@given(st.ip_addresses())
def test_nothing_that_python_calls_private_is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if is_public(address) and not (address.version == 6 and address in ipaddress.ip_network("64:ff9b::/96")):
        assert address.is_global
        assert not address.is_multicast


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("example.org", "example.org"),
        ("EXAMPLE.org.", "example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("my_host", "my_host"),
        ("1.2.3.4", ip_address("1.2.3.4")),
        ("1.2.3.4.", ip_address("1.2.3.4")),
        ("１.2.3.4", ip_address("1.2.3.4")),
        ("::1", ip_address("::1")),
        ("::ffff:1.2.3.4", ip_address("1.2.3.4")),
        ("4.example", "4.example"),
        ("0x7f.example", "0x7f.example"),
    ],
)
def test_hosts_have_one_spelling(host: str, expected: object) -> None:
    assert canonical(host) == expected


@pytest.mark.parametrize(
    "host",
    [
        *("", ".", "..", "a..b", "-a", "a-", "a b", "a/b", "a%62", "a@b", "a:b", "a\0b", "a\nb", "*"),
        *("127.1", "1", "0x7f", "01.2.3.4", "1.2.3.4.5", "a.1", "256.1.1.1", "::1%lo", "[::1]"),
        *("a" * 64, "a." * 130 + "a"),
    ],
)
def test_no_hosts(host: str) -> None:
    with pytest.raises(ValueError):
        canonical(host)


@given(st.text(max_size=30))
def test_any_text_is_a_host_or_a_value_error(text: str) -> None:
    try:
        found = canonical(text)
    except ValueError:
        return
    assert canonical(str(found)) == found


def test_entries_have_their_ports() -> None:
    hosts = Hosts(["example.org", "example.com:8080", "10.0.0.0/8:9000", "[fd00::/8]:*", "192.168.0.1"])
    for host, port, may in (
        ("example.org", 80, True),
        ("example.org", 443, True),
        ("example.org", 8080, False),
        ("www.example.org", 443, False),
        ("example.com", 8080, True),
        ("example.com", 443, False),
        (ip_address("10.9.9.9"), 9000, True),
        (ip_address("10.9.9.9"), 80, False),
        (ip_address("::ffff:10.9.9.9"), 9000, True),
        (ip_address("fd00::1"), 22, True),
        (ip_address("192.168.0.1"), 443, True),
        (ip_address("192.168.0.2"), 443, False),
        (ip_address("8.8.8.8"), 443, False),
    ):
        assert hosts.may_be_asked(host, port) is may
    assert hosts.may_lead_to("example.org", ip_address("8.8.8.8"), 443)
    assert hosts.may_lead_to("example.org", ip_address("192.168.0.1"), 443)
    assert not hosts.may_lead_to("example.org", ip_address("192.168.0.2"), 443)
    assert not Hosts([]) and hosts


@pytest.mark.parametrize(
    "domains",
    [
        "http://example.org",
        "example.org/pictures",
        "*.example.org",
        "10.0.0.1/8",
        "10.0.0.0/33",
        "example.org:0",
        "example.org:65536",
        "example.org:x",
        "[::1]8",
        "[::1",
        "127.1",
        "exa mple.org",
        "user@example.org",
        ":80",
        "fe80::1%eth0",
    ],
)
def test_a_list_that_means_nothing_is_refused(domains: str) -> None:
    with pytest.raises(InvalidParameter, match="allowed_media_domains"):
        MediaConfig(allowed_media_domains=f"example.org, {domains}")


def test_a_folder_is_given_whole() -> None:
    with pytest.raises(InvalidParameter, match="whole path"):
        MediaConfig(allowed_local_media_path="media")

"""Who is at the other end of a gRPC connection, by its certificate."""

from typing import Any


def peer_name(context: Any) -> str | None:
    """The name in the client's certificate, which was verified: the first URI or DNS name among its alternative names,
    or else its common name. None where it has none, or where clients need no certificate.

    `context`: of a call that is being answered."""
    known = context.auth_context()
    typed = {*known.get("peer_uri", ()), *known.get("peer_dns", ())}
    names = [name for name in known.get("x509_subject_alternative_name", ()) if name in typed]
    names += known.get("x509_common_name", ())
    return names[0].decode(errors="replace") if names and names[0] else None

r"""What is personal, by its form.

The form of each kind is a pattern of our own. Whether an address of the Internet is one, the standard library's
`ipaddress` decides; cards and bank accounts have check digits, which are computed here. Nothing knows what a text
means: names, streets and dates of birth are not found.

credit_card: 13 to 19 digits that begin with 2 to 6, with single blanks or hyphens between, and the check digit of Luhn.
    One in ten other numbers of that form has it by chance.
iban: 15 to 34 capital letters and digits, with single blanks between, and the remainder of ISO 13616. One in 97 others
    has it by chance; whether a country's accounts have that length is not looked at.
email: ASCII only, of at most 254 characters. What is written like one (a handle `a@b.example` of a social network) is
    taken for one.
us_ssn: three, two and four digits with the same hyphen or blank between, but for the numbers that are never given out
    (000, 666 and 900 to 999 before, 00 within, 0000 at the end). Without anything between they are not found. Any other
    number that is written so is taken for one.
phone: + and 7 to 15 digits, or North American numbers of ten digits in three groups. Local numbers elsewhere are not
    found; article numbers in three such groups are taken for one. After a number with + another that stands behind
    a single blank may be taken for its last digits, as far as 15 reach.
ip_address: IPv4 with four numbers, IPv6 with at least one group before its first colon. Version numbers of four parts
    and `a::b` in the code of programs are taken for one.
"""

import ipaddress
import re
from collections.abc import Iterable

from quire_cluster.governance.checks.machine import Kind, Machine
from quire_cluster.governance.checks.patterns import pattern_machine

_LONGEST = 254  # characters: of an email address (RFC 5321); the other patterns have bounds of their own


def luhn(text: str) -> bool:
    """Whether the digits in a text end with their check digit."""
    digits = [int(character) for character in reversed(text) if character.isdigit()]
    return sum(digits[::2] + [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]) % 10 == 0


def mod97(text: str) -> bool:
    """Whether a bank account's check digits, the third and fourth character, fit the rest."""
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(one, 36)) for one in plain[4:] + plain[:4])) % 97 == 1


def _is_given_out(text: str) -> bool:
    area, group, serial = re.split("[- ]", text)
    return area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


_FORMS = {
    "credit_card": (r"(?<![0-9])[2-6][0-9](?:[ -]?[0-9]){11,17}(?![0-9])", luhn),
    "iban": (r"(?<![A-Za-z0-9])[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30}(?![A-Za-z0-9])", mod97),
    "email": (
        r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,24}",
        None,
    ),
    "us_ssn": (
        r"(?<![0-9-])(?:[0-9]{3}-[0-9]{2}-[0-9]{4}|[0-9]{3} [0-9]{2} [0-9]{4})(?![0-9-])",
        _is_given_out,
    ),
    "phone": (
        r"(?<![0-9+])(?:\+[1-9](?:[ ./-]?\(?[0-9]\)?){6,14}"
        r"|(?:1[-. ])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[-. ])[2-9][0-9]{2}[-. ][0-9]{4})(?![0-9])",
        None,
    ),
    "ip_address": (
        r"(?<![0-9A-Za-z.:])(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}"
        r"|[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?::[0-9]{1,3}(?:\.[0-9]{1,3}){3})?)(?![0-9A-Za-z])",
        _is_address,
    ),
}
KINDS = tuple(_FORMS)


def pii_machine(kinds: Iterable[str]) -> Machine:
    """Finds these, the first-named where several are one text."""
    named = [(_FORMS[kind], Kind(name=kind, check=_FORMS[kind][1])) for kind in dict.fromkeys(kinds)]
    return pattern_machine([(form, kind) for (form, _), kind in named], _LONGEST)

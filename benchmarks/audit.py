"""What putting records on record takes, and what the gateway's event loop feels of their way to the database.

    python benchmarks/audit.py [--records 50000] [--database URL]

Without an address: SQLite, in a folder of its own. Three figures for appending (to the journal, which is what a request
waits for), three for draining while the loop does nothing else but look at the clock every millisecond, and the time
that `verify` takes for what is there then. A log that is not whole at the end is no result.
"""

import argparse
import asyncio
import gc
import json
import platform
import tempfile
import time
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from quire_cluster.governance.chain import AuditLog
from quire_cluster.governance.database import Database
from quire_cluster.governance.journal import Journal
from quire_cluster.governance.records import Record, UsageDelta
from quire_cluster.governance.writer import Writer

TICK = 0.001  # seconds between two looks at the clock
TENANTS = 20


def record(number: int) -> Record:
    """As a gateway writes it of a short chat."""
    used = UsageDelta(model="qwen3-8b", prompt_tokens=900, cached_tokens=512, output_tokens=250)
    facts = {"route": "/v1/chat/completions", "id": f"chatcmpl-{number:024d}", "finish": "stop", "seconds": 4.25}
    return Record(
        kind="request",
        at=1_790_000_000 + number // 100,
        tenant=f"team-{number % TENANTS}",
        key=f"qk-{number % TENANTS:08x}",
        body=facts | {"address": "10.0.0.1", "prompt_tokens": 900, "cached_tokens": 512, "output_tokens": 250},
        usage=used,
    )


async def stalls(found: list[float]) -> None:
    """How much later than it should each look at the clock comes, in seconds."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(TICK)
        found.append(time.perf_counter() - before - TICK)


async def measure(url: str, folder: Path, count: int) -> dict[str, float | int | str]:
    """All figures."""
    database = Database(url)
    await database.migrate()
    key = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    log = AuditLog(database, key)
    journal = Journal(str(folder / "journal"))
    writer = Writer(database, log, journal)
    records = [record(number) for number in range(count)]
    each = []
    for one in records:
        begun = time.perf_counter()
        journal.append(one)
        each.append(time.perf_counter() - begun)
    each.sort()
    gc.collect()
    gc.freeze()  # as a server does
    felt: list[float] = []
    watching = asyncio.ensure_future(stalls(felt))
    begun = time.perf_counter()
    await writer.flush()
    drained = time.perf_counter() - begun
    watching.cancel()
    begun = time.perf_counter()
    report = await log.verify()
    verified = time.perf_counter() - begun
    assert (report.fault, report.records) == (None, count), report
    await database.close()
    felt.sort()
    return {
        "database": "sqlite" if database.embedded else "postgresql",
        "records": count,
        "appends_per_second": round(count / sum(each)),
        "append_us_median": round(1e6 * each[count // 2], 1),
        "append_us_p99.9": round(1e6 * each[int(count * 0.999)], 1),
        "drained_per_second": round(count / drained),
        "loop_stalled_ms_median": round(1e3 * felt[len(felt) // 2], 1),
        "loop_stalled_ms_p99": round(1e3 * felt[int(len(felt) * 0.99)], 1),
        "loop_stalled_ms_longest": round(1e3 * felt[-1], 1),
        "verified_per_second": round(count / verified),
    }


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--database", help="an empty one; default: SQLite in a new folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = given.database or f"sqlite:///{folder}/governance.db"
        figures = asyncio.run(measure(url, Path(folder), given.records))
    print(json.dumps({"machine": f"{platform.machine()}, {platform.system()}"} | figures))


if __name__ == "__main__":
    main()

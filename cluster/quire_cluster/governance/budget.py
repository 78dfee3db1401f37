"""What tenants have used of a month: what the database says, and what is on its way there."""

import asyncio
import logging
import time
from collections import Counter, deque
from itertools import islice

from quire_engine.errors import Unavailable

from quire_cluster.governance.database import Database
from quire_cluster.governance.usage import month_tokens
from quire_cluster.governance.writer import Writer

log = logging.getLogger(__name__)
_LOOK = 5.0  # seconds between two looks at the database


class Budget:
    """`follow` keeps it up to date: what other gateways have served since it last looked is not in it."""

    def __init__(self, database: Database, writer: Writer) -> None:
        self._database = database
        self._writer = writer
        self._known: dict[str, int] = {}  # tokens, by tenant
        self._recent: deque[tuple[str, int]] = deque()  # of requests here that the database may not have told of
        self._added: Counter[str] = Counter()  # the sums of these

    def add(self, tenant: str, tokens: int) -> None:
        """A request has ended here, and goes on record now."""
        self._recent.append((tenant, tokens))
        self._added[tenant] += tokens

    def used(self, tenant: str) -> int:
        """Tokens of this month, in UTC."""
        return self._known.get(tenant, 0) + self._added[tenant]

    async def follow(self) -> None:
        """For ever. While the database is away everything that is served here adds up."""
        while True:
            try:
                await self.look()
            except Unavailable as error:
                log.debug("%s", error)  # the writer says so
            await asyncio.sleep(_LOOK)

    async def look(self) -> None:
        """Raises Unavailable."""
        waiting = min(self._writer.pending, len(self._recent))  # as many of the latest are not there yet
        there = len(self._recent) - waiting
        async with self._database.snapshot() as connection:
            self._known = await month_tokens(connection, time.time())
        self._added.subtract(dict(_sums(islice(self._recent, there))))
        for _ in range(there):
            self._recent.popleft()


def _sums(requests: "islice[tuple[str, int]]") -> Counter[str]:
    sums: Counter[str] = Counter()
    for tenant, tokens in requests:
        sums[tenant] += tokens
    return sums

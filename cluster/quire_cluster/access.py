"""Who may call a server's gateways, out of its options."""

from collections.abc import Mapping
from pathlib import Path

from quire_cluster.config import GatewayConfig
from quire_cluster.governance.config import Governance, read_governance
from quire_cluster.governance.database import Database
from quire_cluster.keys import Keys, read_keys


async def prepare_access(config: GatewayConfig, environment: Mapping[str, str]) -> Keys | Governance | None:
    """Those who have one of its keys, or those whom its governance knows, whose database is made ready; None:
    everybody. Raises InvalidParameter; Unavailable where the database does not answer."""
    if config.governance is None:
        return read_keys(config.api_key, config.api_key_file, environment)
    governance = read_governance(Path(config.governance))
    database = Database(governance.database)
    try:
        await database.migrate()
    finally:
        await database.close()
    return governance

"""The controller: the Ray actor that keeps the replicas that deployments want, and publishes where they are.

A thin reconcile loop: what is wanted and what is there go to `policies/`, and what comes of it is done. All that it
needs to know lies in Ray's store or with the replicas themselves: one that was started again goes on with them.
"""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray
from quire_engine.errors import InvalidParameter, ModelError, ServerError, UnknownModel
from quire_protos.v1 import control_pb2 as pb
from ray.util import list_named_actors

from quire_cluster.demand import Demand
from quire_cluster.deployment import MOST_REPLICAS, Deployment, listed
from quire_cluster.keeper import Keeper
from quire_cluster.leases import Leases
from quire_cluster.liveness import CONTROLLER
from quire_cluster.nodes import Nodes
from quire_cluster.policies.quota import Ask, Grants
from quire_cluster.replica_actor import ReplicaFacts
from quire_cluster.reports import GatewayReport, ReplicaReport
from quire_cluster.routing_table import ClusterTable, Key
from quire_cluster.slot import Home, Needs, Placements
from quire_cluster.status import Overview, Rates, status
from quire_cluster.store import Record, Store
from quire_cluster.workers import root_cause

if TYPE_CHECKING:
    from quire_cluster.admin import AdminConfig, AdminServer
    from quire_cluster.gateways import GatewayPlan, Gateways

log = logging.getLogger(__name__)
_TICK = 0.5  # seconds between two looks, where nothing happens
_ADOPTION = 10.0  # seconds that a replica has to say what it is
_LEASE = 10.0  # seconds that a gateway's report holds
_LAST_ANSWER = 0.5  # seconds that it gets on its way
_ASKED = 5.0  # seconds that a gateway has to answer
_CHECKS = 2  # models that are looked at at a time: each in a process with torch
HEAD = {"node:__internal_head__": 0.001}  # pins to the head


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What a controller is made with."""

    name: str  # of the cluster: the namespace of its actors
    host: str | None = None  # that replicas listen on; None: their node's address
    private: bool = False  # no node joins it: what it has no room for is refused
    gateways: "GatewayPlan | None" = None  # None: whoever started this has its own
    admin: "AdminConfig | None" = field(default=None, repr=False)


def actor_options(namespace: str) -> dict[str, Any]:
    """Of a controller: Ray starts it again on the head, however often it dies."""
    return {
        "name": CONTROLLER,
        "namespace": namespace,
        "num_cpus": 0,
        "resources": HEAD,
        "max_concurrency": 1000,
        "max_restarts": -1,
    }


class Controller:
    """`deploy` says what is wanted; `watch` is how gateways learn of changes; `shutdown` ends everything."""

    def __init__(self, config: ClusterConfig) -> None:
        """Ray calls it on the actor's event loop, and again after the actor died."""
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self.config = config
        self.nodes = Nodes()
        self.keepers: dict[str, Keeper] = {}
        self.reports: dict[str, tuple[float, GatewayReport]] = {}  # by gateway, with when they came
        self.rates = Rates()
        self.since = time.monotonic()
        self._leases = Leases(self.since)
        self._store = Store(config.name)
        self._woken: set[str] = set()  # deployments that a request waits for, since the last look
        self._epochs: dict[str, int] = {}  # of deployments that are no more: their replicas may still drain
        self._table = ClusterTable()
        self._changed = asyncio.Condition()
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ends = False  # for good
        self._deploying = asyncio.Lock()
        self._checks = asyncio.Semaphore(_CHECKS)
        self._home: Home
        self._gateways: Gateways | None = None
        self._admin: AdminServer | None = None
        self._started = asyncio.ensure_future(self._start())

    # ---- its beginning and its end --------------------------------------------------------------------------------

    async def _start(self) -> None:
        secret = await self._store.get("secret")
        if secret is None:
            secret = secrets.token_hex(32)
            await self._store.put("secret", secret)
        await self.nodes.refresh()
        self._home = Home(
            namespace=self.config.name,
            host=self.config.host,
            secret=secret,  # who may ask for the routing table may open sessions
            placements=Placements(self.config.name),
            addresses=self.nodes.address,
        )
        for record in await self._store.read_all():
            self.keepers[record.deployment.name] = self._keeper(record)
        if self.config.gateways is not None:
            from quire_cluster.gateways import Gateways  # what it imports a private cluster does without

            self._gateways = Gateways(self.config.gateways, self.config.name)
        await self._adopt()
        self._begin(self._home.placements.remove_orphans())
        self._begin(self._reconcile_for_ever())
        if self.config.admin is not None:
            from quire_cluster.admin import AdminServer

            self._admin = AdminServer(self, self.config.admin)
            await self._admin.start()

    def _keeper(self, record: Record) -> Keeper:
        return Keeper(record, self._home, self._store, changed=self._news.set, begin=self._begin)

    async def _adopt(self) -> None:
        """What a controller before this one started; what nobody wants any more is ended, and room given back."""
        found = await asyncio.to_thread(list_named_actors, True)
        names = [one["name"] for one in found if one["namespace"] == self.config.name]
        groups = await asyncio.gather(*(self._adopt_replica(name) for name in names if name.startswith("replica:")))
        for name in await self._home.placements.names():
            if name not in groups:
                await self._home.placements.remove(name)
        for name in names:
            if name.startswith("gateway:") and (actor := await self._actor(name)) is not None:
                assert self._gateways is not None, "who has gateways was told of them"
                self._gateways.adopt(name, actor)

    async def _actor(self, name: str) -> Any:
        try:
            return await asyncio.to_thread(ray.get_actor, name, self.config.name)
        except ValueError:  # it ended meanwhile
            return None

    async def _adopt_replica(self, name: str) -> str | None:
        """The name of its placement group; None where it is gone."""
        _, index, epoch, deployment = name.split(":", 3)
        if (actor := await self._actor(name)) is None:
            return None
        try:
            facts: ReplicaFacts = await asyncio.wait_for(actor.facts.remote(), _ADOPTION)
        except Exception as error:
            log.warning("%s does not say what it is, and is ended: %s", name, root_cause(error))
            ray.kill(actor)
            return None
        keeper = self.keepers.get(deployment)
        if keeper is None:  # it was deleted
            self._epochs[deployment] = max(self._epochs.get(deployment, 0), int(epoch))
            keeper = self._keeper(Record(deployment=facts.deployment, needs=Needs(gpu=False, threads=1)))
            slot = keeper.adopt(int(index), int(epoch), actor, facts)
            if not facts.draining:
                self._begin(slot.end())
        else:
            keeper.adopt(int(index), int(epoch), actor, facts)
        log.info("%s goes on", name)
        return facts.place.group

    async def ping(self) -> None:
        """A sign of life."""

    async def ready(self) -> ClusterConfig:
        """Once it and its gateways answer. Raises what keeps one from that."""
        await asyncio.shield(self._started)
        self._check_stays()
        if self._gateways is not None:
            await self._gateways.answered()
        return self.config

    async def shutdown(self, drain_seconds: float | None = None) -> None:
        """Gateways finish what runs (for so long; None: as they were told), then every replica ends, and deployments
        are forgotten."""
        self._ends = True
        await asyncio.wait({self._started})
        for task in self._tasks:
            task.cancel()
        if self._gateways is not None:
            await self._gateways.stop(drain_seconds)
        keepers, self.keepers = list(self.keepers.values()), {}
        await asyncio.gather(*(keeper.end() for keeper in keepers))
        await self._store.clear()
        for name in await self._home.placements.names():  # of replicas that were about to end anyhow
            await self._home.placements.remove(name)
        if self._admin is not None:
            await self._admin.close_records()

    def _check_stays(self) -> None:
        """Raises ServerError where what is said now would be forgotten."""
        if self._ends:
            raise ServerError("this cluster is shutting down; try again once that is done")

    def end_soon(self) -> None:
        """This actor's own end, for good, once whoever asked for it has been answered."""
        actor = ray.get_actor(CONTROLLER, self.config.name)
        asyncio.get_running_loop().call_later(_LAST_ANSWER, ray.kill, actor)

    def _begin(self, work: Coroutine[Any, Any, Any]) -> None:
        """Something that goes on beside; what it raises is logged."""

        def ended(task: "asyncio.Task[Any]") -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("a part of the controller failed", exc_info=error)

        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(ended)

    # ---- what operators say ---------------------------------------------------------------------------------------

    async def deploy(
        self, wanted: Sequence[Deployment], *, contexts: Mapping[str, int] | None = None
    ) -> dict[str, str]:
        """Makes these deployments what is served: "created", "updated" or "unchanged" for each. What is not among them
        stays as it is. `contexts`: of models that were checked already, by deployment (CheckedModel.max_model_len).

        Raises QuireError for whatever is wrong with any of them, and then has changed nothing. Where one can be named,
        its parameter is deployment.option.
        """
        await asyncio.shield(self._started)
        async with self._deploying:
            self._check_names(wanted)
            for deployment in wanted:
                self._record(deployment)
            if contexts is None:
                found = await asyncio.gather(*(self._check_model(deployment) for deployment in wanted))
                contexts = {deployment.name: context for deployment, context in zip(wanted, found, strict=True)}
            self._check_stays()
            done = {}
            # Anew: replicas were started meanwhile, and operators may have said something.
            for record in [self._record(deployment, contexts[deployment.name]) for deployment in wanted]:
                name, keeper = record.deployment.name, self.keepers.get(record.deployment.name)
                if keeper is None:
                    self.keepers[name] = self._keeper(record)
                    done[name] = "created"
                else:
                    done[name] = "unchanged" if keeper.deployment == record.deployment else "updated"
                    keeper.change(record)
                log.info("deployment %s: %s", name, done[name])
            self._news.set()
            await asyncio.gather(*(self.keepers[name].save() for name in done))
            return done

    def _check_names(self, wanted: Sequence[Deployment]) -> None:
        """Raises InvalidParameter where two deployments would answer to one name."""
        replaced = {deployment.name for deployment in wanted}
        others = [keeper.deployment for name, keeper in self.keepers.items() if name not in replaced]
        owners: dict[str, str] = {}
        for deployment in (*others, *wanted):
            for name in deployment.names:
                if name in owners:
                    option = f"{deployment.name}.{'name' if name == deployment.name else 'aliases'}"
                    raise InvalidParameter(f"{owners[name]} and {deployment.name} are both called {name}", option)
                owners[name] = deployment.name

    def _record(self, deployment: Deployment, context: int = 0) -> Record:
        """What will be kept of it. Raises InvalidParameter where the cluster has no room for it and gets none."""
        keeper = self.keepers.get(deployment.name)
        if keeper is not None and keeper.deployment.engine_revision == deployment.engine_revision:
            return replace(keeper.record, deployment=deployment)
        workers = deployment.engine.num_workers * max(1, deployment.config.min_replicas)
        try:
            gpu = self.nodes.workers_on_gpus(deployment.engine.device, workers, may_grow=not self.config.private)
        except InvalidParameter as error:
            raise InvalidParameter(str(error), f"{deployment.name}.{error.parameter}") from error
        threads = deployment.engine.cpu_threads or max(1, self.nodes.least_cores // workers)
        needs = Needs(gpu=gpu, threads=threads)
        if keeper is None:
            epoch = self._epochs.get(deployment.name, 0)
            return Record(deployment=deployment, needs=needs, epoch=epoch, max_model_len=context)
        return replace(keeper.record, deployment=deployment, needs=needs, max_model_len=context)

    async def _check_model(self, deployment: Deployment) -> int:
        """Its context. On the head, in a process of its own: it imports what the controller does without."""
        keeper = self.keepers.get(deployment.name)
        if keeper is not None and _texts(keeper.deployment) == _texts(deployment):
            return keeper.record.max_model_len
        try:
            async with self._checks:
                context: int = await _context_of.options(resources=HEAD).remote(deployment)
        except Exception as error:
            cause = root_cause(error)
            option = cause.parameter if isinstance(cause, InvalidParameter) and cause.parameter else "model"
            raise InvalidParameter(str(cause), f"{deployment.name}.{option}") from error
        return context

    async def delete(self, name: str) -> None:
        """Its replicas are drained, and it is no more. Raises UnknownModel."""
        keeper = self._find(name)
        del self.keepers[name]
        self._epochs[name] = keeper.record.epoch
        keeper.drain_all()
        self._news.set()
        await keeper.forget()

    async def scale(self, name: str, replicas: int | None) -> None:
        """So many from now on, whatever the load; None: as the load asks for. Raises UnknownModel, InvalidParameter."""
        self._check_stays()
        if replicas is not None and replicas > MOST_REPLICAS:
            raise InvalidParameter(f"replicas is {replicas}; give a number up to {MOST_REPLICAS}", "replicas")
        await self._find(name).pin(replicas)
        self._news.set()

    async def drain_replica(self, name: str, index: int) -> None:
        """It ends once what it computes has; another one takes its place. Raises UnknownModel, InvalidParameter."""
        self._find(name).drain_replica(index)

    async def drain_node(self, node: str) -> None:
        """Nothing new is placed there, and what runs there moves; then the node leaves. Raises InvalidParameter."""
        await self.nodes.drain(node)
        self._news.set()

    def _find(self, name: str) -> Keeper:
        if name not in self.keepers:
            there = listed(self.keepers) or "none"
            raise UnknownModel(f"there is no deployment {name[:100]!r}; there are: {there}", "name")
        return self.keepers[name]

    async def status(self) -> pb.StatusResponse:
        """How everything is."""
        await asyncio.shield(self._started)
        return status(
            Overview(
                cluster=self.config.name,
                now=time.monotonic(),
                since=self.since,
                keepers=self.keepers,
                demands={name: self.demand(name) for name in self.keepers},
                reports=self.reports,
                rates=self.rates,
                nodes=self.nodes,
            )
        )

    async def why(self, request_id: str) -> pb.WhyResponse:
        """What a request waits for; of all that wait, for ""."""
        actors = self._gateways.actors if self._gateways is not None else {}

        async def ask(name: str, actor: Any) -> list[pb.WaitingRequest]:
            try:
                found = await asyncio.wait_for(actor.why.remote(request_id), _ASKED)
            except (TimeoutError, ray.exceptions.RayError) as error:
                log.warning("gateway %s does not say what waits there: %r", name, error)
                return []
            return [pb.WaitingRequest(**vars(one), gateway=name) for one in found]

        found = await asyncio.gather(*(ask(name, actor) for name, actor in actors.items()))
        return pb.WhyResponse(requests=[one for ones in found for one in ones])

    # ---- what gateways say ----------------------------------------------------------------------------------------

    async def watch(self, version: int) -> ClusterTable:
        """The table, once it is newer than `version`."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._table.version > version)
            return self._table

    async def report(self, report: GatewayReport) -> None:
        """A gateway's, which holds for a few seconds."""
        self.reports[report.identity] = (time.monotonic(), report)
        self.rates.take(report, time.monotonic())

    async def lease(self, ask: Ask) -> Grants:
        """Of what tenants may have, to a gateway. Raises ServerError for an ask that a later one has overtaken."""
        return self._leases.lease(ask, time.monotonic(), len(self.reports))

    async def wake(self, name: str) -> None:
        """A request waits for a replica of this deployment."""
        self._woken.add(name)
        self._news.set()

    async def suspect(self, name: str, key: Key) -> None:
        """A gateway has long heard nothing of a replica: it is killed, and so started again."""
        if name in self.keepers:
            self.keepers[name].suspect(key)

    # ---- the loop -------------------------------------------------------------------------------------------------

    async def _reconcile_for_ever(self) -> None:
        while True:
            try:
                self._reconcile()
                await self._publish()
            except Exception:  # whatever it was, the next look may do better; without looks nothing is ever mended
                log.exception("reconciling failed; it is tried again")
            try:
                async with asyncio.timeout(_TICK):
                    await self._news.wait()
            except TimeoutError:
                await self.nodes.refresh_now_and_then()
            self._news.clear()

    def _reconcile(self) -> None:
        now = time.monotonic()
        silent = [name for name, (at, _) in self.reports.items() if now - at >= _LEASE]
        for name in silent:
            del self.reports[name]
        leaving = self.nodes.leaving
        for name, keeper in self.keepers.items():
            keeper.reconcile(self.demand(name), leaving)
        self._woken.clear()
        if self._gateways is not None:
            busy = {node for keeper in self.keepers.values() for slot in keeper.slots for node in slot.nodes}
            self._gateways.reconcile(self.nodes.identities, self.nodes.head, leaving, silent, busy)

    def demand(self, name: str) -> Demand:
        """What gateways last said of a deployment: of each replica the freshest word."""
        replicas: dict[Key, ReplicaReport] = {}
        waiting, tokens = int(name in self._woken), 0
        waiting_for: Counter[str] = Counter()
        for _, report in self.reports.values():
            if (model := report.models.get(name)) is None:
                continue
            waiting += model.at_gateway
            tokens += model.tokens_at_gateway
            if model.at_gateway:
                waiting_for[model.at_gateway_for] += model.at_gateway
            for one in model.replicas:
                if one.key not in replicas or one.age < replicas[one.key].age:
                    replicas[one.key] = one
        for one in replicas.values():
            waiting_for.update(one.waiting_for)
        return Demand(
            replicas=replicas,
            heard=bool(self.reports),
            at_gateways=waiting,
            tokens_at_gateways=tokens,
            waiting_for=waiting_for,
        )

    async def _publish(self) -> None:
        """Where something is new. The first version is above all those of a controller before this one."""
        served = tuple(keeper.served() for keeper in self.keepers.values())
        if served != self._table.deployments or not self._table.version:
            async with self._changed:
                self._table = ClusterTable(self._table.version + 1 if self._table.version else time.time_ns(), served)
                self._changed.notify_all()


def _texts(deployment: Deployment) -> tuple[str | None, ...]:
    """What replicas and gateways read."""
    config = deployment.config
    return (
        deployment.engine_revision,
        deployment.chat_template,
        config.tool_call_parser,
        config.reasoning_parser,
    )


@ray.remote(num_cpus=0)
def _context_of(deployment: Deployment) -> int:
    """Raises QuireError for what a replica, or a gateway, could not read."""
    from quire_engine.models.check import check_model
    from quire_engine.text.chat_template import ChatTemplate
    from quire_engine.text.formats.chat import ChatFormat
    from quire_engine.text.tokenizer import Tokenizer

    engine, template = deployment.engine, deployment.chat_template
    checked = check_model(engine)
    if template is not None:
        try:
            ChatTemplate(template, {})
        except ModelError as error:
            raise InvalidParameter(str(error), "chat_template") from error
    tokenizer = Tokenizer.load(checked.files, other=engine.tokenizer, chat_template=template)
    config = deployment.config
    ChatFormat(tokenizer, tool_parser=config.tool_call_parser, reasoning_parser=config.reasoning_parser)
    return checked.max_model_len

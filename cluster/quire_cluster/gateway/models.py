"""All models of a gateway: what clients may name, and the service behind each name.

A deployment whose model was replaced has two services for a while: the new one takes its names once a replica of it
serves, and the old one ends what it has begun.
"""

import asyncio
import gc
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire_engine import allocator
from quire_engine.errors import QuireError, Unavailable, UnknownModel
from quire_engine.weights.resolve import find_model

from quire_cluster.deployment import Deployment, listed
from quire_cluster.gateway.bodies import MAX_BODY
from quire_cluster.gateway.endings import access_log
from quire_cluster.gateway.media import Media
from quire_cluster.gateway.service import Service
from quire_cluster.governance.callers import Caller
from quire_cluster.governance.governor import Governor
from quire_cluster.governance.identity import calling
from quire_cluster.observability.metrics import Metrics
from quire_cluster.reports import ModelReport, WaitingRequest
from quire_cluster.routing_table import ClusterTable, Key, RoutingTable, Served

log = logging.getLogger(__name__)
# What a service is made of: the model's revision, the chat template, the parsers, whether tools may be called, and how
# many images there may be.
_Text = tuple[str, str | None, str | None, str | None, bool, int]
_RETRY = 10.0  # seconds until a model that could not be read is tried again
_READ = 60.0  # seconds that a request waits for one that is being read
_SHOWN_NAME = 255  # characters of a name that a client made up


def _text_of(deployment: Deployment) -> _Text:
    config = deployment.config
    return (
        deployment.model_revision,
        deployment.chat_template,
        config.tool_call_parser,
        config.reasoning_parser,
        config.enable_auto_tool_choice,
        deployment.engine.images_per_prompt,
    )


def _said(names: Sequence[str]) -> str:
    return f"served is {listed(names)}" if names else "none is served yet"


@dataclass
class _Entry:
    """A deployment at this gateway."""

    served: Served
    active: Service | None = None  # what its names lead to
    services: dict[_Text, Service] = field(default_factory=dict)
    loading: "asyncio.Task[None] | None" = None
    tried: asyncio.Event = field(default_factory=asyncio.Event)  # it has been read here, or could not be
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def state(self) -> str:
        """In a word."""
        if self.active is not None and self.active.dispatcher.sessions:
            return "ready"
        if self.served.table.failure is not None:
            return "failed"
        deployment, table = self.served.deployment, self.served.table
        sleeps = deployment.config.min_replicas == 0 and not table.replicas and table.ready_at is None
        return "sleeping" if sleeps else "starting"


class Models:
    """`follow` takes the controller's table; `find` gives the service of a name."""

    def __init__(
        self,
        metrics: Metrics,
        media: Media | None = None,
        governor: Governor | None = None,
        *,
        on_silence: Callable[[str, Key], None] = lambda name, key: None,
        on_wait: Callable[[str], None] = lambda name: None,
    ) -> None:
        """`media`: fetches images. `governor`: puts requests on record. `on_silence`: a replica of a deployment says
        nothing. `on_wait`: a request waits for one to start."""
        self.metrics = metrics
        self._media = media
        self._governor = governor
        self.draining = False
        self._on_silence = on_silence
        self._on_wait = on_wait
        self._entries: dict[str, _Entry] = {}
        self._by_name: dict[str, _Entry] = {}
        self._left: list[Service] = []  # of deployments that are no more, with requests that are
        self._closing: set[asyncio.Task[None]] = set()
        self._has_read = False  # all models that were there when it began
        self._reading = asyncio.Lock()  # one at a time: transformers' modules cannot be imported by two threads at once

    # ---- what clients name ----------------------------------------------------------------------------------------

    async def find(self, name: str | None, caller: Caller) -> Service:
        """The service of a model; of none at all, where the caller may use one. One that it may not use is as unknown.
        A model that is being read is waited for, a minute at most. Raises UnknownModel; Unavailable where it cannot be
        read here, or none of its replicas be started."""
        try:
            await asyncio.wait_for(self._named(name, caller).tried.wait(), _READ)
        except TimeoutError:
            raise Unavailable("the model is still being read at this gateway; try again", _RETRY) from None
        entry = self._named(name, caller)  # it may have been deleted
        if entry.state == "failed":
            raise Unavailable("no replica of this model can be started; `quire status` tells its operator why", 60.0)
        if entry.active is None:
            raise Unavailable("the model cannot be read at this gateway, whose log says why; try again", _RETRY)
        return entry.active

    def _named(self, name: str | None, caller: Caller) -> _Entry:
        if name:
            entry = self._by_name.get(name)
            if entry is None or not caller.may_use(entry.served.deployment.names):
                said = _said(self.names(caller))
                raise UnknownModel(f"the model {name[:100]!r} is not served here; {said}", "model")
            return entry
        entries = [entry for entry in self._entries.values() if caller.may_use(entry.served.deployment.names)]
        if len(entries) != 1:
            raise UnknownModel(f"name the model; {_said(self.names(caller))}", "model")
        return entries[0]

    def names(self, caller: Caller) -> list[str]:
        """Of all models that it may use, aliases among them."""
        return [name for name, entry in self._by_name.items() if caller.may_use(entry.served.deployment.names)]

    def described(self, name: str, caller: Caller) -> dict[str, Any]:
        """A model as OpenAI's API shows it, and its state. Raises UnknownModel."""
        entry = self._named(name, caller)
        service = entry.active
        return {
            "id": name,
            "object": "model",
            "created": entry.created,
            "owned_by": "quire",
            "max_model_len": service.max_model_len if service is not None else entry.served.table.max_model_len,
            "state": entry.state,
            "input_modalities": ["text", "image"] if service is not None and service.images is not None else ["text"],
            "replicas": len(service.dispatcher.sessions) if service is not None else 0,
        }

    def largest_body(self, prompts: int) -> int:
        """Bytes that a body with so many prompts can have, for whichever model it names."""
        if any(service.images is not None for service in self._services):
            return MAX_BODY
        return max((s.texts.bytes_of(s.max_model_len, prompts) for s in self._services), default=1 << 20)

    def refused(self, error: QuireError, *, route: str, model: str | None) -> None:
        """A request that never started, and the model that it named."""
        entry = self._by_name.get(model) if model else next(iter(self._entries.values()), None)
        self.metrics.rejection(entry.served.deployment.name if entry is not None else "", error)
        if self._governor is not None:
            self._governor.refused(calling(), {"route": route, "model": (model or "")[:_SHOWN_NAME]}, error)
        access_log.info(json.dumps({"route": route, "refused": type(error).__name__, "why": str(error)[:200]}))

    # ---- how they are ---------------------------------------------------------------------------------------------

    @property
    def _services(self) -> Iterator[Service]:
        for entry in self._entries.values():
            yield from entry.services.values()
        yield from self._left

    @property
    def num_open(self) -> int:
        """Requests whose answer is not yet with the client, as far as we see."""
        return sum(service.num_open for service in self._services)

    @property
    def replicas(self) -> int:
        """That requests can go to."""
        return sum(len(entry.active.dispatcher.sessions) for entry in self._entries.values() if entry.active)

    @property
    def ready(self) -> bool:
        """Whether requests are served, if only of one model: by a replica, or one that the first request starts. A
        gateway that has just begun reads all its models first."""
        if self.draining or not self._has_read:
            return False
        active = (entry for entry in self._entries.values() if entry.active is not None)
        return any(entry.state in ("ready", "sleeping") for entry in active)

    @property
    def trouble(self) -> str:
        """What is wrong with the replicas of any model; "" while all is well."""
        for name, entry in self._entries.items():
            if entry.active is not None and (trouble := entry.active.trouble) and entry.state != "sleeping":
                return trouble if len(self._entries) == 1 else f"{name}: {trouble}"
        return ""

    async def why(self, request_id: str) -> list[WaitingRequest]:
        """What a request waits for, choice by choice; of all that wait, for ""."""
        found: list[WaitingRequest] = []
        for name, entry in self._entries.items():
            for service in entry.services.values():
                found += await service.why(name, request_id)
        return found

    def reports(self) -> dict[str, ModelReport]:
        """For the controller, by deployment."""
        return {name: entry.active.report() for name, entry in self._entries.items() if entry.active is not None}

    # ---- what the controller says ---------------------------------------------------------------------------------

    def follow(self, table: ClusterTable, read: Sequence[Service] = ()) -> None:
        """Takes over what is served now. New models are read in a thread, but for those that were `read` already."""
        ready = {service.names[0]: service for service in read}
        for served in table.deployments:
            name = served.deployment.name
            entry = self._entries.setdefault(name, _Entry(served))
            entry.served = served
            for text, service in entry.services.items():
                self._tell(service, entry, text)
            if name in ready:
                self._take(entry, served.deployment, ready[name])
            self._load_if_new(entry)
        gone = self._entries.keys() - {served.deployment.name for served in table.deployments}
        for name in gone:
            entry = self._entries.pop(name)
            if entry.loading is not None:
                entry.loading.cancel()
            entry.tried.set()
            for service in entry.services.values():
                service.dispatcher.update_table(RoutingTable())
                self._left.append(service)
        self._by_name = {
            name: self._entries[served.deployment.name]
            for served in table.deployments
            for name in served.deployment.names
        }
        self.look()

    def _tell(self, service: Service, entry: _Entry, text: _Text) -> None:
        served = entry.served
        ours = text[0] == served.deployment.model_revision
        table = served.table if ours else served.others.get(text[0], RoutingTable())
        service.follow(table, served.deployment)

    def _load_if_new(self, entry: _Entry) -> None:
        text = _text_of(entry.served.deployment)
        if text not in entry.services and (entry.loading is None or entry.loading.done()):
            entry.loading = asyncio.ensure_future(self._load(entry, entry.served.deployment))

    async def _load(self, entry: _Entry, deployment: Deployment) -> None:
        try:
            async with self._reading:
                service = await asyncio.to_thread(self.read, deployment)
        except Exception as error:
            log.error("the model of %s cannot be read at this gateway; it is tried again: %s", deployment.name, error)
            entry.tried.set()
            await asyncio.sleep(_RETRY)
        else:
            allocator.return_freed_memory()
            gc.freeze()  # modules and tokenizer stay; a collection that goes through them holds the loop up
            self._take(entry, deployment, service)
        entry.loading = None
        self._load_if_new(entry)  # it may have been replaced meanwhile

    def read(self, deployment: Deployment) -> Service:
        """What a deployment needs at a gateway: its tokenizer. Raises QuireError."""
        return Service.load(
            find_model(deployment.engine, weights=False),
            deployment.engine,
            names=list(deployment.names),
            chat_template=deployment.chat_template,
            parsers=deployment.config,
            metrics=self.metrics,
            media=self._media,
        )

    def _take(self, entry: _Entry, deployment: Deployment, service: Service) -> None:
        name = deployment.name
        service.draining = service.draining or self.draining
        service.dispatcher.on_silence = lambda key: self._on_silence(name, key)
        service.dispatcher.on_wait = lambda: self._on_wait(name)
        service.governor = self._governor
        entry.services[_text_of(deployment)] = service
        self._tell(service, entry, _text_of(deployment))
        entry.tried.set()
        self.look()

    # ---- the clock ------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Now and then: gives names to services that can take them, and leaves those that nobody needs."""
        read = bool(self._entries) and all(entry.tried.is_set() for entry in self._entries.values())
        self._has_read = self._has_read or read
        for entry in self._entries.values():
            wanted = entry.services.get(_text_of(entry.served.deployment))
            old = entry.active
            if wanted is not None and (old is None or wanted.dispatcher.sessions or not old.dispatcher.sessions):
                entry.active = wanted
            for text, service in list(entry.services.items()):
                if service is entry.active or service is wanted:
                    continue
                if not service.num_open:
                    del entry.services[text]
                    self._close(service)
                elif not service.dispatcher.sessions:
                    service.dispatcher.give_up("the model was replaced by another; send the request again")
        for service in list(self._left):
            if service.num_open:
                service.dispatcher.give_up("this model is not served any more")
            else:
                self._left.remove(service)
                self._close(service)

    def _close(self, service: Service) -> None:
        if service.images is not None:
            service.images.close()
        task = asyncio.ensure_future(service.dispatcher.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def drain(self) -> None:
        """Takes nothing new."""
        self.draining = True
        for service in self._services:
            service.draining = True

    async def close(self) -> None:
        """Hangs up everywhere."""
        for entry in self._entries.values():
            if entry.loading is not None:
                entry.loading.cancel()
        await asyncio.gather(*(service.dispatcher.close() for service in self._services))

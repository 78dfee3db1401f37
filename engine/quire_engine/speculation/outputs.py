"""What requests were answered lately, each tenant's for itself."""

from array import array
from collections import OrderedDict
from collections.abc import ItemsView

from quire_engine.speculation.index import Bounds, Index

END = -1  # after an output: no token


class Outputs:
    """Of one tenant: its latest, each with END after it."""

    def __init__(self, bounds: Bounds) -> None:
        self.text = array("i")
        self.index = Index(bounds)
        self.cuts = 0  # how often the places in the text became others

    def add(self, output: list[int], most: int) -> None:
        """Keeps at most `most` tokens. A quarter goes at a time, for the rest has to be read anew."""
        self.text.extend(output)
        self.text.append(END)
        if len(self.text) > most:
            self.cut(most * 3 // 4)

    def cut(self, keep: int) -> None:
        """Down to the latest `keep` tokens."""
        del self.text[: len(self.text) - keep]
        self.index.clear()
        self.cuts += 1


class OutputStore:
    """By tenant, which is a request's `cache_salt`. Of too many, those go that were not asked about for longest.

    A token takes up to 44 bytes: 4 in the text, and up to 20 in each of the index's chains.
    """

    def __init__(self, bounds: Bounds, *, tenants: int, tenant_tokens: int, tokens: int) -> None:
        assert tenants > 0 and 0 < tenant_tokens <= tokens
        self._bounds = bounds
        self._tenants, self._tenant_tokens, self._tokens = tenants, tenant_tokens, tokens
        self._outputs: OrderedDict[bytes, Outputs] = OrderedDict()  # the least recently used first
        self.size = 0  # tokens, with the ENDs

    def items(self) -> ItemsView[bytes, Outputs]:
        """The least recently used first."""
        return self._outputs.items()

    def add(self, tenant: bytes, output: list[int]) -> None:
        """Now this too was answered."""
        if len(output) <= self._bounds.short:
            return  # nothing in it follows a run
        outputs = self._outputs.get(tenant) or Outputs(self._bounds)
        self._outputs[tenant] = outputs
        self._outputs.move_to_end(tenant)
        self.size -= len(outputs.text)
        outputs.add(output, self._tenant_tokens)
        self.size += len(outputs.text)
        while len(self._outputs) > self._tenants or self.size > self._tokens:
            _, oldest = self._outputs.popitem(last=False)
            self.size -= len(oldest.text)
            oldest.cut(0)  # for matches that still point there

    def of(self, tenant: bytes) -> Outputs | None:
        """None: nothing yet."""
        if tenant not in self._outputs:
            return None
        self._outputs.move_to_end(tenant)
        return self._outputs[tenant]

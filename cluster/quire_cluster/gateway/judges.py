"""Deployments that judge texts for policies."""

from quire_engine.text.params import SamplingParams

from quire_cluster.gateway.generation import Call
from quire_cluster.gateway.models import Models
from quire_cluster.governance.callers import ANYONE, Caller, Role, Tenant

_JUDGE = Caller(tenant=Tenant(name=""), role=Role.USER, key="policy")  # for whom they answer
_ANSWER = 32  # tokens, at most


async def judge(models: Models, model: str, question: str) -> str:
    """What a model answers, no policy looking at it. Raises QuireError."""
    service = await models.find(model, ANYONE)
    service.check_generates()
    asked = [{"role": "user", "content": question}]
    prompt, _ = await service.render(asked, add_generation_prompt=True, continue_final_message=False)
    sampling = await service.sampling(SamplingParams(max_tokens=_ANSWER, temperature=0.0))
    generation = service.start(prompt, sampling, Call(route="judge", caller=_JUDGE), policed=False)
    said = ""
    try:
        while deltas := await generation.deltas():
            for delta in deltas:
                if delta.error is not None:
                    raise delta.error
                said += delta.text
    finally:
        service.finished(generation)
    return said

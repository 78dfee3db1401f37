"""docs/limits.md says what the code does."""

from pathlib import Path

import pytest
from quire_cluster.config import ServeConfig
from quire_cluster.gateway import completions, pooling
from quire_cluster.policies import restart
from quire_cluster.policies.admission import rebuild_wait
from quire_engine.config import EngineConfig
from quire_engine.request import MAX_LOGPROBS
from quire_engine.text import params

TEXT = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()
ROWS = {cells[1]: cells[2] for line in TEXT.splitlines() if len(cells := [c.strip() for c in line.split("|")]) > 3}
SERVE, ENGINE = ServeConfig(), EngineConfig(model="any")
SAID = {
    "connections at a time": f"`--max-connections` {SERVE.max_connections}",
    "time until the headers are there": f"`--header-timeout` {SERVE.header_timeout:g} s",
    "time until the body is there": f"`--body-timeout` {SERVE.body_timeout:g} s",
    "time that an answer is left unread": f"`--write-timeout` {SERVE.write_timeout:g} s",
    "running requests at the end": f"`--shutdown-timeout` {SERVE.shutdown_timeout:g} s",
    "requests that run at once, of each replica": f"`--max-num-seqs` {ENGINE.max_num_seqs}",
    "requests that wait, of each replica": f"`--max-num-queued-reqs` {ENGINE.max_num_queued_reqs}",
    "prompts of a call, answers of a call (prompts times `n`)": f"{completions.MAX_PROMPTS}, {completions.MAX_ANSWERS}",
    "`n`": f"{params.MAX_CHOICES}",
    "texts of `/v1/embeddings`, `/v1/score`, `/v1/rerank`": f"{pooling.MAX_INPUTS}",
    "`stop`: texts, characters of one": f"{params.MAX_STOP_STRINGS}, {params.MAX_STOP_LENGTH}",
    "`stop_token_ids`": f"{params.MAX_STOP_TOKENS}",
    "`logit_bias`": f"{params.MAX_BIASES} tokens, -100 to 100",
    "`bad_words`: texts, characters of one": f"{params.MAX_BAD_WORDS}, {params.MAX_BAD_WORD_LENGTH}",
    "`logprobs`, `top_logprobs`, `prompt_logprobs`": f"{MAX_LOGPROBS}",
    "failures of a replica's place in a row": f"{restart._FIRST_ATTEMPTS} before it ever served, {restart._ATTEMPTS} ",
    "time that they wait for one": f"3 times as long as a replica took to load, {rebuild_wait(0.0):g} s at least",
}


@pytest.mark.parametrize("limit", SAID)
def test_the_page_has_the_limit(limit: str) -> None:
    assert ROWS[limit].startswith(SAID[limit])

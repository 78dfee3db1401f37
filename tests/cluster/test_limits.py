"""docs/limits.md says what the code does, and for each of its rows there is a test that meets the limit."""

import inspect
from pathlib import Path

import pytest
from quire_cluster import liveness
from quire_cluster.config import ServeConfig
from quire_cluster.gateway import (
    bodies,
    completions,
    connection,
    dispatcher,
    doors,
    fields,
    grpc_api,
    images,
    media,
    models,
    pooling,
    service,
    texts,
)
from quire_cluster.policies import lease, quarantine, restart
from quire_cluster.policies.admission import rebuild_wait
from quire_cluster.policies.suspicion import Patience
from quire_engine.config import EngineConfig
from quire_engine.guidance import schemas, structure
from quire_engine.memory import plan
from quire_engine.multimodal.pictures import PictureLimits
from quire_engine.request import MAX_LOGPROBS
from quire_engine.text import chat_template, messages, params
from quire_engine.text.formats import chat, tools

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "limits.md").read_text()
CALLERS, _, OPTIONS = TEXT.partition("\n## Options\n")
ROWS = {
    cells[1]: cells[2]
    for line in CALLERS.splitlines()
    if len(cells := [c.strip() for c in line.split("|")]) > 3 and cells[1] not in ("limit", "---")
}
SERVE, ENGINE, PICTURE = ServeConfig(), EngineConfig(model="any"), PictureLimits()
FETCHED = inspect.signature(media.Media).parameters["timeout"].default
SAID = {
    "connections at a time": f"`--max-connections` {SERVE.max_connections} ",
    "calls of one connection": f"1 ({connection._PIPELINED} more wait in line) ",
    "time until TLS is agreed on (`--ssl-certfile`)": f"`--header-timeout` {SERVE.header_timeout:g} s",
    "time until the headers are there": f"`--header-timeout` {SERVE.header_timeout:g} s",
    "time until the body is there": f"`--body-timeout` {SERVE.body_timeout:g} s",
    "time that an answer is left unread": f"`--write-timeout` {SERVE.write_timeout:g} s",
    "silence between requests": f"{connection._IDLE} s; gRPC {grpc_api._IDLE} s, pings from {grpc_api._PINGS} s",
    "size of the headers": f"{connection._HEAD_BYTES >> 10} KiB; gRPC {grpc_api._METADATA >> 10} KiB",
    "framing of a chunked body in a row, trailers (left out)": f"{connection._HEAD_BYTES >> 10} KiB",
    "bodies that are being read, together": f"{doors._HELD_BODIES >> 20} MiB",
    "a body": f"{texts._ROOM >> 20} MiB, and what the call's prompts can be long in this context; "
    f"{bodies.MAX_BODY >> 20} MiB",
    "`prompt`, a message's or an input's text": f"2^{fields.MAX_TEXT.bit_length() - 1} characters",
    "messages of a conversation": f"{fields.MAX_MESSAGES:,}",
    "`tool_calls` of a message": f"{messages.MAX_CALLS}",
    "`tools`: functions, letters of a name, characters of JSON of all, depth": f"{tools.MAX_TOOLS}, {tools.MAX_NAME}, "
    f"2^{tools.MAX_SCHEMA_SIZE.bit_length() - 1}, {tools.MAX_SCHEMA_DEPTH}",
    "calls of one answer": f"{chat.MAX_CALLS}",
    "a regular expression, a grammar, a schema: characters": f"2^{structure.MAX_GRAMMAR.bit_length() - 1}",
    "a JSON schema: depth, names of properties": f"{schemas.MAX_DEPTH}, {schemas.MAX_NAMES}",
    "`choice` of `structured_outputs`": f"{structure.MAX_CHOICES:,} texts, "
    f"2^{structure.MAX_GRAMMAR.bit_length() - 1} characters",
    "tags of a `structural_tag`": f"{structure.MAX_TAGS}",
    "rendering a chat template": f"{chat_template.RENDER_SECONDS:g} s, "
    f"2^{chat_template.MAX_RENDERED.bit_length() - 1} characters",
    "images of a request": f"`--limit-mm-per-prompt` {ENGINE.images_per_prompt} ",
    "an image: its file, its pixels, its longer side": f"{PICTURE.max_bytes >> 20} MiB, "
    f"2^{PICTURE.max_pixels.bit_length() - 1}, {PICTURE.max_aspect} times the shorter one",
    "tokens of an image": f"what `--encoder-cache-memory-bytes` holds: {plan._CPU_IMAGE_TOKENS} on a CPU, "
    f"{plan._GPU_IMAGE_TOKENS} on a GPU",
    "reading an image": f"{images._SECONDS:g} s, {images._THREADS} of a model at a time",
    "fetching an image": f"{FETCHED:g} s, {media._MOST_REDIRECTIONS} redirections, {media._AT_ONCE} at a time",
    "files of images of requests under way, together": f"{images._FILES >> 20} MiB",
    "prompts of a call, answers of a call (prompts times `n`)": f"{completions.MAX_PROMPTS}, {completions.MAX_ANSWERS}",
    "`n`": f"{params.MAX_CHOICES}",
    "texts of `/v1/embeddings`, `/v1/score`, `/v1/rerank`": f"{pooling.MAX_INPUTS}",
    "`stop`: texts, characters of one": f"{params.MAX_STOP_STRINGS}, {params.MAX_STOP_LENGTH}",
    "`stop_token_ids`": f"{params.MAX_STOP_TOKENS}",
    "`logit_bias`": f"{params.MAX_BIASES} tokens, -100 to 100",
    "`bad_words`: texts, characters of one": f"{params.MAX_BAD_WORDS}, {params.MAX_BAD_WORD_LENGTH}",
    "`logprobs`, `top_logprobs`, `prompt_logprobs`": f"{MAX_LOGPROBS}",
    "requests that run at once, of each replica": f"`--max-num-seqs` {ENGINE.max_num_seqs}",
    "requests that wait, of each replica": f"`--max-num-queued-reqs` {ENGINE.max_num_queued_reqs}",
    "time that they wait for one": f"3 times as long as a replica took to load, {rebuild_wait(0.0):g} s at least",
    "time that requests wait for a gateway to read a model's tokenizer": f"{models._READ:g} s",
    "replicas that may be lost while they compute a request": f"2 ({quarantine.BESIDE} where",
    "time that what is new waits while a request that a replica died under is tried": f"{dispatcher._HELD_BACK:g} s, ",
    "silence of a replica": f"{Patience().avoid:g} s: nothing new goes there; {Patience().move:g} s: ",
    "a step without progress": f"{lease.LEAST:g} s and up",
    "a replica that is gone, that says nothing, or that is busy without a step": "as long as requests wait for one, "
    f"{service._SILENCE:g} s, {service._STALL:g} s",
    "loads of a replica's place that fail in a row": f"{restart._FIRST_ATTEMPTS} before it ever served, "
    f"{restart._ATTEMPTS} after",
    "deaths of a replica that served": f"any number; it comes back with a pause, {restart._LONGEST_AFTER_SERVICE:g} s ",
    "silence of a replica or a worker that loads, of the controller": f"{liveness.SILENCE:g} s "
    f"({liveness.FIRST_SILENCE:g} s until its process first answers)",
    "running requests at the end": f"`--shutdown-timeout` {SERVE.shutdown_timeout:g} s",
}
CALL = "cluster/test_call_limits.py"
WIRE = "end_to_end/test_connections.py"
DOORS = "end_to_end/test_doors.py"
IMAGES = "end_to_end/test_images.py"
LIVENESS = "cluster/test_liveness.py"
ERRORS = "end_to_end/test_tool_errors.py"
STRUCTURED = [
    f"{ERRORS}::test_what_is_wrong_is_refused_by_name_over_http_and_grpc",
    "engine/test_guidance_refusals.py::test_what_is_refused_before_it_reaches_an_engine",
]
SAMPLED = [f"{CALL}::test_what_is_sampled"]
MET: dict[str, list[str]] = {
    "the key": [
        f"{DOORS}::test_every_route_but_health_wants_a_key",
        f"{DOORS}::test_every_call_but_health_wants_a_key",
        f"{WIRE}::test_continue_comes_before_a_body_that_is_wanted_only",
        f"{CALL}::test_as_many_calls_as_connections",
        "cluster/test_parts.py::test_keys",
    ],
    "names of the server": [f"{DOORS}::test_names_and_sites"],
    "sites whose pages may call": [f"{DOORS}::test_names_and_sites", f"{DOORS}::test_scripts_of_an_allowed_site"],
    "connections at a time": [
        f"{WIRE}::test_connections_are_bounded_and_health_still_answers",
        f"{WIRE}::test_idle_connections_make_room",
        f"{CALL}::test_more_connections_are_not_accepted",
        f"{CALL}::test_as_many_calls_as_connections",
    ],
    "calls of one connection": [
        f"{WIRE}::test_who_leaves_with_requests_in_line_leaves_no_work",
        f"{CALL}::test_calls_and_headers_of_one_connection",
    ],
    "a certificate of the client": ["cluster/test_tls.py::test_clients_show_certificates_where_they_have_to"],
    "time until TLS is agreed on (`--ssl-certfile`)": [
        "cluster/test_tls.py::test_who_says_nothing_is_hung_up_on",
        "cluster/test_tls.py::test_who_says_nothing_counts_as_a_connection",
    ],
    "time until the headers are there": [
        f"{WIRE}::test_silence_and_slowness_are_hung_up_on",
        f"{WIRE}::test_silent_grpc_connections_end",
    ],
    "time until the body is there": [
        f"{WIRE}::test_silence_and_slowness_are_hung_up_on",
        f"{WIRE}::test_a_call_without_its_message_ends",
    ],
    "time that an answer is left unread": [
        f"{WIRE}::test_a_stream_that_nobody_reads_is_let_go",
        f"{WIRE}::test_a_call_whose_answers_nobody_reads_is_let_go",
    ],
    "silence between requests": ["cluster/test_clocks.py::test_a_blank_line_after_a_request_ends_no_answer"],
    "size of the headers": [
        f"{WIRE}::test_headers_are_bounded",
        f"{WIRE}::test_metadata_and_messages_are_bounded",
        f"{CALL}::test_calls_and_headers_of_one_connection",
    ],
    "framing of a chunked body in a row, trailers (left out)": [
        "cluster/test_clocks.py::test_what_follows_a_body_without_end_is_too_long_before_it_is_late"
    ],
    "bodies that are being read, together": [f"{CALL}::test_bodies_that_are_too_many_together"],
    "`Content-Encoding` of a body": [f"{WIRE}::test_bodies_are_read_as_they_are"],
    "a body": [f"{CALL}::test_how_long_a_body_is", f"{CALL}::test_how_long_a_message_is"],
    "`prompt`, a message's or an input's text": [f"{CALL}::test_what_a_body_holds"],
    "values in a body": [f"{CALL}::test_what_a_body_holds"],
    "messages of a conversation": [f"{CALL}::test_what_a_body_holds", f"{CALL}::test_what_a_message_holds"],
    "token ids of a call, tokens that /tokenize gives": [
        f"{CALL}::test_what_a_body_holds",
        f"{CALL}::test_what_a_message_holds",
        f"{CALL}::test_tokens_that_are_listed",
    ],
    "integers": [f"{CALL}::test_what_a_body_holds", "cluster/test_schema.py::test_integers_are_bounded"],
    "`tool_calls` of a message": ["engine/test_tool_turns.py::test_what_is_wrong_with_messages_is_said_by_name"],
    "`tools`: functions, letters of a name, characters of JSON of all, depth": [
        "engine/test_tools.py::test_what_is_no_list_of_tools_is_refused_by_name",
        f"{ERRORS}::test_what_is_wrong_is_refused_by_name_over_http_and_grpc",
    ],
    "calls of one answer": ["engine/test_guidance_cursor.py::test_the_output_ends_after_so_many_sections"],
    "a regular expression, a grammar, a schema: characters": STRUCTURED,
    "a JSON schema: depth, names of properties": STRUCTURED,
    "`choice` of `structured_outputs`": STRUCTURED,
    "tags of a `structural_tag`": STRUCTURED,
    "compiling a grammar": ["engine/test_guidance_refusals.py::test_what_is_refused_before_it_reaches_an_engine"],
    "rendering a chat template": [
        "engine/test_chat_template.py::test_rendering_ends",
        "engine/test_chat_template.py::test_what_is_rendered_is_bounded",
    ],
    "images of a request": [f"{IMAGES}::test_bad_images_cost_their_requests_alone"],
    "an image: its file, its pixels, its longer side": [
        f"{IMAGES}::test_bad_images_cost_their_requests_alone",
        "engine/test_pictures.py::test_limits_hold_just_there",
    ],
    "tokens of an image": ["engine/test_images.py::test_what_never_can_be_seen_is_refused"],
    "reading an image": ["cluster/test_gateway_images.py::test_an_image_that_takes_too_long_is_refused"],
    "fetching an image": [
        "cluster/test_media.py::test_hostile_servers",
        "cluster/test_media.py::test_redirections_elsewhere_are_not_followed",
        "cluster/test_media.py::test_so_many_are_fetched_at_a_time",
    ],
    "files of images of requests under way, together": [
        "cluster/test_gateway_images.py::test_files_of_requests_under_way_are_bounded"
    ],
    "vectors of one answer": [f"{CALL}::test_vectors_of_one_answer"],
    "prompts of a call, answers of a call (prompts times `n`)": [f"{CALL}::test_what_a_body_holds"],
    "`n`": SAMPLED,
    "texts of `/v1/embeddings`, `/v1/score`, `/v1/rerank`": [f"{CALL}::test_texts_for_vectors"],
    "`stop`: texts, characters of one": SAMPLED,
    "`stop_token_ids`": SAMPLED,
    "`logit_bias`": SAMPLED,
    "`bad_words`: texts, characters of one": SAMPLED,
    "`logprobs`, `top_logprobs`, `prompt_logprobs`": [*SAMPLED, f"{CALL}::test_what_a_body_holds"],
    "`allowed_token_ids`": [*SAMPLED, f"{CALL}::test_what_a_message_holds"],
    "`resume`: tokens": [
        f"{CALL}::test_what_a_message_holds",
        "cluster/test_broken_streams.py::test_what_cannot_be_gone_on_with",
    ],
    "`temperature`": SAMPLED,
    "`top_p`, `min_p`": SAMPLED,
    "`top_k`": SAMPLED,
    "`presence_penalty`, `frequency_penalty`": SAMPLED,
    "`repetition_penalty`": SAMPLED,
    "`user`, `cache_salt`, `request_id`: characters": [f"{CALL}::test_what_a_body_holds"],
    "`role` of a message, `reasoning_effort`, `verbosity`: characters": [f"{CALL}::test_what_a_body_holds"],
    "prompt and `max_tokens`": [
        *SAMPLED,
        f"{CALL}::test_what_a_body_holds",
        f"{CALL}::test_what_a_message_holds",
        "end_to_end/test_http.py::test_bad_input",
    ],
    "requests that run at once, of each replica": ["end_to_end/test_http.py::test_64_streams"],
    "requests that wait, of each replica": [
        "cluster/test_gateway_http.py::test_at_overload_the_gateway_refuses_before_sending",
        "cluster/test_gateway_http.py::test_a_refused_second_prompt_refuses_the_call_at_once",
        f"{CALL}::test_what_a_refusal_is_called",
    ],
    "requests that wait while there is no replica": [
        "cluster/test_resumption.py::test_what_waits_for_a_replica_is_bounded_and_ends",
        f"{CALL}::test_what_a_refusal_is_called",
    ],
    "time that they wait for one": [
        "cluster/test_resumption.py::test_who_waits_for_a_replica_is_told_in_time_that_none_came",
        f"{CALL}::test_what_a_refusal_is_called",
    ],
    "time that requests wait for a gateway to read a model's tokenizer": [
        "cluster/test_models.py::test_a_model_that_takes_long_to_read_is_not_waited_for_without_end",
        f"{CALL}::test_what_a_refusal_is_called",
    ],
    "replicas that may be lost while they compute a request": [
        "cluster/test_poison.py::test_what_kills_replicas_ends_and_what_ran_beside_it_goes_on",
        "cluster/test_policies.py::test_of_requests_only_the_poison_is_convicted",
        f"{CALL}::test_what_a_refusal_is_called",
    ],
    "time that what is new waits while a request that a replica died under is tried": [
        "cluster/test_poison.py::test_what_is_new_does_not_wait_long_for_a_suspect"
    ],
    "silence of a replica": [
        "cluster/test_sessions.py::test_a_replica_that_vanishes_without_a_word_is_avoided_and_then_left",
        "end_to_end/test_faults.py::test_a_replica_that_hangs_is_found_and_costs_no_token",
    ],
    "a step without progress": [
        "cluster/test_parts.py::test_a_lease_runs_out_when_nothing_moves",
        "end_to_end/test_faults.py::test_a_worker_that_hangs_is_found_and_costs_no_token",
    ],
    "a replica that is gone, that says nothing, or that is busy without a step": [
        "cluster/test_gateway_http.py::test_health_and_readiness_follow_the_replicas",
        "cluster/test_gateway_http.py::test_health_says_which_replica_is_gone_silent_or_stalled",
    ],
    "loads of a replica's place that fail in a row": [
        "cluster/test_policies.py::test_a_model_that_dies_loading_is_not_started_for_ever",
        "cluster/test_policies.py::test_a_replica_that_served_is_started_again_with_growing_pauses",
    ],
    "deaths of a replica that served": ["cluster/test_policies.py::test_no_request_makes_a_replica_be_given_up"],
    "silence of a replica or a worker that loads, of the controller": [
        f"{LIVENESS}::test_a_worker_that_hangs_while_it_loads_is_found",
        f"{LIVENESS}::test_a_replica_that_hangs_while_it_loads_is_replaced",
        f"{LIVENESS}::test_a_controller_that_hangs_is_started_again",
    ],
    "running requests at the end": [f"{CALL}::test_a_server_at_its_end_takes_nothing_new"],
}


@pytest.mark.parametrize("limit", SAID)
def test_the_page_has_the_limit(limit: str) -> None:
    assert f"{ROWS[limit]} ".startswith(SAID[limit])


def test_every_limit_is_met_by_a_test() -> None:
    assert MET.keys() == ROWS.keys()
    for name in {name for tests in MET.values() for name in tests}:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), name

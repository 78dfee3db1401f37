"""`quire run-batch`: OpenAI's batch file format, offline. One line in, one line out, in the same order.

Results are written as they come. A run that was stopped goes on where it was: what has a result in the output already
(told by its custom_id) is not run again.
"""

import os
import stat
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import orjson
from quire_cluster.config import MediaConfig
from quire_engine.config import EngineConfig
from quire_engine.errors import InvalidParameter, RequestError, ServerError

from quire.cli.batch_lines import Line, line_of
from quire.llm import LLM, RequestOutput

NOTHING_OPEN = MediaConfig()  # images come in data URLs alone
_SHARE = 1024  # lines that run together, and are written together
_BOM = b"\xef\xbb\xbf"
_RESULT = b'{"id":"batch_req_'  # every result begins so; nothing else is added to, or cut


def run_batch(config: EngineConfig, source: str, target: str, media: MediaConfig = NOTHING_OPEN) -> None:
    """Runs every line that can be run; a line that cannot gets its error. `media`: where URLs of images may lead.
    Raises InvalidParameter for the files."""
    lines = _read(Path(source))
    output = Path(target)
    done = _done(output)
    given = {name: value for name, value in vars(config).items() if name != "model"} | vars(media)
    with _open(output) as file, LLM(config.model, **given) as llm:
        good = run = 0
        seen: set[str] = set()
        for start in range(0, len(lines), _SHARE):
            share = [line_of(llm, data, number) for number, data in lines[start : start + _SHARE]]
            for line in share:
                if line.custom_id in seen:
                    line.fail(InvalidParameter(f"custom_id {line.custom_id!r:.100} is an earlier line's", "custom_id"))
                seen.add(line.custom_id)
            share = [line for line in share if line.custom_id not in done]
            _run(llm, share)
            run += len(share)
            good += sum(line.error is None for line in share)
            _write(file, b"".join(orjson.dumps(line.result()) + b"\n" for line in share), target)
    before = f" ({len(lines) - run} had results already)" if run < len(lines) else ""
    print(f"{good} of {run} requests done{before}, written to {target}", file=sys.stderr)  # results may go to stdout


def _run(llm: LLM, lines: list[Line]) -> None:
    """All together; where that fails for a request's sake, one by one, so that only that one is lost."""
    runnable = [line for line in lines if line.error is None]
    try:
        if llm.pooling is None:
            asked = [(RequestOutput(None, line.prompt, images=line.images), line.sampling) for line in runnable]
            for line, output in zip(runnable, llm.run(asked) if runnable else [], strict=True):
                line.take(output)
        elif runnable:
            vectors = iter(llm.embed([tokens for line in runnable for tokens in line.inputs]))
            for line in runnable:
                line.take_vectors([next(vectors) for _ in line.inputs])
    except RequestError as error:
        if len(runnable) == 1:
            runnable[0].fail(error)
            return
        for line in runnable:
            _run(llm, [line])


def _read(source: Path) -> list[tuple[int, bytes]]:
    """Each line that is not blank, with its number in the file."""
    try:
        data = source.read_bytes()
    except OSError as error:
        raise InvalidParameter(f"{source} cannot be read: {error.strerror}", "input") from error
    lines = [(number, line) for number, line in enumerate(data.removeprefix(_BOM).split(b"\n"), 1) if line.strip()]
    if not lines:
        raise InvalidParameter(f"{source} holds no requests", "input")
    return lines


def _open(target: Path) -> FileIO:
    """To append to, before anything is loaded."""
    try:
        return target.open("ab", buffering=0)
    except OSError as error:
        raise InvalidParameter(f"{target} cannot be written: {error.strerror}", "output") from error


def _write(file: FileIO, data: bytes, target: str) -> None:
    """Until it is on the disk, where it is a file that goes to one. Raises BrokenPipeError, and ServerError for
    whatever else keeps it from being written."""
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.fsync(file.fileno())
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ServerError(
            f"{target} cannot be written: {error.strerror}; the same command goes on after what is there"
        ) from error


def _done(target: Path) -> set[str]:
    """The custom_ids that have a result. A last one that was cut short is taken away. Raises InvalidParameter where
    the file holds anything else."""
    if not target.is_file():
        return set()
    try:
        data = target.read_bytes()
        whole = data.rfind(b"\n") + 1
        found = set(_ids(data[:whole], target))
        if cut := data[whole:]:
            if cut[: len(_RESULT)] != _RESULT[: len(cut)]:
                raise _foreign(target, data.count(b"\n") + 1)
            os.truncate(target, whole)
    except OSError as error:
        raise InvalidParameter(f"{target} cannot be written: {error.strerror}", "output") from error
    return found


def _ids(data: bytes, target: Path) -> Iterator[str]:
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        if not line.startswith(_RESULT):
            raise _foreign(target, number)
        try:
            yield orjson.loads(line)["custom_id"]
        except (ValueError, KeyError) as error:
            raise _foreign(target, number) from error


def _foreign(target: Path, number: int) -> InvalidParameter:
    return InvalidParameter(f"line {number} of {target} is no result of a batch; name another output file", "output")

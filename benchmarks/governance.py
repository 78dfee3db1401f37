"""What governance costs: output tokens/s at 64 streams with it, over those without, of one tenant with limits, records
and (--policies) rules on its answers; and the gateway's CPU time. Two servers of the demo model, asked in turns.

    python benchmarks/governance.py [--streams 64] [--requests 64] [--output-tokens 64] [--starts 4]
        [--rounds 2] [--policies]
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from side_by_side import running

_QUIRE = (sys.executable, "-m", "quire.cli.main")
_READY = r"OpenAI API +(http://\S+)/v1"
_POLICIES = """
policies:
  - {name: emails, check: pii, kinds: [email, credit_card, iban, us_ssn], action: redact, on: &out [output]}
  - {name: secrets, check: pattern, patterns: ['sk-[A-Za-z0-9]{20,64}'], action: stop, on: *out}
"""


def quire(folder: Path, *arguments: str) -> str:
    """What a command says."""
    return subprocess.run([*_QUIRE, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Prints each round, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument(
        "--starts", type=int, default=4, help="of both servers: one process may be faster than its like"
    )
    parser.add_argument("--rounds", type=int, default=2, help="loads of each server")
    parser.add_argument("--policies", action="store_true")
    asked = parser.parse_args()
    rates: dict[str, list[float]] = {"without": [], "with": []}
    spent: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "governance.yaml").write_text(_POLICIES if asked.policies else "")
        limits = ["--tokens-per-minute", "100000000", "--requests-per-minute", "1000000"]
        quire(folder, "tenants", "add", "team", *limits, "--concurrent-requests", "10000")
        key = quire(folder, "keys", "create", "team").split()[0]
        for number in range(asked.starts):
            with contextlib.ExitStack() as stack:
                servers = {}
                for kind in sorted(rates, reverse=number % 2 == 0):
                    options = ["--governance", str(folder / "governance.yaml")] if kind == "with" else []
                    command = [*_QUIRE, "serve", "--port", "0", "--grpc-port", "0", *options]
                    process, _, found = stack.enter_context(running(command, _READY))
                    servers[kind] = psutil.Process(process.pid), found[1]
                for place in range(asked.rounds + 1):
                    for kind, (process, url) in servers.items():
                        rate, seconds = load(process, url, key, asked, folder / "figures.json")
                        if place:  # the first warms
                            rates[kind].append(rate)
                            spent[kind].append(1e6 * seconds / (asked.requests * asked.output_tokens))
                            print(f"{kind:8} {rate:8.1f} tokens/s {spent[kind][-1]:8.0f} µs", flush=True)
    middle = {kind: (statistics.median(rates[kind]), statistics.median(spent[kind])) for kind in rates}
    print(f"tokens/s with governance over without: {middle['with'][0] / middle['without'][0]:.3f}")
    print(f"the gateway's CPU time per output token: {middle['without'][1]:.0f} µs; {middle['with'][1]:.0f} µs with it")


def load(process: psutil.Process, url: str, key: str, asked: argparse.Namespace, found: Path) -> tuple[float, float]:
    """One load of a server: tokens/s, and the seconds of CPU time of its gateway."""
    command = [
        *(sys.executable, str(Path(__file__).parent / "load.py"), "--url", url, "--api-key", key),
        *("--concurrency", str(asked.streams), "--requests", str(asked.requests)),
        *("--output-tokens", str(asked.output_tokens), "--json", str(found)),
    ]
    before = process.cpu_times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = process.cpu_times()
    [one] = json.loads(found.read_text())
    return one["output_tokens_per_s"], after.user + after.system - before.user - before.system


if __name__ == "__main__":
    main()

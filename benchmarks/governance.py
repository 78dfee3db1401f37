"""What governance costs: output tokens/s at 64 streams with it, over those without, of one tenant with limits, records
and (--policies) rules on its answers. Two servers of the demo model, in turns, each asked the same.

    python benchmarks/governance.py [--streams 64] [--requests 128] [--output-tokens 64] [--rounds 2] [--policies]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from side_by_side import running

_READY = r"OpenAI API +(http://\S+)/v1"
_POLICIES = """
policies:
  - {name: emails, check: pii, kinds: [email, credit_card, iban, us_ssn], action: redact, on: &out [output]}
  - {name: secrets, check: pattern, patterns: ['sk-[A-Za-z0-9]{20,64}'], action: stop, on: *out}
"""


def quire(folder: Path, *arguments: str) -> str:
    """What a command says."""
    command = [sys.executable, "-m", "quire.cli.main", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Prints each round, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--policies", action="store_true")
    asked = parser.parse_args()
    figures: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "governance.yaml").write_text(_POLICIES if asked.policies else "")
        limits = [
            "--tokens-per-minute",
            "100000000",
            "--requests-per-minute",
            "1000000",
            "--concurrent-requests",
            "10000",
        ]
        quire(folder, "tenants", "add", "team", *limits)
        key = quire(folder, "keys", "create", "team").split()[0]
        for number in range(2 * asked.rounds):
            kind = list(figures)[number % 2]
            options = ["--governance", str(folder / "governance.yaml")] if kind == "with" else []
            command = [sys.executable, "-m", "quire.cli.main", "serve", "--port", "0", "--grpc-port", "0", *options]
            with running(command, _READY) as (_, _, found):
                load = [
                    *(sys.executable, str(Path(__file__).parent / "load.py"), "--url", found[1], "--api-key", key),
                    *("--concurrency", str(asked.streams), "--requests", str(asked.requests)),
                    *("--output-tokens", str(asked.output_tokens), "--json", str(folder / "figures.json")),
                ]
                subprocess.run(load, check=True, env=os.environ)
            [one] = json.loads((folder / "figures.json").read_text())
            figures[kind].append(one["output_tokens_per_s"])
            print(f"{kind:8} {figures[kind][-1]:8.1f} tokens/s", flush=True)
    ratio = statistics.median(figures["with"]) / statistics.median(figures["without"])
    print(f"with governance / without: {ratio:.3f}")


if __name__ == "__main__":
    main()

"""Requests made from the service's OpenAPI description by schemathesis.

    python -m tests.hardening.schema_fuzz --schemathesis /path/to/schemathesis --cases 10000

No answer may be a server error. schemathesis is no dependency: any environment that has it will do.
"""

import argparse
import re
import shutil
import subprocess
import sys

import httpx

from tests.hardening.service import Service, hardening_service


def fuzz(service: Service, command: str, cases: int) -> tuple[int, str]:
    """Exit code and output of schemathesis, with so many cases over all operations together."""
    paths = httpx.get(f"{service.url}/openapi.json", timeout=30).json()["paths"]
    operations = sum(len(methods) for methods in paths.values())
    words = [command, "run", f"{service.url}/openapi.json", "--checks", "not_a_server_error"]
    words += [
        "--max-examples",
        str(max(1, cases // operations)),
        "--phases",
        "examples,coverage,fuzzing",
    ]
    words += ["--continue-on-failure", "--seed", "1", "--request-timeout", "60", "--no-color"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def num_cases(output: str) -> int:
    """Cases that schemathesis says it has made."""
    found = re.findall(r"([0-9,]+) generated", output)
    return int(found[-1].replace(",", "")) if found else 0


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--schemathesis", default=shutil.which("schemathesis"))
    parser.add_argument("--model")
    options = parser.parse_args()
    if options.schemathesis is None:
        parser.error("no schemathesis here; name one with --schemathesis")
    with hardening_service(options.model, "--max_queue_size", "256") as service:
        exit_code, output = fuzz(service, options.schemathesis, options.cases)
        print(output[-4000:])
        print(f"{num_cases(output):,} cases")
        alive = httpx.get(f"{service.url}/health", timeout=30).status_code == 200
    return int(exit_code != 0 or not alive)


if __name__ == "__main__":
    sys.exit(main())

"""Time to the page's first paint, and its size.

    python -m tests.benchmarks.playground data/experiments/python_docs/0 --visits 10

Each visit has an empty cache and storage. The browser's own clock counts from the start of the navigation to
the first paint and to the moment when models and parameters are there.
"""

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

from full_stack_transformer.machine import processor_name
from full_stack_transformer.serving.app import playground_files
from tests.benchmarks.machine import NUM_CORES, commit
from tests.logged_process import running_service
from tests.serving.browser import running_browser, visit

_FIRST_PAINT = """() => new Promise(found => new PerformanceObserver(list => {
  const entry = list.getEntriesByName('first-contentful-paint')[0];
  if (entry) found(entry.startTime);
}).observe({ type: 'paint', buffered: true }))"""


def _measure(model: Path, num_visits: int) -> dict[str, Any]:
    paints, ready = [], []
    with running_service(model) as (url, _), running_browser() as browser:
        for _ in range(num_visits):
            with visit(browser, url) as tab:
                tab.open()
                ready.append(tab.page.evaluate("performance.now()"))
                paints.append(tab.page.evaluate(_FIRST_PAINT))
        version = browser.version
    files = playground_files().values()
    return {
        "browser": f"Chromium {version}",
        "num_visits": num_visits,
        "first_paint_milliseconds": _spread(paints),
        "ready_milliseconds": _spread(ready),
        "num_files": len(files),
        "bytes": sum(len(file.body) for file in files),
        "bytes_sent": sum(len(file.zipped) for file in files),
    }


def _spread(values: list[float]) -> dict[str, float]:
    values = [round(one, 1) for one in values]
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main() -> int:
    """Print the figures; fail where the page is slower or larger than it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--visits", type=int, default=10)
    arguments = parser.parse_args()
    machine = {
        "processor": processor_name(),
        "num_cores": NUM_CORES,
        "python": platform.python_version(),
    }
    found: dict[str, Any] = {**machine, "commit": commit()}
    found |= _measure(arguments.model, arguments.visits)
    print(json.dumps(found, indent=1))
    return int(found["first_paint_milliseconds"]["median"] >= 200 or found["bytes"] >= 100_000)


if __name__ == "__main__":
    sys.exit(main())

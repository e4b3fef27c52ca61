"""The demo as a stranger runs it: wall time, exact match before and after, memory forecast beside measurement.

python benchmarks/demo.py [--runs N]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import save


def one_run(folder: Path) -> dict[str, Any]:
    """One `sartor demo` in a process of its own."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "sartor", "demo", str(folder)], check=True, capture_output=True)
    seconds = time.perf_counter() - start
    record = json.loads((folder / "run/run.json").read_text(encoding="utf-8"))
    assert (folder / "run/report.html").stat().st_size > 10_000
    return {
        "wall_seconds": seconds,
        "train_seconds": record["seconds"],
        "tokens_per_second": record["tokens_per_second"],
        "exact_match_before": record["exact_match_before"],
        "exact_match_after": record["exact_match_after"],
        "unseen_examples": len(record["answers"]),
        "forecast_bytes": record["memory"]["forecast_bytes"],
        "measured_bytes": record["memory"]["measured_bytes"],
        "memory_error_percent": record["memory"]["error_percent"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    results = []
    for number in range(parser.parse_args().runs):
        with tempfile.TemporaryDirectory() as scratch:
            result = one_run(Path(scratch) / f"demo-{number}")
        results.append(result)
        print(
            f"demo: {result['wall_seconds']:.0f} s, exact match {result['exact_match_before']:.0%} -> "
            f"{result['exact_match_after']:.0%} on {result['unseen_examples']} unseen examples, "
            f"{result['tokens_per_second']:,.0f} tokens/s, memory forecast {result['memory_error_percent']:+.1f} %",
            flush=True,
        )
    print("written:", save("demo", results))


if __name__ == "__main__":
    main()

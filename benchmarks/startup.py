"""How quickly `sartor --help` answers (median of 10), and how fast text becomes tokens.

python benchmarks/startup.py [--data FOLDER]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import SHARED, save


def help_seconds(runs: int = 10) -> list[float]:
    """Wall time of `sartor --help`, each in a new process, after one that does not count."""
    command = [str(Path(sys.executable).parent / "sartor"), "--help"]
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return times[1:]


def tokenising(folder: Path) -> dict[str, float]:
    """Examples per second of a first preparation (nothing cached), alpaca with GPT-2's tokenizer."""
    from transformers import AutoTokenizer

    from sartor.data import prepare
    from sartor.job import from_mapping

    data = {"path": str(folder / "data/alpaca/alpaca_random_9k.json"), "template": "alpaca"}
    job = from_mapping({"model": "unused", "data": data})
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SARTOR_CACHE"] = cache
        summary = prepare(job, AutoTokenizer.from_pretrained(folder / "tokenizers/gpt2"), max_length=1024).summary
    return {"examples": summary.samples, "seconds": summary.seconds, "examples_per_second": summary.samples / summary.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED)
    folder = parser.parse_args().data
    times = help_seconds()
    results: dict[str, object] = {"help_seconds": times, "help_median_seconds": statistics.median(times)}
    print(f"sartor --help: median {statistics.median(times):.3f} s, worst {max(times):.3f} s")
    if folder.is_dir():
        results["tokenising"] = tokenising(folder)
        print(f"tokenising: {results['tokenising']['examples_per_second']:,.0f} examples/s")  # type: ignore[index]
    print("written:", save("startup", results))


if __name__ == "__main__":
    main()

"""Random cases of placement (tests/placement_cases.py): each is refused with a reason, or runs within its budget; none dies.

    python benchmarks/placement_cases.py --cases 200 --save

Each case is a process of its own, so that one that crashes is counted. The budget is that of weights, gradients and optimizer
state, and what is measured is their memory at every operator; results are compared with those of the same loop without placement,
bit for bit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from common import REPOSITORY, save

sys.path.insert(0, str(REPOSITORY / "tests"))

from placement_cases import Case, run_case


def attempt(seed: int, answer: Connection) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcome = run_case(Case.draw(seed), Path(folder))
        except BaseException:
            answer.send({"failed": traceback.format_exc()})
            return
    answer.send({"refused": outcome.refused, "budget": outcome.budget_bytes, "measured": outcome.measured_bytes})


def result_of(seed: int, seconds: float) -> dict[str, Any]:
    """Of a case; `died` where its process ended without an answer."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=attempt, args=(seed, there))
    process.start()
    there.close()
    try:
        told = here.recv() if here.poll(seconds) else {"died": f"no end after {seconds:.0f} s"}
    except EOFError:
        process.join()
        told = {"died": f"exit code {process.exitcode}"}
    process.kill()
    process.join()
    return {"seed": seed, **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0, help="that a case may take")
    parser.add_argument("--part", help="keep results in this file, and go on from what it has")
    parser.add_argument("--save", action="store_true", help="write a result file")
    arguments = parser.parse_args()
    part = Path(arguments.part) if arguments.part else None
    results = {} if part is None or not part.exists() else {one["seed"]: one for one in json.loads(part.read_text())}
    for seed in range(arguments.first, arguments.first + arguments.cases):
        if seed in results:
            continue
        results[seed] = one = result_of(seed, arguments.seconds)
        if "died" in one or "failed" in one:
            print(Case.draw(seed), one.get("died") or one["failed"], flush=True)
        if part is not None:
            part.write_text(json.dumps(list(results.values())))
    ran = [one for one in results.values() if one.get("measured")]
    counts = Counter(
        "died" if "died" in one else "failed" if "failed" in one else "refused" if one["refused"] else "ran"
        for one in results.values()
    )
    limited = [one["measured"] / one["budget"] for one in ran if one["budget"]]
    summary = {
        "cases": len(results),
        "refused_with_a_reason": counts["refused"],
        "ran": counts["ran"],
        "died": counts["died"],
        "failed": counts["failed"],
        "within_their_budget": sum(share <= 1 for share in limited),
        "with_a_budget": len(limited),
        "most_of_a_budget_used": max(limited, default=0.0),
    }
    print(json.dumps(summary, indent=1))
    if arguments.save:
        note = "refused cases are run with the budget that the refusal names, and refused with a byte less"
        print(save("placement-cases", summary, note=note))


if __name__ == "__main__":
    main()

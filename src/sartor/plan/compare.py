"""One job on several machines: where it fits, how long it takes there, and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sartor.errors import DoesNotFit
from sartor.job import Job
from sartor.plan.make import make
from sartor.plan.plan import SCHEMA_VERSION, Plan


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A machine, and the plan for it; without one, why there is none."""

    machine: str
    plan: Plan | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Machines in the order in which they were named."""

    offers: tuple[Offer, ...]

    @property
    def fastest(self) -> Offer | None:
        """Of those on which the job fits and whose speed is known."""
        times = {offer.machine: offer.plan.time for offer in self.offers if offer.plan is not None}
        hours = {name: time.job_hours for name, time in times.items() if time is not None}
        return self._named(min(hours, key=hours.__getitem__, default=""))

    @property
    def cheapest(self) -> Offer | None:
        """Of those on which the job fits and whose price is known."""
        times = {offer.machine: offer.plan.time for offer in self.offers if offer.plan is not None}
        costs = {name: time.cost_usd for name, time in times.items() if time is not None and time.cost_usd is not None}
        return self._named(min(costs, key=costs.__getitem__, default=""))

    def _named(self, machine: str) -> Offer | None:
        return next((offer for offer in self.offers if offer.machine == machine), None)

    def to_mapping(self) -> dict[str, Any]:
        """As `sartor plan --machines A,B --json` prints it (docs/plan.md)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "plan": "comparison",
            "fastest": self.fastest.machine if self.fastest else None,
            "cheapest": self.cheapest.machine if self.cheapest else None,
            "machines": [
                {"machine": offer.machine, "reason": offer.reason, "plan": offer.plan.to_mapping() if offer.plan else None}
                for offer in self.offers
            ],
        }


def compare(job: Job, machines: Sequence[str]) -> Comparison:
    """The job planned on each machine. Raises UsageError for what is wrong on all of them, or a name that is not known."""
    offers = []
    for name in machines:
        moved = dataclasses.replace(job, machine=dataclasses.replace(job.machine, name=name))
        try:
            offers.append(Offer(machine=name, plan=make(moved)))
        except DoesNotFit as error:
            offers.append(Offer(machine=name, plan=None, reason=error.what))
    return Comparison(offers=tuple(offers))

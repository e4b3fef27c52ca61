"""One job on several machines, as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sartor.job.units import format_bytes, format_seconds
from sartor.plan.compare import Comparison, Offer
from sartor.report import facts
from sartor.report.terminal import VERDICT_STYLES


def show_comparison(comparison: Comparison, console: Console) -> None:
    """A row a machine; the fastest and the cheapest are said below."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("machine", "verdict"):
        table.add_column(name, no_wrap=True)
    for name in ("memory", "step", "job", "USD", "kWh"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("strategy")
    for offer in comparison.offers:
        table.add_row(*_row(offer))
    console.print(table)
    for word, best in (("fastest", comparison.fastest), ("cheapest", comparison.cheapest)):
        if best is not None:
            console.print(Text.assemble((f"{word}: ", "bold"), best.machine))


def _row(offer: Offer) -> list[Text]:
    plan = offer.plan
    if plan is None:
        reason = Text(facts.visible(offer.reason), style="dim")
        return [Text(offer.machine), Text("does not fit", style=VERDICT_STYLES["does not fit"]), *[Text("")] * 5, reason]
    forecast, time = plan.forecast, plan.time
    cells = [
        "" if forecast.process_bytes is None else format_bytes(forecast.process_bytes),
        "not known" if time is None else format_seconds(time.step_seconds),
        "" if time is None else format_seconds(3600 * time.job_hours),
        "" if time is None or time.cost_usd is None else f"{time.cost_usd:,.2f}",
        "" if time is None or time.energy_kwh is None else f"{time.energy_kwh:,.3g}",
        facts.visible(facts.strategy_words(plan.strategy)),
    ]
    return [Text(offer.machine), Text(forecast.verdict, style=VERDICT_STYLES[forecast.verdict]), *map(Text, cells)]

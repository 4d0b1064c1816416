"""What a searched order is to be measured by: the bound, the best family, and what more memory would buy."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vpipe.schedule.search.search import SearchRequest, SearchResult, search

__all__ = ["SearchReport", "report_search"]

_SAME = 1e-9


@dataclass(frozen=True)
class SearchReport:
    """A result beside that with one more microbatch of memory on every rank."""

    request: SearchRequest
    result: SearchResult
    more_makespan: float
    """The makespan with a limit that is higher by 1 on every rank."""

    @property
    def saved(self) -> float:
        """What one more microbatch of memory would save, as a share of the makespan; 0: memory is not the limit."""
        share = 1 - self.more_makespan / self.result.makespan if self.result.makespan else 0.0
        return share if share > _SAME else 0.0

    def to_dict(self) -> dict[str, object]:
        """Return the numbers ready for JSON; `one_more_microbatch` is None where memory is not the limit."""
        result = self.result
        more = {"makespan": self.more_makespan, "saved": self.saved} if self.saved else None
        return {
            "max_in_flight": list(self.request.limits),
            "lower_bound": result.lower_bound,
            "gap": result.gap,
            "best_family": result.best_family,
            "best_family_makespan": result.best_family_makespan,
            "one_more_microbatch": more,
        }

    def lines(self) -> list[str]:
        """Say the numbers in words."""
        result, limits = self.result, self.request.limits
        one = len(set(limits)) == 1
        held = f"{limits[0]:g} on every rank" if one else " ".join(f"{limit:g}" for limit in limits)
        longer = result.best_family_makespan / result.makespan - 1 if result.makespan else 0.0
        if self.saved:
            more = f"memory is the limit: one more on every rank would make it {self.more_makespan:g}, "
            more += f"{100 * self.saved:.2f} % shorter"
        else:
            more = "memory is not the limit: one more microbatch on every rank buys nothing"
        return [
            f"max in flight     {held}, in microbatches",
            f"lower bound       {result.lower_bound:g}, gap {100 * result.gap:.2f} %",
            f"best family       {result.best_family} with {result.best_family_makespan:g}, {100 * longer:.2f} % longer",
            f"more memory       {more}",
        ]


def report_search(request: SearchRequest) -> SearchReport:
    """Search, and search again with one more microbatch of memory (in half the steps), unless none can be used."""
    result = search(request)
    limits = tuple(min(limit + 1, float(request.num_microbatches)) for limit in request.limits)
    if limits == request.limits:
        return SearchReport(request, result, result.makespan)
    more = search(replace(request, limits=limits, num_steps=request.num_steps // 2))
    return SearchReport(request, result, min(result.makespan, more.makespan))

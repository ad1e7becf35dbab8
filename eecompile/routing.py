"""The router of a compiled module as users see and set it: routes, margins, where rows went, what that saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from eecompile.costs import CostModel
from eecompile.errors import StrategyError
from eecompile.ir.settings import BRANCHES, BRANCHES_BUFFER, THRESHOLDS_BUFFER, Settings
from eecompile.passes.place_routes import ROUTES
from eecompile.plain import plain
from eecompile.program import Program
from eecompile.waiting import Waiting

OWN_END = "model"


@dataclass(frozen=True)
class RouteRecord:
    """One route as users see it.

    Attributes:
        name: Of the exit or the branch; "model" and "full" for the model's own end and way.
        to: "exit" or "branch".
        cost: Of a row that takes it, as a fraction of the full model's; open exits elsewhere count as passed by.
        is_open: Whether rows may be sent there.
        margin: Of a branch: what its probability is lowered by before it is compared with the others; above 1 it is
            closed. None for exits, whose thresholds are those of `fast.exits`.
        left_out: Blocks that a light version leaves out.
    """

    name: str
    to: str
    cost: float
    is_open: bool
    margin: float | None = None
    left_out: tuple[str, ...] = ()


class Routing(nn.Module):
    """What `CompiledModule` tells of its router."""

    program: Program
    waiting: Waiting
    graph_module: fx.GraphModule
    route_load: list[dict[str, Any]] | None = None  # what `evaluate` saw last, for `explain`

    cost_model: CostModel
    settings: Settings

    @property
    def open_exits(self) -> list[bool]:
        """Which exits rows may leave at."""
        return self.cost_model.is_open(self.settings)

    @property
    def route_units(self) -> nn.Module:
        """The router's unit, called `unit`, and the branches by name."""
        return self.graph_module.get_submodule(ROUTES) if self.program.routes else nn.Module()

    @property
    def route_margins(self) -> Tensor:
        """[K] float32 of a router to branches; as `thresholds`. Empty without one."""
        found: Tensor = getattr(self.graph_module, BRANCHES_BUFFER, torch.empty(0))
        return found

    @property
    def route_names(self) -> list[str]:
        """Names of the routes, the model's own last; none without a router."""
        if not self.program.routes:
            return []
        (route,) = self.program.routes
        return [e.name for e in self.program.exits] + [OWN_END] if route.to_exits else [w.name for w in route.ways]

    @property
    def routes(self) -> tuple[RouteRecord, ...]:
        if not self.program.routes:
            return ()
        (route,) = self.program.routes
        costs = self.route_costs().tolist()
        if route.to_exits:
            is_open = [*self.open_exits, True]
            return tuple(RouteRecord(n, "exit", c, o) for n, c, o in zip(self.route_names, costs, is_open, strict=True))
        margins = self.settings[BRANCHES]
        return tuple(
            RouteRecord(w.name, "branch", c, m <= 1, m, w.left_out)
            for w, c, m in zip(route.ways, costs, margins, strict=True)
        )

    def set_route_margins(self, margins: Any) -> None:
        """Sets what each branch's probability is lowered by before the largest is taken: by name, or one for each.

        A number alone is for every route but the model's own. 0 compares them as they are, above 1 closes a route: then
        no row takes it, and where one alone is open the router itself is not run. No recompilation.

        Raises:
            StrategyError: No router to branches, a wrong count, an unknown name, a negative number, or all closed.
        """
        count = len(self.settings[BRANCHES])
        if not count:
            raise StrategyError(
                "this program has no router between branches",
                got="a router to exits" if self.program.routes else "no router",
                wanted='Branchy(router=Router(to={"light": 0.5}))',
                hint="exits that rows are sent to have thresholds: set_thresholds" if self.program.routes else None,
            )
        margins = plain(margins)
        if isinstance(margins, int | float) and not isinstance(margins, bool):
            margins = [float(margins)] * (count - 1) + [0.0]
        self.settings = self.settings.with_values(BRANCHES, margins)
        self.waiting.settled(BRANCHES, margins)

    def route_costs(self) -> Tensor:
        """[K] float32: fraction of the full model's FLOPs of a row on each route, with the exits that are open now."""
        return self.cost_model.at_routes(self.settings)

    def taken(self, told: dict[str, Tensor], exit_index: Tensor, settings: Settings) -> Tensor | None:
        """[B] int64, the route of each row, from what a run reported; -1 for rows that had left before. None without."""
        if not self.program.routes:
            return None
        (route,) = self.program.routes
        choice = told[route.name].detach()
        if route.to_exits:  # the first open exit that the router is sure enough of
            thresholds = settings.tensors(choice.device)[THRESHOLDS_BUFFER]
            sent = torch.cat((choice >= thresholds, torch.ones_like(choice[:, :1], dtype=torch.bool)), 1)
            return sent.to(torch.uint8).argmax(1)
        return choice.long().masked_fill(exit_index < route.way_stage, -1)

    def ways_of(self, told: dict[str, Tensor], route: Tensor, mixed: bool) -> Tensor | None:
        """[B, K] how much of each way every row took: 0 and 1 with the gradient of the decision, or mixed weights.

        None without branches.
        """
        if not self.program.routes or self.program.routes[0].to_exits:
            return None
        (r,) = self.program.routes
        admitted = told.get(f"{r.name}.admitted")
        if mixed and admitted is not None:
            return admitted
        hard = torch.nn.functional.one_hot(route.clamp_min(0), len(r.ways)).float()
        hard = hard * (route >= 0).unsqueeze(1)
        return hard if admitted is None else hard + admitted - admitted.detach()

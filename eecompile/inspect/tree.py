"""Tree of a program: stages, blocks with their cost, exits, what decides inside, what survives, refusals, passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from rich.tree import Tree

from eecompile.calibration.guarantee import said
from eecompile.explain import unknown_early
from eecompile.inspect import text as write
from eecompile.inspect.decisions import sections
from eecompile.inspect.outline import Outline, Part
from eecompile.program import Refusal
from eecompile.runtime.live_settings import NOT_TRAINED

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

MOST_REFUSALS = 6


@dataclass(frozen=True)
class ProgramTree:
    """`format="tree"`.

    Attributes:
        whole: Also input, output, refusals, executor and passes, which belong to the program, not to a level.
    """

    fast: CompiledModule
    outline: Outline
    whole: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _Grown(self, options.ascii_only).tree()


class _Grown:
    def __init__(self, shown: ProgramTree, ascii_only: bool) -> None:
        self.fast, self.outline, self.whole, self.ascii = shown.fast, shown.outline, shown.whole, ascii_only
        self.costs = self.fast.costs([e.is_open for e in self.fast.exits]).tolist()
        self.sections = sections(self.fast)
        names = [r.title for _, _, r in self.outline.regions()] + [p.name for p in self.outline.parts]
        self.width = min(56, max(map(len, names), default=0) + 2)

    def tree(self) -> Tree:
        tree = Tree(self._head(), highlight=False)
        program = self.fast.program
        if self.whole:
            for leaf in program.signature.inputs:
                tree.add(Text.assemble(("input ", "dim"), leaf.describe()))
        for part in self.outline.parts:
            if len(self.outline.parts) == 1:
                self._regions(tree, part)
                continue
            branch = tree.add(self._stage(part))
            self._regions(branch, part)
            if part.exit is not None:
                self._exit(branch, part)
        if self.whole:
            unknown = dict(unknown_early(program))
            for i, leaf in enumerate(program.signature.outputs):
                mark = " (the prediction)" if i == program.prediction.index else ""
                if i in unknown:
                    mark += f" ({'NaN' if leaf.dtype.is_floating_point else '0'} for rows that exit before {unknown[i]})"
                tree.add(Text.assemble(("output ", "dim"), leaf.describe() + mark))
            self._decisions(tree)
            self._executor(tree)
            self._refusals(tree, program.refusals)
            self._passes(tree)
        return tree

    def _head(self) -> Text:
        fast = self.fast
        head = Text.assemble((fast.title, "bold"), f", {fast.strategy.name}: ")
        count = len(fast.exits)
        inserted = [f"{count} exit{'' if count == 1 else 's'}"] if count or not self.sections else []
        inserted += [section.count for section in self.sections]
        head.append(f"{', '.join(inserted)}, {write.flops(fast.program.total_flops)} a row")
        if not self.whole:
            level = self.outline.level
            head.append(f"; {level.name}: {self.outline.total} nodes, {level.about}")
        return head

    def _line(self, name: str, share: float, style: str = "") -> Text:
        name = name if len(name) <= self.width else f"{name[: self.width - 3]}..."
        line = Text.assemble((f"{name:<{self.width}}", style), (f"{write.percent(share):>6} ", "cyan"))
        line.append(write.bar(share, self.ascii), "blue")
        return line

    def _stage(self, part: Part) -> Text:
        return self._line(part.name, part.share, "bold")

    def _regions(self, tree: Tree, part: Part) -> None:
        for region in part.regions:
            if len(part.regions) > 1 and not region.kind and region.share == 0 and len(region.nodes) <= 2:
                continue  # a lone view or size between blocks says nothing
            tree.add(self._line(region.title, region.share, "" if region.kind else "dim"))

    def _exit(self, tree: Tree, part: Part) -> None:
        assert part.exit is not None
        e = self.fast.exits[part.exit]
        if e.is_open:
            program = self.fast.program
            classes = program.prediction_leaf.shape[-1]
            state = Text(f"open, exits at {write.condition(e.criterion, e.threshold, classes)}", "green")
        else:
            state = Text("closed: neither head nor decision runs", "yellow")
        if not e.trained:
            state.append(f"; {NOT_TRAINED}", "yellow")
        line = Text.assemble((e.name, "bold magenta"), f" after {e.cut}: ", state)
        branch = tree.add(line)
        head = f"head {e.head_kind} on {e.node}, {write.percent(e.head_cost)} of the model's cost"
        branch.add(Text(f"{head}, temperature {e.temperature:.3g}"))
        if e.is_open:
            branch.add(Text(f"a row that exits here costs {write.percent(self.costs[part.exit])}"))
        for v in part.live:
            branch.add(Text.assemble(("survives ", "dim"), write.live(v)))

    def _decisions(self, tree: Tree) -> None:
        for section in self.sections:
            branch = tree.add(Text.assemble((f"{section.kind}s ", "dim"), f"{len(section.entries)}; {section.about}"))
            for entry in section.entries:
                line = Text.assemble((entry.name, "bold magenta"), f" {entry.place}".rstrip(), ": ")
                line.append(entry.state, "yellow" if entry.fixed else "green")
                if not entry.trained:
                    line.append(f"; {NOT_TRAINED}", "yellow")
                line.append(f", {entry.more}" if entry.more else "")
                below = branch.add(line)
                for step in entry.steps:
                    below.add(Text(step))

    def _executor(self, tree: Tree) -> None:
        fast = self.fast
        line = Text.assemble(("executor ", "dim"), (fast.executor, "bold"), f", backend {fast.backend}")
        line.append(f": {fast.executor_reason}")
        branch = tree.add(line)
        for note in fast.notes:
            branch.add(Text(note, "dim"))
        promise = said(fast)
        if promise is not None:
            tree.add(Text.assemble(("guarantee ", "dim"), promise))

    def _refusals(self, tree: Tree, refusals: Sequence[Refusal]) -> None:
        if not refusals:
            return
        branch = tree.add(Text.assemble(("refused ", "dim"), f"{len(refusals)} place{'' if len(refusals) == 1 else 's'}"))
        for (rule, reason), nodes in grouped(refusals):
            names = ", ".join(nodes[:3]) + (f" and {len(nodes) - 3} more" if len(nodes) > 3 else "")
            branch.add(Text.assemble((names, "yellow"), f" by {rule}: {reason}"))

    def _passes(self, tree: Tree) -> None:
        history = self.fast.history
        total = sum(s.seconds for s in history)
        branch = tree.add(Text.assemble(("passes ", "dim"), f"{len(history)} in {write.seconds(total)}"))
        for s in history:
            line = Text(f"{s.name:<13}{write.seconds(s.seconds):>9}  {s.nodes_before:>5} to {s.nodes_after} nodes")
            if s.summary:
                line.append(f"  {s.summary}", "dim")
            branch.add(line)


def grouped(refusals: Sequence[Refusal]) -> list[tuple[tuple[str, str], list[str]]]:
    """Refused nodes by rule and reason, the most frequent reasons first where there are many."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for r in refusals:
        found[r.rule, r.reason].append(r.node)
    every = list(found.items())
    if len(every) <= MOST_REFUSALS:
        return every
    kept = sorted(every, key=lambda item: -len(item[1]))[: MOST_REFUSALS - 1]
    rest = [n for item in every if item not in kept for n in item[1]]
    return [*kept, (("several rules", "see format=table or json for each reason"), rest)]

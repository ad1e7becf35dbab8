"""How a call of the user's model maps to the flat tensors of a graph, and the graph's flat outputs back to its type.

A captured graph takes tensors in one order and gives tensors in one order. The signature keeps the rest: argument
names, values that were burned in (`use_cache=False`), the containers around the tensors, the batch axis of each.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from eecompile.constants import from_json, same, spelling, to_json
from eecompile.containers import dump_spec, load_spec
from eecompile.errors import ArtifactError, CaptureError, near
from eecompile.guards import Guard, Number, load_guard, load_number

POSITIONAL_ONLY = int(inspect.Parameter.POSITIONAL_ONLY)
POSITIONAL = int(inspect.Parameter.POSITIONAL_OR_KEYWORD)
VAR_POSITIONAL = int(inspect.Parameter.VAR_POSITIONAL)
VAR_KEYWORD = int(inspect.Parameter.VAR_KEYWORD)
LABELS = "a loader's `labels` go to fit, calibrate and evaluate, not to the call"


@dataclass(frozen=True)
class Leaf:
    """One tensor of the inputs or outputs.

    Attributes:
        path: As a user would write it, for example `input_ids` or `images[0]`.
        shape: Sizes; a string is the name of a dynamic one.
        batch_axis: Axis that counts samples, None for a tensor without one.
    """

    path: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    batch_axis: int | None

    def describe(self) -> str:
        return f"{self.path}: {str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Parameter:
    """One argument of the model's `forward`.

    Attributes:
        kind: As `inspect` gives it.
        default: Its default as `constants.spelling` has it; None where it has none, or one that has no spelling.
    """

    name: str
    kind: int
    default: str | None = None


def path_of(keys: Sequence[Any]) -> str:
    """`('images', 0)` as `images[0]`; a dict key or field as `.name`."""
    text = ""
    for key in keys:
        part = getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".") or "output"


def parameters_of(forward: Callable[..., Any]) -> tuple[Parameter, ...]:
    found = inspect.signature(forward).parameters.values()
    none = inspect.Parameter.empty
    return tuple(Parameter(p.name, int(p.kind), None if p.default is none else spelling(p.default)) for p in found)


class Convention:
    """How the user's model is called: as in the example.

    Attributes:
        parameters: Arguments of its `forward`.
        constants: Per leaf of its arguments: None for a tensor, else a one-element tuple with the value of the example.
        in_spec: Containers around these leaves, by argument.
        positional: How many arguments the example gave by position; the others are given by name.
    """

    parameters: tuple[Parameter, ...]
    constants: tuple[tuple[Any] | None, ...]
    in_spec: Any
    positional: int

    def arguments(self, flat: Sequence[torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of a call with these tensors."""
        it = iter(flat)
        leaves = [next(it) if c is None else c[0] for c in self.constants]
        named = pytree.tree_unflatten(leaves, self.in_spec)
        first = [p.name for p in self.parameters if p.kind in (POSITIONAL_ONLY, POSITIONAL)][: self.positional]
        args = [named.pop(name, None) for name in first]
        rest = next((p.name for p in self.parameters if p.kind == VAR_POSITIONAL), None)
        return [*args, *named.pop(rest, ())], named


def arguments_by_name(parameters: Sequence[Parameter], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as `{name: value}`, without those whose None is their default anyway. `*args` are a list under their name.

    Those that `forward` names are sorted; others stay in their order, which its code can see.

    Raises:
        CaptureError: Too many positional arguments, an unknown or a doubled name.
    """
    named: dict[str, Any] = {}
    positional = [p for p in parameters if p.kind in (POSITIONAL_ONLY, POSITIONAL)]
    rest = next((p for p in parameters if p.kind == VAR_POSITIONAL), None)
    open_names = any(p.kind == VAR_KEYWORD for p in parameters)
    for p, value in zip(positional, args, strict=False):
        named[p.name] = value
    if len(args) > len(positional):
        if rest is None:
            raise CaptureError(
                "too many positional arguments for the model",
                got=len(args),
                wanted=f"at most {len(positional)}: {', '.join(p.name for p in positional)}",
            )
        named[rest.name] = list(args[len(positional) :])
    known = {p.name for p in parameters}
    for name, value in kwargs.items():
        if name in named:
            raise CaptureError("an argument is given twice", where=name)
        if name not in known and not open_names:
            raise CaptureError(
                "the model has no such argument",
                got=name,
                wanted=near(name, known),
                hint=LABELS if name == "labels" else None,
            )
        named[name] = value
    optional = {p.name for p in parameters if p.default == spelling(None)}
    order = [*sorted(named.keys() & known), *(k for k in named if k not in known)]
    return {k: named[k] for k in order if named[k] is not None or k not in optional}


def in_order(value: Any, like: Any) -> Any:
    """An argument with its mappings, however deep, of the class and in the order of keys of the example's."""
    if type(like) in (dict, OrderedDict, defaultdict) and isinstance(value, Mapping) and value.keys() == like.keys():
        ordered = copy.copy(like)
        ordered.update((k, in_order(value[k], like[k])) for k in like)
        return ordered
    if type(value) is type(like) and type(like) in (list, tuple) and len(value) == len(like):
        return type(like)(in_order(v, w) for v, w in zip(value, like, strict=True))
    return value


def same_order(given: Any, like: Any) -> bool:
    """Whether the keys that two nested arguments have in common come in the same order."""
    if isinstance(given, Mapping) and isinstance(like, Mapping):
        common = [k for k in given if k in like]
        return common == [k for k in like if k in given] and all(same_order(given[k], like[k]) for k in common)
    if isinstance(given, list | tuple) and isinstance(like, list | tuple):
        return all(map(same_order, given, like))
    return True


def check_same(name: str, given: Any, wanted: Any) -> None:
    """Refuses an argument that is no tensor and not the value that was captured."""
    if not same(given, wanted):
        raise CaptureError(
            "an argument differs from the value that was captured",
            where=name,
            got=repr(given),
            wanted=repr(wanted),
            hint="compile again with this value in example_kwargs",
        )


def _described(value: Any) -> str:
    """Type and shape of a tensor; another value as it is written, where it is short."""
    if isinstance(value, torch.Tensor):
        return f"{type(value).__name__}{list(value.shape)}"
    text = spelling(value)
    return type(value).__name__ if text is None or len(text) > 60 else text


class OtherDtypes(CaptureError):
    """A call whose inputs have other dtypes than captured; `flat` is what was given, in the graph's order."""

    flat: list[torch.Tensor]


@dataclass(frozen=True)
class Signature(Convention):
    """The calling convention of a captured model.

    Attributes:
        inputs: The tensors, in the order of the graph's inputs.
        outputs: The tensors, in the order of the graph's outputs.
        out_spec: Containers around the outputs.
        out_constants: As `constants`, for the outputs; a `Number` where it is computed from sizes of the inputs.
        dynamic: Name and range of every dynamic size, the batch included.
        guards: Further conditions on these sizes, under which the graph is the model.
        fixed: Lengths that the model keeps to: input, axis, and the line that does, where it is known.
        ordered: Whether the model's code sees in which order keys come, so that they must come as in the example.
    """

    parameters: tuple[Parameter, ...]
    inputs: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]
    in_spec: Any
    out_spec: Any
    constants: tuple[tuple[Any] | None, ...]
    out_constants: tuple[tuple[Any] | None, ...]
    dynamic: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    guards: tuple[Guard, ...] = ()
    fixed: tuple[tuple[str, int, str], ...] = ()
    positional: int = 0
    training: bool = False
    ordered: bool = False

    def __post_init__(self) -> None:
        simple = (
            not self.ordered
            and all(c is None for c in self.constants)
            and all(re.fullmatch(r"\w+", i.path) for i in self.inputs)
        )
        names = tuple(i.path for i in self.inputs)
        order = [p.name for p in self.parameters][: len(names)]
        # For calls of only tensors in the model's own order, or all by name: no binding to do.
        object.__setattr__(self, "_positional", len(names) if simple and order == list(names) else -1)
        object.__setattr__(self, "_names", names if simple else None)
        object.__setattr__(self, "_seen", set())
        gives = any(c is not None and isinstance(c[0], Number) for c in self.out_constants)
        object.__setattr__(self, "_gives_sizes", gives)
        single = len(self.outputs) == 1 and isinstance(self.out_spec, pytree.TreeSpec) and self.out_spec.is_leaf()
        object.__setattr__(self, "_single", single)

    @property
    def batch_input(self) -> tuple[int, int]:
        """Index and axis of the first input that has a batch."""
        for i, leaf in enumerate(self.inputs):
            if leaf.batch_axis is not None:
                return i, leaf.batch_axis
        raise CaptureError("no input has a batch axis", hint="pass batch_axis= naming one")

    def batch_size(self, flat: Sequence[torch.Tensor]) -> int:
        i, axis = self.batch_input
        return flat[i].shape[axis]

    def lengths(self, flat: Sequence[torch.Tensor]) -> dict[str, int]:
        """Sizes of the dynamic axes in a call, by their names in the leaves' shapes."""
        leaves = zip(flat, self.inputs, strict=True)
        return {n: int(t.shape[i]) for t, leaf in leaves for i, n in enumerate(leaf.shape) if isinstance(n, str)}

    # ------------------------------------------------------------------ inputs

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call in the graph's order, checked against what was captured.

        Raises:
            CaptureError: Other arguments, shapes, dtypes or devices than captured.
        """
        flat: list[torch.Tensor]
        names = self._names  # type: ignore[attr-defined]
        if not kwargs and len(args) == self._positional:  # type: ignore[attr-defined]
            flat = list(args)
        elif not args and names is not None and len(kwargs) == len(names) and all(n in kwargs for n in names):
            flat = [kwargs[n] for n in names]
        else:
            flat = self._bind(args, kwargs)
        if not all(isinstance(t, torch.Tensor) for t in flat):
            flat = self._bind(args, kwargs)
        self.check(flat)
        return flat

    def check(self, flat: Sequence[torch.Tensor]) -> None:
        """Checks sizes and dtypes, once for each combination of them.

        Raises:
            CaptureError: They are not what was captured.
        """
        if any(t.is_nested for t in flat):  # which may have no shape
            self._check_dense(flat)
        key = tuple((t.shape, t.dtype, t.layout) for t in flat)
        if key not in self._seen:  # type: ignore[attr-defined]
            self._check(flat)
            if len(self._seen) < 4096:  # type: ignore[attr-defined]
                self._seen.add(key)  # type: ignore[attr-defined]

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        named = arguments_by_name(self.parameters, args, kwargs)
        dummy = [object() if c is None else c[0] for c in self.constants]
        wanted = pytree.tree_unflatten(dummy, self.in_spec)
        if self.ordered and not same_order(named, wanted):
            raise CaptureError(
                "keys come in another order than in the example, and the model's answer depends on it",
                got=", ".join(named),
                wanted=", ".join(wanted),
                hint="give named arguments, and the entries of mappings, in the example's order, or compile again",
            )
        constant_names = {k for k, v in wanted.items() if all(type(x) is not object for x in pytree.tree_leaves(v))}
        rest = {p.name for p in self.parameters if p.kind == VAR_POSITIONAL}
        for name in constant_names - named.keys() - rest:  # burned in once, need not be said again
            named[name] = wanted[name]
        for p in self.parameters:  # a default that the example left out, said after all
            if p.default is not None and p.name in named and p.name not in wanted and spelling(named[p.name]) == p.default:
                del named[p.name]
        if named.keys() != wanted.keys():
            self._other_call(named)
        given = {k: in_order(named[k], v) for k, v in wanted.items()}
        for name in constant_names:
            if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(given[name])):
                check_same(name, given[name], wanted[name])
                given[name] = wanted[name]
        leaves, spec = pytree.tree_flatten(given)
        if spec != self.in_spec:
            self._other_call(named)
        flat = []
        for i, (leaf, constant) in enumerate(zip(leaves, self.constants, strict=True)):
            if (constant is None) != isinstance(leaf, torch.Tensor):
                self._other_call(named)
            if constant is None:
                flat.append(leaf)
            elif not same(leaf, constant[0]):
                check_same(path_of(pytree.tree_flatten_with_path(given)[0][i][0]), leaf, constant[0])
        return flat

    def _other_call(self, named: Mapping[str, Any]) -> None:
        defaults = {p.name: p.default for p in self.parameters if p.default is not None}
        extra = sorted(k for k in named if not any(re.match(rf"{re.escape(k)}\b", i.path) for i in self.inputs))
        tip = f"{LABELS}; " if "labels" in extra else ""
        raise CaptureError(
            "called with other arguments than the model was captured with",
            got=", ".join(f"{k}: {_described(v)}" for k, v in named.items()) or "no arguments",
            wanted=", ".join(
                [*(i.describe() for i in self.inputs), *(f"{k}: {defaults[k]}" for k in extra if k in defaults)]
            ),
            hint=tip + "compile again with these arguments in example_inputs or example_kwargs",
        )

    def _check_dense(self, flat: Sequence[torch.Tensor]) -> None:
        for t, leaf in zip(flat, self.inputs, strict=True):
            if t.is_nested or t.is_quantized or t.layout is not torch.strided:
                kind = "nested" if t.is_nested else "quantized" if t.is_quantized else str(t.layout).removeprefix("torch.")
                raise CaptureError(
                    "an input is no dense tensor",
                    where=leaf.path,
                    got=kind.removeprefix("_"),
                    wanted=leaf.describe(),
                    hint="convert it: to_padded_tensor, dequantize or to_dense",
                )

    def _check(self, flat: Sequence[torch.Tensor]) -> None:
        self._check_dense(flat)
        sizes: dict[str, int] = {}
        for t, leaf in zip(flat, self.inputs, strict=True):
            ok = t.dim() == len(leaf.shape) and t.dtype == leaf.dtype
            before = dict(sizes)
            for size, want in zip(t.shape, leaf.shape, strict=False) if ok else ():
                if isinstance(want, int):
                    ok = ok and size == want
                else:
                    low, high = self.dynamic.get(want, (0, None))
                    same = sizes.setdefault(want, size) == size
                    ok = ok and same and size >= low and (high is None or size <= high)
            if not ok:
                self._fixed_length(t, leaf)
                ranges = ", ".join(
                    f"{n} {before[n]}, as in the inputs before it"
                    if n in before
                    else f"{n} {lo} to {'any' if hi is None else hi}"
                    for n, (lo, hi) in self.dynamic.items()
                )
                kind = CaptureError if t.dtype == leaf.dtype else OtherDtypes
                error = kind(
                    "an input does not fit the captured graph",
                    where=leaf.path,
                    got=f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}",
                    wanted=f"{leaf.describe()}" + (f" ({ranges})" if ranges else ""),
                    hint="convert the input, or compile again with an example of this shape and dtype",
                )
                if isinstance(error, OtherDtypes):
                    error.flat = list(flat)
                raise error
        for guard in self.guards:
            if not guard.holds(sizes):
                raise CaptureError(
                    "for these sizes the model takes another branch than the one that was captured",
                    where=guard.where or None,
                    got=", ".join(f"{n} {sizes[n]}" for n in sorted(guard.names)) + f" ({self._given(flat)})",
                    wanted=f"{guard}, where {', '.join(f'{n} is {self._source(n)}' for n in sorted(guard.names))}",
                    hint="call with such sizes, or compile again with an example of these",
                )

    def _fixed_length(self, t: torch.Tensor, leaf: Leaf) -> None:
        for path, axis, line in self.fixed:
            if path == leaf.path and t.dim() == len(leaf.shape) and t.shape[axis] != leaf.shape[axis]:
                raise CaptureError(
                    "the model's own code keeps to the length of the example: it loops over it, or cuts it into chunks",
                    where=line or path,
                    got=f"{path}: {list(t.shape)}",
                    wanted=f"{leaf.describe()}",
                    hint="pad to that length, compile again with an example of this one, or compile with "
                    'capture="blocks", which runs the Python code of the model at any length',
                )

    def admits(self, flat: Sequence[torch.Tensor]) -> bool:
        """Whether tensors in the graph's order have sizes and dtypes that were captured."""
        try:
            self._check(flat)
        except CaptureError:
            return False
        return True

    def _given(self, flat: Sequence[torch.Tensor]) -> str:
        return ", ".join(f"{leaf.path}: {list(t.shape)}" for leaf, t in zip(self.inputs, flat, strict=True))

    def _source(self, name: str) -> str:
        """`ids.shape[1]` for a dynamic size."""
        return next((f"{leaf.path}.shape[{leaf.shape.index(name)}]" for leaf in self.inputs if name in leaf.shape), name)

    # ------------------------------------------------------------------ outputs

    def restore(self, flat: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Any:
        """The model's own output type around the graph's flat outputs for these flat inputs."""
        if self._single:  # type: ignore[attr-defined]
            return flat[0]
        it = iter(flat)
        leaves = [next(it) if c is None else c[0] for c in self.out_constants]
        if self.gives_sizes:
            sizes = self.sizes(inputs)
            leaves = [leaf.value(sizes) if isinstance(leaf, Number) else leaf for leaf in leaves]
        return pytree.tree_unflatten(leaves, self.out_spec)

    @property
    def gives_sizes(self) -> bool:
        """Whether an output is a number that is computed from sizes of the inputs."""
        found: bool = self._gives_sizes  # type: ignore[attr-defined]
        return found

    def sizes(self, flat: Sequence[torch.Tensor]) -> dict[str, int]:
        """The dynamic sizes of a call by their names."""
        pairs = ((n, s) for t, leaf in zip(flat, self.inputs, strict=True) for n, s in zip(leaf.shape, t.shape, strict=True))
        return {name: size for name, size in pairs if isinstance(name, str)}

    def flatten_output(self, output: Any) -> list[torch.Tensor]:
        """The tensors of an output of the model, in the graph's order."""
        return [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]

    # ------------------------------------------------------------------ saving

    def to_dict(self) -> dict[str, Any]:
        """As JSON data.

        Raises:
            ArtifactError: A burned-in argument has no JSON form.
        """
        if any(c is not None and isinstance(c[0], str) for c in self.out_constants):
            raise ArtifactError(
                "the model returns a text, which torch.export cannot read back",
                got=[c[0] for c in self.out_constants if c is not None and isinstance(c[0], str)],
                wanted="tensors, numbers, booleans or None",
                hint="leave the text out of what the model returns",
            )
        if any(c is not None and isinstance(c[0], Number) and c[0].is_condition for c in self.out_constants):
            raise ArtifactError(
                "the model returns whether its sizes meet a condition, which torch.export cannot save",
                got=[c[0].expression for c in self.out_constants if c is not None and isinstance(c[0], Number)],
                wanted="tensors, and whole or floating numbers",
                hint="leave it out of what the model returns",
            )

        def saved(constant: tuple[Any] | None) -> list[Any] | None:
            if constant is None:
                return None
            try:
                return [constant[0].to_json() if isinstance(constant[0], Number) else to_json(constant[0])]
            except TypeError as error:
                raise ArtifactError(
                    "an argument that was burned in cannot be saved",
                    got=str(error),
                    wanted="tensors, numbers, strings, booleans or None",
                ) from error

        def leaf(x: Leaf) -> dict[str, Any]:
            return {
                "path": x.path,
                "shape": list(x.shape),
                "dtype": str(x.dtype).removeprefix("torch."),
                "batch_axis": x.batch_axis,
            }

        return {
            "parameters": [[p.name, p.kind, p.default] for p in self.parameters],
            "inputs": [leaf(x) for x in self.inputs],
            "outputs": [leaf(x) for x in self.outputs],
            "in_spec": dump_spec(self.in_spec),
            "out_spec": dump_spec(self.out_spec),
            "constants": [saved(c) for c in self.constants],
            "out_constants": [saved(c) for c in self.out_constants],
            "dynamic": {k: list(v) for k, v in self.dynamic.items()},
            "guards": [g.to_json() for g in self.guards],
            "fixed": [list(f) for f in self.fixed],
            "positional": self.positional,
            "training": self.training,
            "ordered": self.ordered,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Signature:
        def leaf(d: Mapping[str, Any]) -> Leaf:
            dtype = getattr(torch, d["dtype"])
            return Leaf(d["path"], tuple(d["shape"]), dtype, d["batch_axis"])

        def out(value: Any) -> Any:
            return load_number(value) if isinstance(value, dict) and "of_sizes" in value else from_json(value)

        return Signature(
            parameters=tuple(Parameter(*parameter) for parameter in data["parameters"]),
            inputs=tuple(leaf(x) for x in data["inputs"]),
            outputs=tuple(leaf(x) for x in data["outputs"]),
            in_spec=load_spec(data["in_spec"]),
            out_spec=load_spec(data["out_spec"]),
            constants=tuple(None if c is None else (from_json(c[0]),) for c in data["constants"]),
            out_constants=tuple(None if c is None else (out(c[0]),) for c in data["out_constants"]),
            dynamic={k: (v[0], v[1]) for k, v in data["dynamic"].items()},
            guards=tuple(load_guard(g) for g in data["guards"]),
            fixed=tuple((path, axis, line) for path, axis, line in data.get("fixed", ())),
            positional=data.get("positional", 0),
            training=data["training"],
            ordered=data.get("ordered", False),
        )

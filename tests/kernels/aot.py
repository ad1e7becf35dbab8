"""Compiles every kernel ahead of time, without a GPU: registers of a thread, shared memory of a block in bytes, and spilled
bytes of a thread (its stack, which holds nothing else).

For sm_80, sm_90, sm_100 (NVIDIA) and gfx942 (AMD). That a kernel compiles says nothing about its speed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eecompile.kernels import choose, clock, condition, confidence, decide, gather, halt, head_confidence, open_rows
from eecompile.kernels._triton import extern_libs, triton

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

Types = dict[str, Any]
"""Triton types of a kernel's arguments: "*bf16", "i32", "i32:16" for a multiple of 16, or a tuple of them."""


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched somewhere: the types of its arguments and its constants."""

    kernel: str
    label: str
    function: Any
    types: Types
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 4
    conditional: bool = False


@dataclass(frozen=True)
class Figures:
    """What a case costs on a target. `registers` are those of a thread, `shared` bytes of a block."""

    kernel: str
    label: str
    target: str
    registers: int
    shared: int
    spilled: int


def _pointers(dtype: str, names: str) -> Types:
    return dict.fromkeys(names.split(), dtype)


def _decide(
    dtype: str,
    criterion: str,
    tile: tuple[int, int],
    conditional: bool = False,
    final: bool = False,
    source: str = clock.NONE,
) -> Case:
    types = {
        **_pointers(f"*{dtype}", "logits result output"),
        **_pointers("*i64", "rows state exit_index survivors positions clock predicted"),
        **_pointers("*i32", "count buckets control"),
        **_pointers("*fp32", "thresholds temperatures confidence"),
        **_pointers("i32", "stride_row result_row C W capacity K exit patience"),
        **_pointers("u64", "alive_handle bucket_handle"),
    }
    constants = {
        "stride_column": 1,
        "result_column": 1,
        "CRITERION": criterion,
        "FINAL": final,
        "IDENTITY": False,
        "CONDITION": conditional,
        "CLOCK": source,
        "R": tile[0],
        "BLOCK_C": tile[1],
        "BLOCK_W": tile[1],
        "BLOCK_N": 1024,
        "MAX_K": 16,
    }
    label = f"{criterion} {dtype} {tile[0]}x{tile[1]}" + (" final" if final else " graph" if conditional else "")
    label += "" if source == clock.NONE else " deadline"
    return Case("decide", label, decide.decide_kernel, types, constants, 8 if tile[1] > 1024 else 4, 3, conditional)


def _confidence(dtype: str, criterion: str, tile: tuple[int, int]) -> Case:
    types = {
        "logits": f"*{dtype}",
        **_pointers("*i64", "state new_state"),
        **_pointers("*fp32", "temperature threshold value"),
        **_pointers("i32", "stride_row n C patience"),
    }
    constants = {
        "stride_column": 1,
        "CRITERION": criterion,
        "FIRST": False,
        "OPEN": False,
        "R": tile[0],
        "BLOCK_C": tile[1],
    }
    label = f"{criterion} {dtype} {tile[0]}x{tile[1]}"
    return Case("confidence", label, confidence.confidence_kernel, types, constants)


def _move(kernel: str, words: tuple[str, ...]) -> Case:
    types = {
        "sources": tuple(f"*{w}" for w in words),
        "destinations": tuple(f"*{w}" for w in words),
        "shapes": tuple(("i32",) * 7 for _ in words),
        "index": "*i64",
        "live": "*i32",
    }
    constants = {"SCATTER": kernel == "scatter", "BLOCK": 1024}
    return Case(kernel, ", ".join(words), gather.move_kernel, types, constants)


def _choose(word: str, index: str, values: int) -> Case:
    types = {
        "index": f"*{index}",
        "values": (f"*{word}",) * values,
        "strides": (("i32", "i32"),) * values,
        "result": f"*{word}",
        **_pointers("i32", "rows inner"),
    }
    constants = {"SCORE": index == "fp32", "BLOCK": 1024}
    return Case("choose", f"{values} {word} by {index}", choose.choose_kernel, types, constants)


def _open_rows(dtype: str) -> Case:
    types = {
        "decision": f"*{dtype}",
        **_pointers("*i32", "count buckets control"),
        "positions": "*i64",
        **_pointers("i32", "capacity K"),
    }
    constants = {"stride": 1, "N": 1024, "MAX_K": 16}
    return Case("open_rows", dtype, open_rows.open_rows_kernel, types, constants)


def _clock() -> Case:
    types = {"clock": "*i64", "element": "i32"}
    return Case("clock", "tick", clock.clock_kernel, types, {"CLOCK": clock.DEVICE}, 1)


def _condition(compare: bool) -> Case:
    types = {"numbers": "*i32", **_pointers("i32", "element below"), "handle": "u64"}
    label = "below" if compare else "number"
    return Case("condition", label, condition.condition_kernel, types, {"COMPARE": compare}, 1, conditional=True)


def _halt(dtype: str, first: bool, last: bool) -> Case:
    types = {
        **_pointers(f"*{dtype}", "score state"),
        **_pointers("*fp32", "weighted ledger new_weighted new_ledger"),
        "running": "*i1",
        "limit": "fp32",
        "D": "i32",
    }
    constants = {"FIRST": first, "LAST": last, "BLOCK": 1024}
    label = dtype + (" first" if first else "") + (" last" if last else "")
    return Case("halt", label, halt.halt_kernel, types, constants)


def _head(dtype: str, criterion: str, aligned: bool = True) -> Case:
    multiple = "i32:16" if aligned else "i32"
    types = {
        **_pointers(f"*{dtype}", "hidden weight bias"),
        **_pointers("*fp32", "temperature partial value margin"),
        **_pointers("*i32", "partial_index counters"),
        "top1": "*i64",
        **_pointers(multiple, "hidden_row weight_row D"),
        "padded": "i32:16",
        **_pointers("i32", "n V splits tiles"),
    }
    block_v, block_d, warps = head_confidence.blocks(dtype == "fp32", aligned)
    constants = {
        "CRITERION": criterion,
        "BIAS": True,
        "WIDEN": False,
        "N": head_confidence.ROWS,
        "BLOCK_V": block_v,
        "BLOCK_D": block_d,
        "SPLITS": 1024 // head_confidence.ROWS,
    }
    label = f"{criterion} {dtype}" + ("" if aligned else " unaligned")
    return Case("head_confidence", label, head_confidence.head_kernel, types, constants, warps)


def cases() -> list[Case]:
    """Every kernel in the shapes that matter: few and many classes, a vocabulary, the three dtypes."""
    return [
        _decide("fp32", "max_probability", (16, 16), conditional=True),
        _decide("bf16", "entropy", (1, 1024), conditional=True),
        _decide("fp16", "patience", (1, 1024), conditional=True),
        _decide("bf16", "margin", (1, 4096)),
        _decide("fp32", "energy", (1, 1024), final=True),
        _decide("bf16", "max_probability", (1, 1024), conditional=True, source=clock.DEVICE),
        _decide("fp32", "patience", (16, 16), source=clock.DEVICE),
        _confidence("fp32", "entropy", (1, 1024)),
        _confidence("bf16", "patience", (16, 64)),
        _move("gather", ("i64", "i64", "i32", "i16")),
        _move("scatter", ("i64",)),
        _choose("i64", "fp32", 2),
        _choose("i16", "i1", 2),
        _choose("i32", "i64", 5),
        _open_rows("fp32"),
        _open_rows("i1"),
        _clock(),
        _condition(compare=False),
        _condition(compare=True),
        _halt("bf16", first=False, last=False),
        _halt("fp32", first=True, last=False),
        _head("bf16", "max_probability"),
        _head("fp16", "entropy", aligned=False),
        _head("fp32", "margin"),
        _head("fp32", "energy", aligned=False),
    ]


def _divisible(function: Any, types: Types) -> dict[tuple[int, ...], list[list[Any]]]:
    """What is a multiple of 16: pointers, as torch's allocators give them out, and "i32:16"."""
    found: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(function.arg_names):
        given = types.get(name, "constexpr")
        if isinstance(given, tuple):
            found.update({(i, j): [["tt.divisibility", 16]] for j, t in enumerate(given) if str(t).startswith("*")})
        elif given.startswith("*") or given.endswith(":16"):
            found[(i,)] = [["tt.divisibility", 16]]
    return found


def compile_case(case: Case, target: str) -> Figures:
    """Compiles one case for one of `TARGETS`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = target.startswith("sm_")
    constants = dict(case.constants)
    options: dict[str, Any] = {"num_warps": case.num_warps, "enable_fp_fusion": True}
    options["num_stages"] = case.num_stages if nvidia else 2
    if case.conditional and nvidia:
        options["extern_libs"] = extern_libs()
    elif "CONDITION" in constants:
        constants["CONDITION"] = False  # ROCm has no conditional nodes
    if not nvidia and constants.get("CLOCK") == clock.DEVICE:
        constants["CLOCK"] = clock.HOST  # for the same reason the host sets the time there
    signature = {name: case.types.get(name, "constexpr") for name in case.function.arg_names}
    signature = {k: v.removesuffix(":16") if isinstance(v, str) else v for k, v in signature.items()}
    source = ASTSource(case.function, signature, constexprs=constants, attrs=_divisible(case.function, case.types))
    built = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    read = _read_nvidia if nvidia else _read_amd
    registers, spilled = read(built)
    return Figures(case.kernel, case.label, target, registers, int(built.metadata.shared), spilled)


def _read_nvidia(built: Any) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(built.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        shown = subprocess.run([tool, "-res-usage", str(path)], check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown)
    if usage is None:
        raise RuntimeError(f"cuobjdump said something unexpected:\n{shown}")
    return int(usage[1]), int(usage[2]) + int(usage[3])


def _read_amd(built: Any) -> tuple[int, int]:
    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", built.asm["amdgcn"])
        if found is None:
            raise RuntimeError(f"the assembly does not say {name}")
        return int(found[1])

    return figure("vgpr_count"), max(figure("private_segment_fixed_size"), 4 * figure("vgpr_spill_count"))


def compile_all(kernel: str) -> Iterator[Figures]:
    """The figures of every case of a kernel on every target."""
    for case in (c for c in cases() if c.kernel == kernel):
        for target in TARGETS:
            if kernel != "condition" or target.startswith("sm_"):  # ROCm has no conditional nodes
                yield compile_case(case, target)

"""Every kernel compiles for four targets without a GPU, nothing spills, and every launch binds its arguments."""

from __future__ import annotations

import subprocess
import sys

import pytest

from eecompile.kernels._triton import HAVE_TRITON, INTERPRETED
from tests.kernels import aot

compiles = pytest.mark.skipif(not HAVE_TRITON or INTERPRETED, reason="needs Triton's compiler")
KERNELS = [
    "decide",
    "clock",
    "confidence",
    "gather",
    "scatter",
    "choose",
    "open_rows",
    "condition",
    "halt",
    "head_confidence",
]


@compiles
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_spilling(kernel: str, capsys: pytest.CaptureFixture[str]) -> None:
    figures = list(aot.compile_all(kernel))
    nvidia_only = kernel == "condition"  # ROCm has no conditional nodes
    assert {f.target for f in figures} == {t for t in aot.TARGETS if t.startswith("sm_") or not nvidia_only}
    with capsys.disabled():
        for f in figures:
            print(f"\n{f.kernel} {f.label} {f.target}: {f.registers} registers, {f.shared} B shared", end="")
    assert [f for f in figures if f.spilled] == []
    assert all(0 < f.registers <= 512 for f in figures)


@compiles
def test_every_kernel_is_compiled() -> None:
    assert {c.kernel for c in aot.cases()} == set(KERNELS)


@compiles
def test_only_the_condition_calls_the_driver() -> None:
    """One call site per handle, in a branch of its own; without a graph the symbol is not there at all."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from eecompile.kernels._triton import extern_libs

    case = next(c for c in aot.cases() if c.conditional)
    signature = {n: case.types.get(n, "constexpr") for n in case.function.arg_names}
    for condition, calls in ((True, 2), (False, 0)):
        source = ASTSource(case.function, signature, constexprs={**case.constants, "CONDITION": condition})
        options = {"enable_fp_fusion": True, **({"extern_libs": extern_libs()} if condition else {})}
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        assert ptx.count("cudaGraphSetConditional,") == calls


BINDING = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Named:  # a driver that can only say what it would compile for
    def get_current_device(self): return 0
    def get_current_stream(self, device=0): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self): return None
    def is_active(self): return True
    class utils: pass

driver.set_active(Named())
from eecompile.kernels import choose, clock, condition, confidence, decide, gather, halt, head_confidence, open_rows
compiled = []
plain = JITFunction.run
def warm(self, *args, grid, warmup, **options):
    compiled.append((self.fn.__name__, plain(self, *args, grid=grid, warmup=True, **options).hash))
JITFunction.run = warm
i32 = lambda n, x=0: torch.full((n,), x, dtype=torch.int32)
i64 = lambda n: torch.zeros(n, dtype=torch.int64)
one = torch.ones(())

for handle in (None, 0, 1, 2**63 + 5):
    x = torch.zeros(3, 10)
    decide.launch_decide(x, x, None, i32(1), torch.zeros(1), torch.ones(2), 0, "entropy", 1, None, i32(1, 1),
        torch.zeros(9, 10), i64(9), torch.zeros(9), i64(3), i64(3), i32(7), alive_handle=handle, bucket_handle=handle or 0)
times = i64(5)
decide.launch_decide(x, x, None, i32(1), torch.zeros(1), torch.ones(2), 0, "entropy", 1, None, i32(1, 1), torch.zeros(9, 10),
    i64(9), torch.zeros(9), i64(3), i64(3), i32(7), clock=times, predicted=i64(1), source=clock.DEVICE, alive_handle=1)
print("decide", len(set(compiled)))
clock.launch_tick(times, clock.START, clock.DEVICE)
clock.launch_tick(times, clock.END, clock.DEVICE)
before = len(set(compiled))
for handle in (1, 2**63 + 5):
    condition.launch_condition(i32(4), 1, handle)
    condition.launch_condition(i32(4), 0, handle, below=7)
print("condition", len(set(compiled)) - before)
for n in (1, 5):  # Triton makes constants of ones
    confidence.launch_confidence(torch.zeros(n, 2, 10), None, "patience", one, threshold=one)
    s = [torch.zeros(n), torch.zeros(2, n, 6).half(), torch.zeros(n, 1024)]
    gather.launch_gather(s, [x.clone() for x in s], i64(n), i32(1, 1), [0, 1, 0])
    gather.launch_scatter(s[:1], [s[0].clone()], i64(n), i32(1, 1), [0])
    choose.launch_choose(torch.zeros(n), [s[0], s[0]])
    choose.launch_choose(torch.zeros(n) > 0, [s[1]] * 2, 1)
    choose.launch_choose(i64(n), [s[1]] * 3, 1)
    open_rows.launch_open_rows(torch.ones(n), i32(1, n), i32(1, 1), i64(n), i32(n + 4))
    w, ledger, _ = halt.launch_halt(torch.zeros(n), torch.zeros(n), None, None)
    halt.launch_halt(torch.zeros(n), torch.zeros(n), w, ledger)
    head_confidence.launch_head_confidence(torch.zeros(n, 48), torch.zeros(n * 300 - 299, 48), None, one)
print(" ".join(sorted({name for name, _ in compiled})))
"""


@compiles
def test_launches_bind_and_compile_through_triton() -> None:
    """The arguments that launches really pass, sizes of 1 included; a new handle is not a new kernel."""
    done = subprocess.run([sys.executable, "-c", BINDING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    decide, condition, names = done.stdout.splitlines()
    assert decide == "decide 3"  # with a condition and without, and with a deadline
    assert condition == "condition 2"  # the number itself, or whether it is below another
    assert names == (
        "choose_kernel clock_kernel condition_kernel confidence_kernel decide_kernel halt_kernel head_kernel move_kernel "
        "open_rows_kernel"
    )

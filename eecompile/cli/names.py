"""Names for help and completion, written out so that a shell need not wait for torch. A test compares them."""

from __future__ import annotations

from collections.abc import Callable

STRATEGIES = tuple("act ann anytime branchy cascade depth_adaptive mebert self_adaptive self_speculative skipnet".split())
HEADS = ("attention", "auto", "conv", "first", "identity", "linear", "mlp", "pooler", "shared")
CRITERIA = ("max_probability", "entropy", "margin", "energy", "patience", "learned", "routed")
FORMATS = ("tree", "table", "code", "diff", "dot", "mermaid", "json")
EXECUTORS = ("auto", "reference", "compact", "simulate", "device")
BACKENDS = ("eager", "inductor", "onnxruntime")
CAPTURES = ("export", "blocks")
TARGETS = ("accuracy", "agreement")
ADVISED = ("branchy", "mebert", "anytime", "cascade", "torch.compile", "int8", "ONNX Runtime")
RUNTIMES = ("pt2", "onnx", "aoti", "openvino", "stages", "executorch")
LEVELS = (
    "source",
    "normalize",
    "unfold",
    "split_tail",
    "share",
    "annotate",
    "find_blocks",
    "find_cuts",
    "adopt_blocks",
    "find_regions",
    "place_gates",
    "insert_gates",
    "place_halting",
    "insert_halting",
    "find_token_parts",
    "place_routes",
    "insert_routes",
    "place_exits",
    "insert_exits",
    "equilibrium",
    "stage",
    "lower",
    "verify",
    "marked",
    "staged",
)
DATA = tuple(
    f"{name}{part}"
    for name in ("digits", "mnist", "fashion_mnist", "cifar10", "minilm_imdb")
    for part in ("", ":train", ":val", ":test")
)


def completing(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    """A completion over fixed names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete

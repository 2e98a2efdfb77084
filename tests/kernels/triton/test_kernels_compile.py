"""Compiles every kernel ahead of time for the GPUs that are meant, none of which need be here.

In a process of its own: the interpreter, which the other tests of these kernels switch on, compiles nothing.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

# kernel, dtype of logits or head, and the flags that are on
CASES = [
    ("gather_fwd_kernel", "bf16", ()),
    ("gather_fwd_kernel", "fp16", ("SOFTCAP", "STATS")),
    ("gather_fwd_kernel", "fp32", ("STATS",)),
    ("gather_bwd_kernel", "bf16", ("PLAIN",)),
    ("gather_bwd_kernel", "fp16", ("SOFTCAP", "PLAIN")),
    ("gather_bwd_kernel", "fp32", ("SOFTCAP",)),
    ("tile_stats_kernel", "bf16", ()),
    ("tile_stats_kernel", "bf16", ("KEEP", "SLOPED")),
    ("tile_stats_kernel", "fp16", ("SOFTCAP", "BIAS", "STATS", "KEEP")),
    ("tile_stats_kernel", "fp32", ("SOFTCAP", "BIAS", "KEEP", "SLOPED")),
    ("tile_finish_kernel", "bf16", ("STATS", "SCALE", "KEEP", "TARGET")),
    ("scale_rows_kernel", "bf16", ("TARGET",)),
    ("tile_grad_kernel", "bf16", ("PLAIN",)),
    ("tile_grad_kernel", "fp32", ("SOFTCAP", "BIAS")),
    ("tile_grad_kernel", "bf16", ("KEPT", "PLAIN")),
    ("tile_grad_kernel", "fp16", ("KEPT", "SOFTCAP")),
]
TARGETS = [("cuda", "80", 32), ("cuda", "90", 32), ("cuda", "100", 32), ("hip", "gfx942", 64)]
FLAGS = ("SOFTCAP", "STATS", "PLAIN", "BIAS", "KEEP", "SLOPED", "SCALE", "TARGET", "KEPT")
FLOATS = ("inner", "outer", "outer2", "slope", "headroom", "nats", "nats_low")
INTEGERS = ("T", "V", "v_start", "width", "spans")
# What a kernel does not read or write 16 bytes at a time, because it is a number or two of a row.
NOT_WIDE = {"gather_fwd_kernel": ("st",), "tile_finish_kernel": ("ld", "st")}


def cases_for(arch):
    """All of them for the GPU that kernels are tuned for, some of each kernel for the others."""
    return CASES if arch == "90" else CASES[1::3]


def compile_all(backend, arch, warp_size):
    """Compile the cases for one of the targets, and print a line of JSON for each."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from prefloss.kernels.triton import gather, kernels
    from prefloss.kernels.triton import launch as launches

    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    for case, dtype, flags in cases_for(arch):
        kernel = getattr(gather if case.startswith("gather") else kernels, case)
        names = kernel.arg_names
        launch = launches.BACKWARD if {"d_logits", "d_tile"} & {*names} else launches.FORWARD
        launch = launches.TILE if case == "tile_stats_kernel" else launch
        loaded = "fp32" if case.startswith("tile") and "KEPT" not in flags else dtype
        constants = {name: name in flags for name in FLAGS} | {"BLOCK": launch.block}
        constants |= {"LANE": {"fp32": 4}.get(loaded, 8), "ALIKE": True}
        if "BIAS" not in flags:
            constants["bias"] = None
        if "KEEP" not in flags:
            constants |= {"numerators": None, "before": None, "after": None}
        if case == "tile_grad_kernel" and "KEPT" not in flags:
            constants["scales"] = None
        constants = {name: value for name, value in constants.items() if name in names}
        pointers = {"logits": dtype, "d_logits": dtype, "bias": dtype, "d_tile": dtype, "targets": "i64"}
        # numerators that a pass reads again are float16, others have the dtype of the head
        pointers["numerators"] = dtype if "SLOPED" in flags or dtype == "fp32" else "fp16"
        pointers |= {"kept": dtype, "weight": dtype, "d_targets": "fp32"}
        pointers["tile"] = "fp32" if loaded == "fp32" else "fp16"
        signature = {}
        for name in names:
            scalar = "fp32" if name in FLOATS else "i32" if name in INTEGERS else None
            scalar = "i64" if name.startswith("stride") else scalar
            signature[name] = "constexpr" if name in constants else scalar or f"*{pointers.get(name, 'fp32')}"
        # as a launch specialises where the vocabulary is a multiple of 16
        aligned = {
            (position,): [["tt.divisibility", 16]]
            for position, name in enumerate(names)
            if signature[name] not in ("constexpr", "fp32") and name not in ("T", "v_start")
        }
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": launch.warps, "enable_fp_fusion": True}
        asm = compile(source, target=target, options=options).asm
        record = {"for": arch, "kernel": case, "size": len(asm.get("cubin") or asm.get("hsaco") or b"")}
        if "cubin" in asm:
            record["arch"] = re.search(r"\.target (\w+)", asm["ptx"]).group(1)
            wide = r"\.global\S*\.(v4\.[bf]32|v2\.[bf]64|v8\.[bf]32|v4\.[bf]64)"
            narrow = NOT_WIDE.get(case, ()) if "KEEP" in flags or case != "tile_stats_kernel" else ("st",)
            record["wide"] = all(
                re.search(rf"{what}{wide}", asm["ptx"]) for what in ("ld", "st") if what not in narrow
            )
            record["stack"] = stack_bytes(asm["cubin"])
        print(json.dumps(record), flush=True)


def stack_bytes(cubin):
    """Bytes of local memory a thread has, or None where Triton brings no tool that tells."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    return max(int(size) for size in re.findall(r"STACK:(\d+)", usage.stdout))


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_compiles(tmp_path, request):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # a cache of this run alone, or nothing would be compiled
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(request.config.rootpath)}
    # one process for all: loading torch and Triton takes as long as compiling for one of them
    run = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    backends, *lines = run.stdout.splitlines()
    targets = [target for target in TARGETS if target[0] in backends.split()]
    if not targets:
        pytest.skip(f"this Triton compiles for {backends} only")
    records = [json.loads(line) for line in lines]
    expected = [(arch, case) for _, arch, _ in targets for case, _, _ in cases_for(arch)]
    assert [(record["for"], record["kernel"]) for record in records] == expected
    for record in records:
        assert record["size"] > 0, record
        if "arch" in record:
            assert re.fullmatch(rf"sm_{record['for']}a?", record["arch"]), record
            # 16 bytes a time, or half of the bandwidth is lost
            assert record["wide"], record
            # registers that do not fit are spilled onto the stack; ptxas spills one or two to fit more programs
            assert (record["stack"] or 0) <= 16, record


if __name__ == "__main__":
    from triton.backends import backends

    names = [{"nvidia": "cuda", "amd": "hip"}.get(name, name) for name in backends]
    print(*names, flush=True)
    for target in TARGETS:
        if target[0] in names:
            compile_all(*target)

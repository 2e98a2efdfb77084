"""Compiles every kernel ahead of time for the GPUs that are meant, none of which need be here.

In a process of its own: the interpreter, which the other tests of these kernels switch on, compiles nothing.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

HALVES = {"SOFTCAP": False, "BIAS": False}
NO_STATS = {"ENTROPY": False, "SUM_SQ": False, "ARGMAX": False}
ALL_STATS = dict.fromkeys(NO_STATS, True)
NO_GRADS = {"D_LSE": False, "D_ENTROPY": False, "D_SUM_SQ": False}
ALL_GRADS = dict.fromkeys(NO_GRADS, True)

# kernel, dtype of the logits or of the head, constants; what they do not name is False
CASES = [
    ("gather_fwd_kernel", "bf16", {}),
    ("gather_fwd_kernel", "fp16", {"SOFTCAP": True}),
    ("gather_fwd_kernel", "fp32", ALL_STATS),
    ("gather_fwd_kernel", "bf16", {"SOFTCAP": True, **ALL_STATS}),
    ("gather_bwd_kernel", "bf16", {}),
    ("gather_bwd_kernel", "fp16", {"SOFTCAP": True, "D_LSE": True}),
    ("gather_bwd_kernel", "fp32", {"SOFTCAP": True, **ALL_GRADS}),
    ("tile_stats_kernel", "bf16", {}),
    ("tile_stats_kernel", "bf16", {"KEEP": True}),
    ("tile_stats_kernel", "fp16", {"SOFTCAP": True, "BIAS": True, "KEEP": True, **ALL_STATS}),
    ("tile_grad_kernel", "bf16", {}),
    ("tile_grad_kernel", "fp32", {"SOFTCAP": True, "BIAS": True, **ALL_GRADS}),
    ("kept_grad_kernel", "bf16", {}),
    ("kept_grad_kernel", "fp32", {"SOFTCAP": True, "D_LSE": True}),
]
# an argument that its flag leaves out is None
OPTIONAL = {
    "entropy": ("ENTROPY", "D_ENTROPY"),
    "log_sum_sq": ("SUM_SQ", "D_SUM_SQ"),
    "argmax": ("ARGMAX",),
    "bias": ("BIAS",),
    "d_lse": ("D_LSE",),
    "d_entropy": ("D_ENTROPY",),
    "d_log_sum_sq": ("D_SUM_SQ",),
    "numerators": ("KEEP",),
    "references": ("KEEP",),
}


def compile_all(backend, arch, warp_size):
    """Run in the subprocess: prints one record per case."""
    import re
    import tempfile
    from pathlib import Path

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prefloss.kernels import logprob_gather

    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    # once a vocabulary of 16 n, as a launch specialises for it, and once of any size
    for kernel_name, dtype, given in CASES:
        kernel = getattr(logprob_gather, kernel_name)
        names = kernel.arg_names
        size = {"fp32": 4}.get(dtype, 2)
        launch = logprob_gather.FORWARD if "LANE" in names else logprob_gather.BACKWARD
        tile_size = 4 if kernel_name.startswith("tile") else size
        constants = {name: given.get(name, False) for name in names if name.isupper() and len(name) > 1}
        constants |= {
            name: value
            for name, value in (("BLOCK", launch.block), ("LANE", 16 // tile_size))
            if name in names
        }
        for name, flags in OPTIONAL.items():
            if name in names and any(f in names for f in flags) and not any(constants.get(f) for f in flags):
                constants[name] = None
        pointers = {name: "fp32" for name in names} | {
            "logits": dtype,
            "d_logits": dtype,
            "bias": dtype,
            "d_tile": dtype,
            "numerators": "fp32" if dtype == "fp32" else "fp16",
            "targets": "i64",
            "argmax": "i64",
            "i": "i64",
        }
        scalars = {name: "i32" for name in ("T", "V", "v_start", "width", "ignore_index")}
        scalars |= {name: "i64" for name in names if name.startswith("stride")}
        scalars |= {name: "fp32" for name in ("inner", "outer", "outer2", "slope")}
        signature = {
            name: "constexpr" if name in constants else scalars.get(name, f"*{pointers[name]}")
            for name in names
        }
        unspecialised = {"T", "v_start", "ignore_index"}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name] not in ("constexpr", "fp32") and name not in unspecialised
        }
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        options = {"num_warps": launch.warps, "enable_fp_fusion": True}
        asm = triton.compile(source, target=target, options=options).asm
        record = {"kernel": kernel_name, "binary": len(asm.get("cubin") or asm.get("hsaco") or b"")}
        if "cubin" in asm:
            record["ptx"] = asm["ptx"].partition(".target ")[2].split()[0].strip(",")
            record["wide"] = bool(re.search(r"(ld|st)\.global\.?\S*\.v4\.b32", asm["ptx"]))
            if cuobjdump.exists():
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(asm["cubin"])
                    file.flush()
                    usage = subprocess.run(
                        [cuobjdump, "--dump-resource-usage", file.name],
                        capture_output=True,
                        text=True,
                        check=True,
                    ).stdout
                record["usage"] = {
                    key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)
                }
        print(json.dumps(record))


@pytest.mark.parametrize(
    ("backend", "arch", "warp_size"),
    [("cuda", "80", 32), ("cuda", "90", 32), ("cuda", "100", 32), ("hip", "gfx942", 64)],
)
def test_compiles(backend, arch, warp_size, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # of this run, or nothing would be compiled
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, __file__, backend, arch, str(warp_size)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if backend not in run.stdout.partition("\n")[0]:
        pytest.skip(f"this Triton has no {backend} backend: {run.stderr[-300:]}")
    assert run.returncode == 0, run.stderr[-3000:]
    records = [json.loads(line) for line in run.stdout.splitlines()[1:]]
    assert [record["kernel"] for record in records] == [kernel for kernel, _, _ in CASES]
    for record in records:
        assert record["binary"], record
        # no register spilled to memory; a stack frame is where they go
        assert record.get("usage", {}).get("STACK", 0) == 0, record
        if backend == "cuda":
            assert record["ptx"].startswith(f"sm_{arch}"), record
            # 16 bytes at a time, or half the bandwidth is lost
            assert record["wide"], record


if __name__ == "__main__":
    from triton.backends import backends

    print(*("cuda" if name == "nvidia" else "hip" if name == "amd" else name for name in backends))
    compile_all(*sys.argv[1:])

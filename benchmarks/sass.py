"""What the compiler makes of a Triton kernel, read from its machine code (SASS). Needs Triton, and no GPU.

The tests of the kernels and the forecast compile what a launch would compile: they record the launches of an op on
tensors of the meta device, which have shapes and no memory.

    with recorded() as launches:
        launch.token_forward(torch.empty(16384, 128256, dtype=torch.bfloat16, device="meta"), ...)
    code = compile_launch(launches[0], arch=90)
    code.registers, code.spilled, code.shared, code.occupancy()
    code.main.load_widths, code.main.per_logit("logits")
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Of one multiprocessor; sm_80, sm_90 and sm_100 agree.
REGISTERS, WARPS, LANES = 65536, 64, 32
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
}


class Launch(NamedTuple):
    """One launch: the kernel, how many programs of how many warps, its arguments in order, and its constants."""

    kernel: Any
    programs: int
    warps: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches of prefloss's kernels are listed instead of run. Give the ops tensors of the meta device."""
    from prefloss.kernels.triton import launch

    launches, run = [], launch._run

    def record(kernel: Any, programs: int, warps: int, *arguments: Any, **constants: Any) -> None:
        launches.append(Launch(kernel, programs, warps, arguments, constants))

    launch._run = record
    try:
        yield launches
    finally:
        launch._run = run


class Instruction(NamedTuple):
    """One instruction: its address, its name with all suffixes, such as LDG.E.128, and its operands."""

    address: int
    name: str
    operands: str

    @property
    def width(self) -> int:
        """Bytes that a load or store moves per thread."""
        suffixes = self.name.split(".")[1:]
        if {"U8", "S8"} & {*suffixes}:
            return 1
        if {"U16", "S16"} & {*suffixes}:
            return 2
        return max((int(size) // 8 for size in suffixes if size in ("64", "128", "256")), default=4)


@dataclass(frozen=True)
class Section:
    """Instructions in a row, such as the body of a loop."""

    instructions: tuple[Instruction, ...]

    def __len__(self) -> int:
        return len(self.instructions)

    def named(self, *names: str) -> list[Instruction]:
        """The instructions with one of these names, such as "MUFU" or "LDG", with any suffixes."""
        return [one for one in self.instructions if one.name.split(".")[0] in names]

    @property
    def loads(self) -> list[int]:
        """Bytes of each load from global memory."""
        return [one.width for one in self.named("LDG")]

    @property
    def stores(self) -> list[int]:
        """Bytes of each store to global memory."""
        return [one.width for one in self.named("STG")]

    def logits(self, element_size: int) -> float:
        """Logits of a thread that the section loads."""
        return sum(self.loads) / element_size


@dataclass(frozen=True)
class Code:
    """A compiled kernel."""

    launch: Launch
    arch: int
    registers: int
    # Bytes per thread of the stack, where registers go that do not fit, and per program of shared memory.
    spilled: int
    shared: int
    whole: Section

    @cached_property
    def loops(self) -> list[Section]:
        """The innermost loops, in order."""
        spans = []
        for one in self.whole.named("BRA"):
            target = re.search(r"0x([0-9a-f]+)", one.operands)
            # a branch to itself marks the end of the code
            if target and int(target.group(1), 16) < one.address:
                spans.append((int(target.group(1), 16), one.address))
        inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
        return [
            Section(tuple(one for one in self.whole.instructions if first <= one.address <= last))
            for first, last in sorted(inner)
        ]

    @property
    def main(self) -> Section:
        """The loop that loads most from global memory; without such a loop, the whole kernel."""
        loading = [loop for loop in self.loops if loop.loads]
        return max(loading, key=lambda loop: sum(loop.loads), default=self.whole)

    def per_logit(self, *names: str) -> float:
        """Instructions of `main` per logit, of all names or of these."""
        section = self.main
        count = len(section.named(*names)) if names else len(section)
        logits = section.logits(self.launch.arguments[0].element_size())
        if section is self.whole:
            logits = self.launch.constants["BLOCK"] / (LANES * self.launch.warps)
        return count / logits

    def occupancy(self) -> float:
        """Share of a multiprocessor's warps that its registers hold."""
        per_warp = -(-self.registers * LANES // 256) * 256
        programs = REGISTERS // per_warp // self.launch.warps
        return min(WARPS, programs * self.launch.warps) / WARPS


def compile_launch(launch: Launch, arch: int = 90) -> Code:
    """Compile for sm_80, sm_90 or sm_100 what the launch would compile there. Triton's cache keeps the result."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialized(launch)
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, LANES), options=options)
    usage, _, code = _dump(compiled.asm["cubin"]).partition("Function")[2].partition("code for")
    return Code(
        launch,
        arch,
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spilled=sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        shared=compiled.metadata.shared,
        whole=Section(tuple(_instructions(code))),
    )


def specialized(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Types by name, constants and alignments, as Triton takes them from the arguments of a launch."""
    constants, signature, attributes = dict(launch.constants), {}, {}
    for place, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments, strict=False)):
        name, special = parameter.name, not parameter.do_not_specialize
        if value is None or (special and isinstance(value, int) and value == 1):
            constants[name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], divisible = f"*{TYPES[value.dtype]}", value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name] = parameter.annotation_type or ("i32" if abs(value) < 2**31 else "i64")
            divisible = value % 16 == 0
        if special and divisible and not parameter.do_not_specialize_on_alignment:
            attributes[(place,)] = [["tt.divisibility", 16]]
    names = launch.kernel.arg_names
    return {name: signature.get(name, "constexpr") for name in names}, constants, attributes


def _dump(cubin: bytes) -> str:
    """Resource usage, then machine code, as the tool that Triton brings prints them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(code: str) -> Iterator[Instruction]:
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);"
    for address, name, operands in re.findall(pattern, code):
        if name != "NOP":
            yield Instruction(int(address, 16), name, operands)

"""What a compiled program of an accelerator moves through main memory.

Read from the text of the compiled program. A kernel reads its operands and writes its
results; of an operand that it only slices, the slices, and of a result that it only
updates, the update. What lies in the vector memory of a TPU, memory space 1, is not
counted. A loop counts once per trip, and of a conditional the dearest branch.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64, "c128": 128}
ARRAY = re.compile(
    r"\b(pred|bf16|c64|c128|f8e4m3fn|f8e5m2|[fsu]\d+)\[([\d,]*)\]({[^}]*})?"
)
HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
ASSIGNMENT = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
NAME = re.compile(r"%([\w.\-]+)")

# These move nothing: they name a part of what is there, or end what has begun.
NO_KERNELS = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
    *("after-all", "partition-id", "replica-id", "opt-barrier"),
    *("copy-done", "slice-done", "async-done", "async-update", "dynamic-slice-done"),
}
COPIES = {"copy-start", "slice-start", "dynamic-slice-start", "async-start"}
SLICES = {"slice", "dynamic-slice", "gather"}


class Array(NamedTuple):
    bytes: float
    in_main_memory: bool


class Instruction(NamedTuple):
    name: str
    is_root: bool
    arrays: list[Array]  # of the result
    operation: str
    operands: list[str]
    text: str  # between the parentheses
    attributes: str

    @property
    def size(self) -> float:
        """Bytes of the result in main memory."""
        return sum(array.bytes for array in self.arrays if array.in_main_memory)

    def named(self, attribute: str) -> str:
        """The computation that an attribute names."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        assert match, f"{self.name} has no {attribute}"  # noqa: S101
        return match[1]


Computation = dict[str, Instruction]


class Kernel(NamedTuple):
    name: str
    read: float
    written: float
    trips: int

    @property
    def bytes(self) -> float:
        return self.trips * (self.read + self.written)


def kernels(text: str) -> list[Kernel]:
    """Every kernel of a program, as often as it runs."""
    computations, entry = _parsed(text)
    return _kernels_of(computations, entry, 1)


def bytes_moved(of: list[Kernel]) -> float:
    return sum(kernel.bytes for kernel in of)


def _parsed(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = HEADER.match(line)
        assignment = ASSIGNMENT.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif assignment and current is not None:
            root, name, rest = assignment.groups()
            current[name] = _instruction(name, bool(root), rest)
    return computations, entry


def _instruction(name: str, is_root: bool, rest: str) -> Instruction:
    # The type is a tuple in parentheses, or one array whose layout may have some.
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    start = rest.index("(", end)
    stop = _closing(rest, start)
    text = rest[start + 1 : stop - 1]
    return Instruction(
        name,
        is_root,
        _arrays(rest[:end]),
        rest[end:start].strip(),
        NAME.findall(text),
        text,
        rest[stop:],
    )


def _closing(text: str, opening: int) -> int:
    """Behind the parenthesis that closes this one."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"a parenthesis that nothing closes: {text}")


def _arrays(type_text: str) -> list[Array]:
    found = []
    for dtype, dims, layout in ARRAY.findall(type_text):
        count = math.prod(int(n) for n in dims.split(",") if n)
        bits = BITS.get(dtype) or int(dtype[1:])
        found.append(Array(count * bits / 8, "S(1)" not in layout))
    return found


def _kernels_of(
    computations: dict[str, Computation], name: str, trips: int
) -> list[Kernel]:
    computation = computations[name]

    def inside(name: str, trips: int = trips) -> list[Kernel]:
        return _kernels_of(computations, name, trips)

    found: list[Kernel] = []
    for instruction in computation.values():
        operation = instruction.operation
        if operation == "while":
            count = trips * _trip_count(computations, instruction)
            found += inside(instruction.named("body"), count)
        elif operation == "conditional":
            found += max(map(inside, _branches(instruction)), key=bytes_moved)
        elif operation == "call":
            found += inside(instruction.named("to_apply"))
        elif operation not in NO_KERNELS:
            read, written = _moved(computations, computation, instruction)
            found.append(Kernel(instruction.name, read, written, trips))
    return found


def _branches(instruction: Instruction) -> list[str]:
    several = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    if several:
        return NAME.findall(several[1])
    return [instruction.named(f"{word}_computation") for word in ("true", "false")]


def _trip_count(computations: dict[str, Computation], loop: Instruction) -> int:
    """As the compiler knows it, or else the bound in the loop's condition."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    numbers: list[int] = []

    def collect(name: str) -> None:
        for instruction in computations[name].values():
            if instruction.operation == "constant" and instruction.text.isdigit():
                numbers.append(int(instruction.text))
            if instruction.operation == "fusion":
                collect(instruction.named("calls"))

    collect(loop.named("condition"))
    return max(numbers, default=1)


def _moved(
    computations: dict[str, Computation],
    computation: Computation,
    instruction: Instruction,
) -> tuple[float, float]:
    """Bytes that a kernel reads, and that it writes."""
    sizes = [
        computation[name].size if name in computation else 0
        for name in instruction.operands
    ]
    written = instruction.size
    if instruction.operation == "fusion":
        inner = instruction.named("calls")
        parts = [_read(computations, inner, i) for i in range(len(sizes))]
        read = sum(
            size if part is None else min(part, size)
            for part, size in zip(parts, sizes, strict=True)
        )
        return read, min(written, _written(computations, inner))
    if instruction.operation in SLICES:
        return written, written
    if instruction.operation == "dynamic-update-slice":
        return sizes[1], sizes[1]
    if instruction.operation == "custom-call":
        # Behind its result stands the memory that it works in.
        first = instruction.arrays[:1]
        written = sum(array.bytes for array in first if array.in_main_memory)
        return sum(sizes), written
    if instruction.operation in COPIES:
        return _copied(instruction)
    return sum(sizes), written


def _copied(instruction: Instruction) -> tuple[float, float]:
    """Between the two memories of a TPU, of which one is counted."""
    ends = [array for array in instruction.arrays if array.bytes > 4][:2]
    size = min((array.bytes for array in ends), default=0)
    counted = sum(array.in_main_memory for array in ends)
    return size * counted / 2, size * counted / 2


def _read(
    computations: dict[str, Computation], fusion: str, position: int
) -> float | None:
    """Bytes of the slices that a fusion takes of an operand; None: it reads all."""
    body = computations[fusion].values()
    aliases = {
        i.name for i in body if i.operation == "parameter" and i.text == str(position)
    }
    aliases |= {
        i.name for i in body if i.operation == "bitcast" and i.operands[0] in aliases
    }
    total = 0.0
    for user in body:
        if user.operation == "bitcast":
            continue
        for place, name in enumerate(user.operands):
            if name not in aliases:
                continue
            part = _read_by(computations, user, place)
            if part is None:
                return None
            total += part
    return total if aliases else None


def _read_by(
    computations: dict[str, Computation], user: Instruction, place: int
) -> float | None:
    if user.operation in SLICES and place == 0:
        return sum(array.bytes for array in user.arrays)
    if user.operation == "dynamic-update-slice" and place == 0:
        return 0
    if user.operation == "fusion":
        return _read(computations, user.named("calls"), place)
    return None


def _written(computations: dict[str, Computation], fusion: str) -> float:
    body = computations[fusion]
    root = next(i for i in body.values() if i.is_root)
    results = [root]
    if root.operation == "tuple":
        results = [body[name] for name in root.operands]
    return sum(map(_written_by(computations, body), results))


def _written_by(
    computations: dict[str, Computation], body: Computation
) -> Callable[[Instruction], float]:
    def of(result: Instruction) -> float:
        while result.operation == "bitcast":
            result = body[result.operands[0]]
        if result.operation == "dynamic-update-slice":
            return sum(array.bytes for array in body[result.operands[1]].arrays)
        if result.operation == "fusion":
            return _written(computations, result.named("calls"))
        return result.size

    return of

"""Reads the text of a compiled TPU program: computations, instructions, shapes, and where each came from.

Only what the estimate needs is taken apart: a line `%name = shape opcode(operands), attributes` becomes an
`Instruction` whose attributes stay text until one is asked for.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_COST = re.compile(r'"cost_estimate":\{([^{}]*)\}')
_COST_FIELD = re.compile(r'"(\w+)":"?(\d+)')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_SOURCE = re.compile(r'source_file="([^"]*)"(?: source_line=(\d+))?')
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BITS = {"pred": 8, "token": 0, "opaque": 0}


def _element_bits(dtype: str) -> int:
    """Bits of an element by the type's name: s4, bf16, f8e4m3fn, c64."""
    if dtype in _BITS:
        return _BITS[dtype]
    match = re.match(r"[a-z]+(\d+)", dtype)
    if match is None:
        raise ValueError(f"unknown element type {dtype!r} in a compiled program")
    return int(match.group(1))


def shape_bytes(shape: str, *, hbm_only: bool = False) -> int:
    """Bytes of an array's or a tuple's text, such as "(bf16[2,8]{1,0}, f32[])".

    Args:
      shape: the text.
      hbm_only: leaves out arrays that the compiler keeps on the chip, whose layout names a memory space: "S(1)".
    """
    bits = 0
    for dtype, sizes, layout in _ARRAY.findall(shape):
        if hbm_only and "S(" in layout:
            continue
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        bits += count * _element_bits(dtype)
    return bits // 8


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"no closing parenthesis in {text[start : start + 80]!r}")


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str  # of the result
    opcode: str
    operands: tuple[str, ...]  # names
    constant: str  # text between the parentheses
    attributes: str  # text after them

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where it made none."""
        match = _CYCLES.search(self.attributes)
        return int(match.group(1)) if match else None

    @property
    def trip_count(self) -> int | None:
        """Of a while loop, if the compiler noted it."""
        match = _TRIP_COUNT.search(self.attributes)
        return int(match.group(1)) if match else None

    @property
    def target(self) -> str:
        """What a custom call calls; "" for other instructions."""
        match = _TARGET.search(self.attributes)
        return match.group(1) if match else ""

    @property
    def kernel_cost(self) -> Mapping[str, int] | None:
        """A hand-written kernel's own estimate: flops, bytes_accessed, transcendentals."""
        match = _COST.search(self.attributes)
        if match is None:
            return None
        return {name: int(value) for name, value in _COST_FIELD.findall(match.group(1))}

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it calls; for a while loop its body."""
        return tuple(_CALLED.findall(self.attributes))

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the computations of which a conditional runs one."""
        match = _BRANCHES.search(self.attributes)
        if match is None:
            return self.called
        return tuple(name.strip().lstrip("%") for name in match.group(1).split(","))

    @property
    def op_name(self) -> str:
        """JAX's name of the operation, such as "jit(step)/jvp()/dot_general"; "" if it has none."""
        match = _OP_NAME.search(self.attributes)
        return match.group(1) if match else ""


def parse_instruction(line: str) -> Instruction | None:
    """An instruction's line; None for any other line."""
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(match.group(2), shape, rest[:opening], operands, inside, rest[closing + 1 :])


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """A line of source code on the call stack of an operation."""

    file: str
    line: int
    function: str


class Module:
    """A program: its computations in the order in which they are printed, each in scheduled order."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        tables: dict[str, dict[int, str]] = {}
        current: list[Instruction] | None = None
        table: dict[int, str] | None = None
        for line in text.splitlines():
            if current is not None:
                instruction = parse_instruction(line)
                if instruction is not None:
                    current.append(instruction)
                elif line.startswith("}"):
                    current = None
            elif header := _HEADER.match(line):
                current = self.computations.setdefault(header.group(2), [])
                if header.group(1):
                    self.entry = header.group(2)
            elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = tables.setdefault(line, {})
            elif table is not None and (row := re.match(r"(\d+) (.*)", line)):
                table[int(row.group(1))] = row.group(2)
        if not self.entry:
            raise ValueError("the text has no ENTRY computation: it is not that of a compiled program")
        self._tables = tables

    @functools.cached_property
    def _frames(self) -> dict[int, tuple[Frame, int]]:
        """Each stack frame's place and its caller's number."""
        names = {kind: self._tables.get(kind, {}) for kind in ("FileNames", "FunctionNames", "FileLocations")}
        rows = {
            number: {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}
            for number, row in self._tables.get("StackFrames", {}).items()
        }
        # The outermost frame has no caller, which is printed as 0 or, with all numbers one higher, as itself.
        shift = rows.get(1, {}).get("parent_frame_id", 0)
        frames = {}
        for number, fields in rows.items():
            location = names["FileLocations"].get(fields["file_location_id"], "")
            place = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", location)}
            frame = Frame(
                names["FileNames"].get(place.get("file_name_id", 0), "").strip('"'),
                place.get("line", 0),
                names["FunctionNames"].get(place.get("function_name_id", 0), "").strip('"'),
            )
            frames[number] = (frame, fields.get("parent_frame_id", 0) - shift)
        return frames

    def stack(self, instruction: Instruction) -> Iterator[Frame]:
        """The call stack of the operation, innermost first."""
        source = _SOURCE.search(instruction.attributes)
        if source:
            yield Frame(source.group(1), int(source.group(2) or 0), "")
        match = _FRAME.search(instruction.attributes)
        number = int(match.group(1)) if match else 0
        while number in self._frames:
            frame, number = self._frames[number]
            yield frame

    def loop_count(self, loop: Instruction, within: list[Instruction]) -> int | None:
        """Iterations of a while loop; None if they cannot be told.

        Where the compiler noted no `known_trip_count`, a condition "counter < constant" of a counter that starts
        at a constant is read; JAX's loops count by ones.
        """
        if loop.trip_count is not None:
            return loop.trip_count
        match = re.search(r"\bcondition=%?([\w.\-]+)", loop.attributes)
        condition = {each.name: each for each in self.computations[match.group(1)]} if match else {}
        compares = [
            each
            for each in condition.values()
            if each.opcode == "compare" and "direction=LT" in each.attributes
        ]
        if len(compares) != 1:
            return None
        counter, bound = (condition[name] for name in compares[0].operands)
        index = re.search(r"\bindex=(\d+)", counter.attributes)
        outer = {each.name: each for each in within}
        initial = outer.get(loop.operands[0])
        if bound.opcode != "constant" or index is None or initial is None or initial.opcode != "tuple":
            return None
        start: Instruction | None = outer.get(initial.operands[int(index.group(1))])
        while start is not None and start.opcode in ("copy", "bitcast"):
            start = outer.get(start.operands[0])
        if start is None or start.opcode != "constant":
            return None
        return max(0, int(bound.constant) - int(start.constant))

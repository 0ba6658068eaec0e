"""What a compiled program moves: memory traffic and collectives, read from its optimised HLO text.

XLA's own cost analysis counts the body of a loop once; here every loop counts as often as it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
        *("after-all", "partition-id", "replica-id", "iota", "opt-barrier", "async-done", "copy-done"),
    )
)
"""Instructions that move nothing themselves."""
_TYPE_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?[\]})]) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    """Attributes, and the operands as text."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """All communication of one kind."""

    kind: str
    count: int
    """Times it runs in a step."""
    bytes: int
    """Bytes a chip sends over the interconnect in a step, by ring algorithms."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device moves in one execution."""

    hbm_bytes: int
    collectives: tuple[Collective, ...]
    """Over the links inside a slice."""
    dcn: tuple[Collective, ...] = ()
    """Between slices, over the data-centre network."""

    @property
    def interconnect_bytes(self) -> int:
        """All collectives together."""
        return sum(collective.bytes for collective in self.collectives)


Computations = dict[str, list[Instruction]]


def traffic(hlo: str, devices: int) -> Traffic:
    """Counts a program's traffic.

    Args:
        hlo: `compiled.as_text()`.
        devices: partitions of the program: the group of a collective that names none.

    Returns:
        Bytes read and written in device memory (operands and results of every instruction that is not inside
        a fusion, slices counted as slices, TPU vector memory left out), and collectives. Of a conditional,
        every branch counts, so both are upper bounds where branches differ.
    """
    computations, entry = parse(hlo)
    hbm = 0
    # The TPU compiler spreads one collective over several fusions; its channel says that it is the same.
    channels: dict[tuple[str, str], tuple[int, int]] = {}
    dcn: dict[str, tuple[int, int]] = {}
    for name, times in _executions(computations, entry).items():
        for number, instruction in enumerate(computations[name]):
            hbm += times * _memory_bytes(instruction, name, computations)
            if sent := _between_slices(instruction):
                kind, size = sent
                runs_so_far, total = dcn.get(kind, (0, 0))
                dcn[kind] = (runs_so_far + times, total + times * size)
                continue
            source, kind = _collective(instruction, computations)
            if source is None:
                continue
            found = re.search(r"channel_id=(\d+)", source.rest)
            channel = found[1] if found and instruction.opcode == "fusion" else f"{name} {number}"
            size = _wire_bytes(kind, source, devices)
            known = channels.get((kind, channel), (times, size))
            channels[kind, channel] = min(known, (times, size))
    collectives = []
    for kind in COLLECTIVES:
        runs = [each for (name, _), each in channels.items() if name == kind]
        if runs:
            total = sum(times * size for times, size in runs)
            collectives.append(Collective(kind, sum(times for times, _ in runs), total))
    return Traffic(hbm, tuple(collectives), tuple(Collective(kind, *dcn[kind]) for kind in sorted(dcn)))


def parse(hlo: str) -> tuple[Computations, str]:
    """Splits HLO text into computations; returns them and the entry's name."""
    computations: Computations = {}
    entry, current = "", None
    for line in hlo.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
            continue
        instruction = _INSTRUCTION.match(line) if current is not None else None
        if instruction:
            name, type_, opcode, rest = instruction.groups()
            operands = tuple(_OPERAND.findall(rest.split("), ", 1)[0]))
            current.append(Instruction(name, type_, opcode, operands, rest))  # type: ignore[union-attr]
    return computations, entry


def array_bytes(type_: str, *, device_memory_only: bool = False) -> int:
    """Bytes of all arrays in a type; those in TPU vector memory (layout `S(1)`) may be left out."""
    total = 0
    for kind, dimensions, layout in _ARRAY.findall(type_):
        if device_memory_only and re.search(r"S\([1-9]", layout):
            continue
        bits = re.search(r"\d+", kind)
        width = _TYPE_BYTES.get(kind) or (max(int(bits[0]) // 8, 1) if bits else 1)
        total += width * math.prod(int(size) for size in dimensions.split(",") if size)
    return total


def _executions(computations: Computations, entry: str) -> dict[str, int]:
    """How often each computation outside fusions runs."""
    times: dict[str, int] = collections.defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in computations[name]:
            for callee, repeats in _calls(instruction, computations):
                visit(callee, count * repeats)

    visit(entry, 1)
    return times


def _calls(instruction: Instruction, computations: Computations) -> list[tuple[str, int]]:
    rest = instruction.rest
    if instruction.opcode == "while":
        return [(_attribute(rest, "body"), _trip_count(rest, computations))]
    if instruction.opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
        names = _OPERAND.findall(branches[1]) if branches else re.findall(r"_computation=%?([\w.-]+)", rest)
        return [(name, 1) for name in names]
    if instruction.opcode in ("call", "async-start"):
        callee = _attribute(rest, "to_apply") or _attribute(rest, "calls")
        return [(callee, 1)] if callee in computations else []
    return []


def _trip_count(rest: str, computations: Computations) -> int:
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
    if known:
        return int(known[1])
    # A counted loop: the condition compares a counter that starts at 0 with its one integer constant.
    condition = computations[_attribute(rest, "condition")]
    limits = [
        int(re.match(r"\d+", each.rest)[0])  # type: ignore[index]
        for each in condition
        if each.opcode == "constant" and each.type.startswith(("s32[]", "u32[]")) and each.rest[0].isdigit()
    ]
    return limits[0] if len(limits) == 1 else 1


def _attribute(rest: str, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.-]+)", rest)
    return found[1] if found else ""


def _collective(instruction: Instruction, computations: Computations) -> tuple[Instruction | None, str]:
    """The collective that an instruction is, or that it is fused with, and its kind."""
    inner = [instruction]
    if instruction.opcode == "fusion":
        inner = computations.get(_attribute(instruction.rest, "calls"), [])
    for each in inner:
        kind = each.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            # The TPU compiler writes a reduce-scatter as an all-reduce fused with its slice.
            sliced = each is not instruction and any(other.opcode == "dynamic-slice" for other in inner)
            return each, "reduce-scatter" if kind == "all-reduce" and sliced else kind
    return None, ""


def _between_slices(instruction: Instruction) -> tuple[str, int] | None:
    """Kind and bytes of a transfer that the TPU compiler hands to the hosts' network; None for all else.

    It splits a collective over slices into one inside each and a send of what is left; what a chip sends for
    its own part is counted as in a ring over the slices.
    """
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
    if instruction.opcode != "send" or found is None:
        return None
    target = re.search(r'_xla_megascale_target="\{([^}]*)\}', instruction.rest)
    slices = len(target[1].split(",")) if target else 2
    part = array_bytes(instruction.type.partition("}")[0])
    kind = found[1].lower().replace("_", "-")
    share = {"all-reduce": 2 * part * (slices - 1) // slices, "all-gather": part * (slices - 1)}
    return kind, share.get(kind, part * (slices - 1) // slices)


def _wire_bytes(kind: str, source: Instruction, devices: int) -> int:
    group = _group(source.rest, devices)
    arrays = [array_bytes(found[0]) for found in re.finditer(_ARRAY, source.type)]
    whole = max(arrays) if source.opcode.endswith("-start") else sum(arrays)
    if source.opcode == "reduce-scatter":
        whole *= group
    if kind == "collective-permute":
        return whole
    share = whole * (group - 1) // max(group, 1)
    return 2 * share if kind == "all-reduce" else share


def _group(text: str, devices: int) -> int:
    """Size of a collective's groups: `{{0,1},{2,3}}`, `[2,8]<=[16]` or `mesh['x'=2,'y'=8] {'y'}`."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    if iota:
        return int(iota[1])
    order = r"(?:, device_ids=\(.*?\)(?= |,|$))?"  # in which the mesh counts its devices
    mesh = re.search(rf"replica_groups=(?:\w+)?mesh\[([^\]]*)\]{order}(?:\s*\{{([^}}]*)\}})?", text)
    if mesh:
        sizes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", mesh[1]))
        chosen = re.findall(r"'([\w.]+)'", mesh[2] or "") or list(sizes)
        return math.prod(int(sizes.get(axis, 1)) for axis in chosen)
    return devices


def _memory_bytes(instruction: Instruction, computation: str, computations: Computations) -> int:
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0
    size = functools.partial(array_bytes, device_memory_only=True)
    types = _types(computations, computation)
    if instruction.opcode == "dynamic-slice":
        return 2 * size(instruction.type)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * size(types.get(instruction.operands[1], ""))
    if instruction.opcode.endswith("-start"):
        return size(instruction.type)  # a pair of source and destination
    # What passes through unchanged (`{1}: (0, {})`: result 1 is operand 0) is not touched.
    aliases = re.findall(r"\{(\d*)\}: \((\d+), ", instruction.rest)
    results = {int(result) for result, _ in aliases if result}
    untouched = {int(operand) for result, operand in aliases if result}
    reads = [
        0 if index in untouched else size(types.get(operand, ""))
        for index, operand in enumerate(instruction.operands)
    ]
    arrays = [found[0] for found in re.finditer(_ARRAY, instruction.type)]
    writes = sum(size(array) for index, array in enumerate(arrays) if index not in results)
    if instruction.opcode == "fusion":
        inner = computations.get(_attribute(instruction.rest, "calls"), [])
        reads, writes = _fusion_bytes(inner, reads, writes, computations)
    return sum(reads) + writes


def _sliced_bytes(use: Instruction, name: str, computations: Computations) -> int | None:
    """What an instruction reads of an operand that it only takes slices of; None where it reads all of it.

    The TPU compiler puts fusions into fusions: the slice of a layer's part of a stack often stands in one.
    """
    if use.opcode == "dynamic-slice" and use.operands[0] == name:
        return array_bytes(use.type)
    if use.opcode != "fusion":
        return None
    total = 0
    nested = computations.get(_attribute(use.rest, "calls"), [])
    for place, operand in enumerate(use.operands):
        if operand != name:
            continue
        parameter = next((each for each in nested if _parameter_number(each) == place), None)
        users = [each for each in nested if parameter is not None and parameter.name in each.operands]
        parts = [_sliced_bytes(each, parameter.name, computations) for each in users if parameter is not None]
        if not parts or None in parts:
            return None
        total += sum(part for part in parts if part is not None)
    return total


def _parameter_number(instruction: Instruction) -> int | None:
    found = re.match(r"\d+", instruction.rest) if instruction.opcode == "parameter" else None
    return int(found[0]) if found else None


def _fusion_bytes(
    inner: list[Instruction], reads: list[int], writes: int, computations: Computations
) -> tuple[list[int], int]:
    """Corrects a fusion's traffic where it only slices an operand or updates a slice of one in place."""
    parameters = {
        each.name: int(re.match(r"\d+", each.rest)[0])  # type: ignore[index]
        for each in inner
        if each.opcode == "parameter"
    }
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for each in inner:
        for operand in each.operands:
            users[operand].append(each)
    types = {each.name: each.type for each in inner}
    for name, index in parameters.items():
        uses = users[name]
        if index >= len(reads) or not uses:
            continue
        slices = [_sliced_bytes(use, name, computations) for use in uses]
        if None not in slices:
            reads[index] = min(reads[index], sum(each for each in slices if each is not None))
        elif all(use.opcode == "dynamic-update-slice" and use.operands[0] == name for use in uses):
            updates = sum(array_bytes(types.get(use.operands[1], "")) for use in uses)
            writes = max(writes - reads[index], 0) + updates
            reads[index] = 0
    return reads, writes


def _types(computations: Computations, name: str) -> dict[str, str]:
    return {each.name: each.type for each in computations[name]}

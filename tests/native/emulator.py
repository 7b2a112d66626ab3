"""Runs a static 64-bit Arm Linux program in Unicorn: the few system calls that a program without files makes."""

from __future__ import annotations

import struct
from pathlib import Path

import unicorn
from unicorn import arm64_const as arm

PAGE = 1 << 16
STACK, STACK_BYTES = 0x7F00_0000_0000, 1 << 23
HEAP, HEAP_BYTES = 0x5000_0000_0000, 1 << 28
SEGMENT_LOAD = 1
AUX_PHDR, AUX_PHENT, AUX_PHNUM, AUX_PAGESZ, AUX_HWCAP, AUX_RANDOM = 3, 4, 5, 6, 16, 25
HWCAP_ASIMD, HWCAP_ASIMDDP = 1 << 1, 1 << 20
SYSTEM_CALL = 2  # QEMU's number of the exception
NO_SUCH_CALL = -38 & 2**64 - 1


def run(program: Path) -> tuple[int, str]:
    """(exit status, what it wrote to standard output and error). Raises unicorn.UcError on a fault."""
    image = program.read_bytes()
    entry, headers_at = struct.unpack_from("<QQ", image, 24)
    header_bytes, header_count = struct.unpack_from("<HH", image, 54)
    machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    machine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
    mapped: set[int] = set()
    headers_in_memory = 0
    for index in range(header_count):
        kind, _, offset, address, _, in_file, in_memory, _ = struct.unpack_from(
            "<IIQQQQQQ", image, headers_at + index * header_bytes
        )
        if kind != SEGMENT_LOAD:
            continue
        for page in range(address // PAGE, -(-(address + in_memory) // PAGE)):
            if page not in mapped:
                machine.mem_map(page * PAGE, PAGE)
                mapped.add(page)
        machine.mem_write(address, image[offset : offset + in_file])
        if offset <= headers_at < offset + in_file:
            headers_in_memory = address + headers_at - offset
    machine.mem_map(STACK, STACK_BYTES)
    machine.mem_map(HEAP, HEAP_BYTES)

    top = STACK + STACK_BYTES - 4096  # zeros from here on: the random bytes, and the strings that are not there
    auxiliary = [
        (AUX_PHDR, headers_in_memory),
        (AUX_PHENT, header_bytes),
        (AUX_PHNUM, header_count),
        (AUX_PAGESZ, 4096),
        (AUX_HWCAP, HWCAP_ASIMD | HWCAP_ASIMDDP),
        (AUX_RANDOM, top),
        (0, 0),
    ]
    words = [0, 0, 0, *(word for pair in auxiliary for word in pair)]  # no arguments, no environment
    stack = (top - 8 * len(words)) & ~15
    machine.mem_write(stack, struct.pack(f"<{len(words)}Q", *words))
    machine.reg_write(arm.UC_ARM64_REG_SP, stack)
    machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point and NEON on

    system = _System()
    machine.hook_add(unicorn.UC_HOOK_INTR, system.call)
    machine.emu_start(entry, 0)
    return system.status, system.written.decode()


class _System:
    def __init__(self) -> None:
        self.status = -1
        self.written = bytearray()
        self._free = HEAP

    def call(self, machine: unicorn.Uc, number: int, _: object) -> None:
        if number != SYSTEM_CALL:  # an instruction that the emulated CPU does not have, for one: it would come again
            at = machine.reg_read(arm.UC_ARM64_REG_PC)
            self.written += b"exception %d at %#x" % (number, at)
            machine.emu_stop()
            return
        x = [machine.reg_read(register) for register in (arm.UC_ARM64_REG_X0, arm.UC_ARM64_REG_X1, arm.UC_ARM64_REG_X2)]
        result = 0
        match machine.reg_read(arm.UC_ARM64_REG_X8):
            case 66:  # writev
                for index in range(x[2]):
                    at, count = struct.unpack("<QQ", machine.mem_read(x[1] + 16 * index, 16))
                    self.written += machine.mem_read(at, count)
                    result += count
            case 64:  # write
                self.written += machine.mem_read(x[1], x[2])
                result = x[2]
            case 93 | 94:  # exit, exit_group
                self.status = x[0]
                machine.emu_stop()
            case 129 | 130 | 131:  # kill, tkill, tgkill: abort() sends itself one, again and again
                self.written += b"the program ended itself: threads and files are not there"
                machine.emu_stop()
            case 222:  # mmap, anonymous only; memory is never given back
                result, self._free = self._free, self._free + -(-x[1] // PAGE) * PAGE
            case 29 | 96 | 134 | 135 | 178 | 215 | 226 | 233:  # terminal, thread and signal settings, munmap
                pass
            case _:
                result = NO_SUCH_CALL
        machine.reg_write(arm.UC_ARM64_REG_X0, result)

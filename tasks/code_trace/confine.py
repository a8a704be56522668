"""Shuts a process in, for good, before it looks at a stranger's code. Linux; `child.py` loads it by its path.

Each step is taken where the system offers it, and the caller learns which took hold:

namespaces         of its own: users, network, processes, System V objects, mounts, host name
no_new_privs       no program gives it rights that it lacks
landlock           no file, no port, no signal to other processes (kernels from 5.13 on)
seccomp            the kernel refuses every system call but those of `ALLOWED`: no file can be opened, no socket,
                   process or thread made, no signal sent, no memory made executable; x86_64 and aarch64

Standard library only. `ctypes` stays in the process: what runs in it may call any function, and all system calls but
the allowed ones fail. So the last step is the wall; the others stand behind it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

_NAMESPACES = {
    "user": 0x10000000,
    "network": 0x40000000,
    "pid": 0x20000000,
    "ipc": 0x08000000,
    "mount": 0x00020000,
    "host name": 0x04000000,
}
_NO_NEW_PRIVS, _SECCOMP, _PARENT_DEATH = 38, 22, 1  # of prctl
_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446  # the same on every architecture
_FILTER, _EXECUTABLE, _STDOUT = 2, 4, 1

# Numbers of system calls, by architecture: the kernel's name of it, then what a program needs to compute and to end.
ALLOWED = {
    "x86_64": {
        "arch": 0xC000003E, "write": 1, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigreturn": 15,
        "sched_yield": 24, "mremap": 25, "madvise": 28, "exit": 60, "gettimeofday": 96, "futex": 202,
        "restart_syscall": 219, "clock_gettime": 228, "exit_group": 231, "getrandom": 318,
    },
    "aarch64": {
        "arch": 0xC00000B7, "write": 64, "mmap": 222, "mprotect": 226, "munmap": 215, "brk": 214, "rt_sigreturn": 139,
        "sched_yield": 124, "mremap": 216, "madvise": 233, "exit": 93, "gettimeofday": 169, "futex": 98,
        "restart_syscall": 128, "clock_gettime": 113, "exit_group": 94, "getrandom": 278,
    },
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int | bytes | None) -> int:
    """A function of the C library that takes words and pointers."""
    return getattr(_libc, name)(*(ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments))


def isolate() -> list[str]:
    """Move into namespaces of its own; names those that the system gave.

    A namespace of processes holds for children only: the caller returns in a child then, and this process waits for
    that and ends as it does.
    """
    everything = sum(_NAMESPACES.values())
    for flags in (everything, everything - _NAMESPACES["user"]):
        if _call("unshare", flags) == 0:
            break
    else:
        flags = sum(flag for flag in _NAMESPACES.values() if _call("unshare", flag) == 0)
    if flags & _NAMESPACES["pid"]:
        _descend()
    return [f"{name} namespace" for name, flag in _NAMESPACES.items() if flags & flag]


def _descend() -> None:
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
    _call("prctl", _PARENT_DEATH, 9, 0, 0, 0)


def shut() -> list[str]:
    """No new rights, no files, no system calls: whatever is needed has to be open and imported before."""
    held = ["no_new_privs"] if _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0) == 0 else []
    return [*held, *(["landlock"] if _landlock() else []), *(["seccomp"] if _seccomp() else [])]


def _landlock() -> bool:
    """Whether files, ports and signals are out of reach from now on: all that this kernel's version knows."""
    version = _call("syscall", _LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    files = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    words = [files, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]
    rules = struct.pack(f"={len(words)}Q", *words)
    ruleset = _call("syscall", _LANDLOCK_CREATE, rules, len(rules), 0)
    if ruleset < 0:
        return False
    try:
        return _call("syscall", _LANDLOCK_RESTRICT, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _seccomp() -> bool:
    """Whether the kernel refuses all other system calls from now on."""
    numbers = ALLOWED.get(os.uname().machine)
    if numbers is None or sys.byteorder != "little" or struct.calcsize("P") != 8:
        return False
    code = ctypes.create_string_buffer(_program(numbers))
    program = struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(code))
    if _call("prctl", _SECCOMP, _FILTER, program, 0, 0) != 0:
        return False
    try:
        os.close(os.open("/", os.O_RDONLY))
    except OSError as error:
        return error.errno == errno.EPERM
    return False


def _program(numbers: dict[str, int]) -> bytes:
    """The filter, as the kernel's packet filter reads it."""
    load, equal, any_bit, end = 0x20, 0x15, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    number_at, arch_at, first_argument, third_argument = 0, 4, 16, 32  # in struct seccomp_data; low halves
    steps = [(load, 0, 0, arch_at), (equal, 1, 0, numbers["arch"]), (end, 0, 0, kill), (load, 0, 0, number_at)]
    for name, number in numbers.items():
        if name == "arch":
            continue
        if name == "write":  # to the standard output alone
            steps += [(equal, 0, 4, number), (load, 0, 0, first_argument), (equal, 0, 1, _STDOUT), (end, 0, 0, allow)]
            steps += [(end, 0, 0, refuse)]
        elif name in ("mmap", "mprotect"):
            steps += [(equal, 0, 4, number), (load, 0, 0, third_argument), (any_bit, 1, 0, _EXECUTABLE)]
            steps += [(end, 0, 0, allow), (end, 0, 0, refuse)]
        else:
            steps += [(equal, 0, 1, number), (end, 0, 0, allow)]
    steps.append((end, 0, 0, refuse))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)

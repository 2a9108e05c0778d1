"""Allow a process only the system calls that decoders need, with Linux's seccomp.

The process keeps what it has open, but opens no file or socket, starts no process, and sends no signal to another one.
Forbidden calls fail with EPERM. Sources: linux/{seccomp,filter,audit}.h, syscall_64.tbl and asm-generic/unistd.h.
"""

import ctypes
import errno
import os
import struct
import sys

# Number of each allowed call on x86_64 and aarch64.
ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "writev": (20, 66),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "nanosleep": (35, 101),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "exit": (60, 93),
    "gettimeofday": (96, 169),
    "getrusage": (98, 165),
    "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "set_robust_list": (273, 99),
    "getcpu": (309, 168),
    "getrandom": (318, 278),
    "membarrier": (324, 283),
    "rseq": (334, 293),
}
KILL, TGKILL = (62, 129), (234, 131)  # allowed with the process's own id: abort() sends a signal to its thread
CLONE = (56, 220)  # allowed for threads: libwebp and libheif start some
CLONE3 = (435, 435)  # has its flags in memory, which a filter cannot read; without it, libc uses clone
SECCOMP = (317, 277)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, AUDIT_ARCH

CLONE_THREAD = 0x10000
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_SPEC_ALLOW = 4  # kernels before 5.16 otherwise slow the process down, against Spectre
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
LOAD, JUMP_IF_EQUAL, JUMP_IF_SET, RETURN = 0x20, 0x15, 0x45, 0x06  # of struct sock_filter
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; little endian: the low half first
_INSTRUCTION = struct.Struct("=HBBI")


class _Program(ctypes.Structure):
    """`struct sock_fprog`: the number of instructions, and their address."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def restrict_system_calls() -> None:
    """Restrict this process and its future threads for ever.

    Raises:
        OSError: the kernel or the machine does not support it.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"no filter for system calls on {sys.platform} {machine}")
    column, architecture = MACHINES[machine]
    instructions = _build_filter(column, architecture)
    program = _Program(len(instructions) // _INSTRUCTION.size, instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (*map(ctypes.c_long, (SECCOMP[column], SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW)),)
    # Without new privileges, because only then may a process without rights restrict itself.
    if libc.prctl(PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))) or libc.syscall(
        *arguments, ctypes.byref(program)
    ):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _build_filter(column: int, architecture: int) -> bytes:
    """Build the program that the kernel runs at each call."""
    allow, deny = _return(SECCOMP_RET_ALLOW), _return(SECCOMP_RET_ERRNO | errno.EPERM)
    is_this_process = _pack(LOAD, FIRST_ARGUMENT) + _pack(JUMP_IF_EQUAL, os.getpid(), otherwise=1) + allow + deny
    is_thread = _pack(LOAD, FIRST_ARGUMENT) + _pack(JUMP_IF_SET, CLONE_THREAD, otherwise=1) + allow + deny
    rules = [(numbers, allow) for numbers in ALLOWED.values()]
    rules += [(KILL, is_this_process), (TGKILL, is_this_process), (CLONE, is_thread)]
    rules += [(CLONE3, _return(SECCOMP_RET_ERRNO | errno.ENOSYS))]
    program = _pack(LOAD, ARCHITECTURE) + _pack(JUMP_IF_EQUAL, architecture, then=1) + deny + _pack(LOAD, NUMBER)
    for numbers, verdict in rules:
        program += _pack(JUMP_IF_EQUAL, numbers[column], otherwise=len(verdict) // _INSTRUCTION.size) + verdict
    return program + deny


def _return(action: int) -> bytes:
    return _pack(RETURN, action)


def _pack(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """Serialize one instruction; `then` and `otherwise` say how many of the next ones a jump skips."""
    return _INSTRUCTION.pack(code, then, otherwise, value)

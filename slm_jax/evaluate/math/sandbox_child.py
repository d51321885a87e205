"""The inside of the sandbox: drops its privileges, then runs the program that it reads from standard input.

Run as a file, by `sandbox.Sandbox` only. It imports nothing from this package.
"""

import ctypes
import json
import os
import platform
import resource
import runpy
import struct
import sys
import traceback

NOBODY = 65534
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER = 38, 22, 2
CLONE_NEWUSER = 0x10000000
EPERM, ENOSYS = 1, 38
ALLOW, ERROR = 0x7FFF0000, 0x00050000
LOAD, IF_EQUAL, IF_AT_LEAST, IF_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as the kernel's audit names them
# Calls that no computation needs, with their numbers on the two machines: they would make memory that no limit counts,
# other namespaces and mounts, a way around the missing network (vsock has no namespace), or reach parts of the kernel
# that had holes.
REFUSED = {
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "socket": (41, 198),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
# Refused where there is no namespace of processes: what leaves the program's process group would outlive it.
LEAVE_GROUP = {"setsid": (112, 157), "setpgid": (109, 154)}
CLONE, CLONE3 = (56, 220), 435


def give_up_root(user: int) -> None:
    """Becomes `user` instead of root, whose processes the kernel does not limit; nobody where that user is unknown."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    try:
        os.setresuid(user, user, user)
    except OSError:  # a container that knows fewer users
        os.setresuid(NOBODY, NOBODY, NOBODY)


def limit(memory: int, cpu_seconds: int, file_bytes: int, processes: int) -> None:
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def refuse_system_calls(stay_in_group: bool) -> None:
    """Installs a seccomp filter: the calls in REFUSED fail with 'operation not permitted'; if `stay_in_group`, those in
    LEAVE_GROUP too.

    Raises:
        KeyError: a machine whose numbers are not known here.
        OSError: the kernel takes no filter.
    """
    architecture, machine = MACHINES[platform.machine()], list(MACHINES).index(platform.machine())
    numbers = [call[machine] for call in (REFUSED | LEAVE_GROUP if stay_in_group else REFUSED).values()]
    steps = [  # what to do with a value, and where to go on if so and if not; None is the next step
        (LOAD, 4, None, None),  # the architecture of the call: a program may use the calls of another
        (IF_EQUAL, architecture, None, "refuse"),
        (LOAD, 0, None, None),  # its number
        (IF_AT_LEAST, 0x40000000, "refuse", None),  # the x32 calls of x86
        *((IF_EQUAL, number, "refuse", None) for number in numbers),
        (IF_EQUAL, CLONE3, "unknown", None),  # its flags lie in memory, which a filter cannot read; libc takes clone
        (IF_EQUAL, CLONE[machine], None, "allow"),
        (LOAD, 16, None, None),  # the flags
        (IF_SET, CLONE_NEWUSER, "refuse", "allow"),
    ]
    ends = {"allow": ALLOW, "refuse": ERROR | EPERM, "unknown": ERROR | ENOSYS}
    place_of = {name: len(steps) + number for number, name in enumerate(ends)}
    tests = [
        (code, *(0 if target is None else place_of[target] - place - 1 for target in targets), value)
        for place, (code, value, *targets) in enumerate(steps)
    ]
    tests += [(RETURN, 0, 0, value) for value in ends.values()]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *test) for test in tests))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(tests), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    for option, first, second in (
        (PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero),
        (PR_SET_SECCOMP, ctypes.c_ulong(FILTER), ctypes.c_void_p(ctypes.addressof(program))),
    ):
        if libc.prctl(option, first, second, zero, zero):
            raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    """Takes the limits as JSON in its argument. An error of the program is printed as one line, without traceback."""
    limits = json.loads(sys.argv[1])
    with open("program.py", "wb") as file:
        file.write(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if (user := limits.pop("user")) is not None:
        give_up_root(user)
    stay_in_group = limits.pop("stay_in_group")
    limit(**limits)
    refuse_system_calls(stay_in_group)
    sys.argv = ["program.py"]
    try:
        runpy.run_path("program.py", run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        sys.stdout.flush()
        lines = traceback.format_exception_only(error)
        print(lines[-1].strip(), file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    main()

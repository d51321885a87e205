"""Programs that want out: none gets there, and none keeps the evaluation waiting.

They need bubblewrap (Debian: apt-get install bubblewrap) and the right to use namespaces; without these they are
skipped, and it is tested that nothing is run.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
import toy

from slm_jax.errors import UserError
from slm_jax.evaluate.math import sandbox as sandbox_lib
from slm_jax.evaluate.math import sandbox_child
from slm_jax.evaluate.math.sandbox import TRUST, Ran, Sandbox

needs_sandbox = pytest.mark.skipif(
    sandbox_lib._problem() is not None, reason=f"{sandbox_lib._problem()}; CI installs the Debian package bubblewrap"
)
PATIENT = Sandbox(seconds=120)  # for what ends by itself: the machine may be busy


def run(program: str, sandbox: Sandbox = PATIENT) -> Ran:
    [ran] = sandbox.run_all([program])
    return ran


def processes_with(word: str) -> list[str]:
    """Command lines of living processes that hold the word."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:  # it has ended
            continue
    return [line for line in lines if word in line]


def gone(word: str) -> bool:
    """Whether, soon, no living process holds the word."""
    patience = time.monotonic() + 30
    while processes_with(word) and time.monotonic() < patience:
        time.sleep(0.05)
    return not processes_with(word)


@needs_sandbox
def test_what_programs_print_comes_back():
    programs = [
        "print(1 + 1)",
        "import sympy\nx = sympy.symbols('x')\nprint(sympy.solve(x**2 - 2, x))",
        "1 / 0",
        "def f(:",
        "raise SystemExit(3)",
        "open('a.txt', 'w').write('kept'); print(open('a.txt').read())",
        "import os; print(os.path.exists('a.txt'), os.listdir('.'))",
        "import sys; print('half'); sys.stdout.flush(); sys.exit('stopped')",
        "print('√π', end='')",
        "import os; os.write(1, b'\\xff\\x00')",
        "",
    ]
    ran = PATIENT.run_all(programs)
    assert [(one.shown(100), one.ended) for one in ran] == [
        ("2", "done"),
        ("[-sqrt(2), sqrt(2)]", "done"),
        ("ZeroDivisionError: division by zero", "error"),
        ("SyntaxError: invalid syntax", "error"),
        ("the program ended with code 3", "error"),
        ("kept", "done"),
        ("False ['program.py']", "done"),
        ("stopped", "error"),
        ("√π", "done"),
        ("\ufffd\0", "done"),
        ("", "done"),
    ]


def test_long_results_show_their_beginning_and_end():
    ran = Ran("a" * 500 + "b" * 500, "", "done")
    assert ran.shown(1000) == ran.output and ran.shown(10) == "aaaaa...bbbbb"
    assert Ran("printed", "ValueError: x\n", "error").shown(100) == "ValueError: x"


SLEEP = "import time; time.sleep(1000)"
ENDLESS = {
    "computes": ("while True: pass", "time"),
    "sleeps": (SLEEP, "time"),
    "has children": (f"import os\nos.fork()\nos.fork()\n{SLEEP}", "time"),
    "hears no signal": (
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
        "time",
    ),
    "forks": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "time"),
    "starts threads": (
        "import threading\nwhile True:\n    try: threading.Thread(target=threading.Event().wait).start()\n"
        "    except RuntimeError: pass",
        "time",
    ),
    "writes": ("while True: print('x' * 1000)", "output"),
    "writes errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
    "writes as a child": ("import os\nif not os.fork(): os.setsid()\nwhile True: os.write(1, b'x' * 9999)", "output"),
}


@needs_sandbox
@pytest.mark.parametrize("program", ENDLESS)
def test_what_does_not_end_is_ended(program):
    """With all its processes; a memory limit of its own marks them on their command line."""
    code, ended = ENDLESS[program]
    sandbox = Sandbox(seconds=3, memory_mb=1024 + os.getpid() % 1000)
    begin = time.monotonic()
    ran = run(code, sandbox)
    assert ran.ended == ended
    assert time.monotonic() - begin < 60
    assert len(ran.output) <= sandbox.output_characters and len(ran.error) <= sandbox.output_characters
    assert gone(f'"memory": {sandbox.memory_mb << 20},')


@needs_sandbox
def test_no_process_outlives_its_program():
    """Neither one that left the session, nor one whose program has ended well."""
    program = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv({python!r}, ["{mark}", "-c", "import time; time.sleep(1000)"])
    os._exit(0)
time.sleep(1)
print("done")
"""
    mark = "mark" + uuid.uuid4().hex
    assert run(program.format(python=sys.executable, mark=mark)).shown(100) == "done"
    assert gone(mark)


@needs_sandbox
def test_memory_ends():
    for program in (
        "x = bytearray(10**10)",
        "x = []\nwhile True: x.append(bytearray(10**7))",
        "print(len(str(9**9**9)))" if sys.version_info < (3, 11) else "x = [0] * 10**10",
        "x = 'a' * 10**10",
    ):
        ran = run(program)
        assert ran.ended == "error" and ran.error == "MemoryError", program
    assert run("x = bytearray(3 * 10**8)", Sandbox(120, memory_mb=200)).error == "MemoryError"


@needs_sandbox
def test_memory_of_all_processes_together_ends():
    """Eight processes of 300 MB each, which is little for one; what forked processes share counts once."""
    each = "import os, time\nfor _ in range(3): os.fork()\nx = bytearray(3 * 10**8); x[::4096] = bytes(len(x[::4096]))"
    assert run(f"{each}\ntime.sleep(100)").error == "MemoryError: its processes use more than 1024 MB together"
    shared = (
        "import os, time\nx = bytearray(3 * 10**8); x[::4096] = b'x' * len(x[::4096])\nfor _ in range(2): os.fork()"
    )
    assert run(f"{shared}\ntime.sleep(1)\nprint('done') if os.getpid() == 2 else None").ended == "done"


@needs_sandbox
def test_the_number_of_files_ends():
    program = "import os\nfor n in range(200_000): os.close(os.open(str(n), os.O_CREAT))\nprint('done')"
    assert run(program) == Ran("", "OSError: it has more than 10000 files", "error")
    assert run(program.replace("200_000", "5_000")).output == "done\n"


@needs_sandbox
def test_files_end_and_lie_in_the_scratch_folder_alone():
    sandbox = Sandbox(120, scratch_mb=4)
    one = run("with open('big', 'wb') as f:\n    for _ in range(100): f.write(bytes(10**6)); f.flush()", sandbox)
    assert one.ended == "error" and "File too large" in one.error
    many = "for n in range(100):\n    with open(f'{n}', 'wb') as f: f.write(bytes(10**6))"
    ran = run(many, sandbox)
    assert ran.ended == "error" and "No space left" in ran.error
    outside = Path(tempfile.gettempdir()) / f"slm_jax_{uuid.uuid4().hex}"
    home = Path.home() / outside.name
    package = Path(sandbox_lib.__file__).parent / outside.name
    for path in (outside, home, package, Path(sys.prefix) / outside.name, Path("/") / outside.name, Path("/dev/x")):
        ran = run(f"open({str(path)!r}, 'w').write('x')")
        assert ran.ended == "error" and "Error" in ran.error and not path.exists(), path
    for program in (
        f"import os; os.symlink({str(outside.parent)!r}, 'out'); open('out/{outside.name}', 'w').write('x')",
        f"import os; os.symlink('/', 'out'); open('out/{outside.name}', 'w').write('x')",
        f"open('../{outside.name}', 'w').write('x')",
        "import os; os.link('/usr/bin/env', 'env'); open('env', 'a').write('x')",
        "import os; os.mknod('disk', 0o60666, os.makedev(8, 0)); open('disk', 'rb').read(1)",
        "import os; os.chroot('.')",
    ):
        assert run(program).ended == "error", program
    assert not outside.exists()


@needs_sandbox
def test_nothing_of_the_outside_is_to_be_read(tmp_path, monkeypatch):
    secret = uuid.uuid4().hex
    (tmp_path / "secret.txt").write_text(secret)
    monkeypatch.setenv("SECRET_TOKEN", secret)
    home_file = Path.home() / f".slm_jax_{uuid.uuid4().hex}"
    home_file.write_text(secret)
    try:
        for program in (
            "import os; print(dict(os.environ))",
            "print(open('/proc/1/environ').read(), open('/proc/self/environ').read())",
            f"print(open({str(tmp_path / 'secret.txt')!r}).read())",
            f"print(open({str(home_file)!r}).read())",
            "import os; print(os.listdir(os.path.expanduser('~')))",
            f"import os; print(os.listdir({str(Path.home())!r}))",
            f"import os; print(os.listdir({tempfile.gettempdir()!r}))",
            "print(open('/etc/passwd').read())",
            "print(open('/etc/shadow').read())",
            "import glob; print(glob.glob('/*/.slm_jax_*') + glob.glob('/*/*/.slm_jax_*'))",
            "import os; print([os.readlink(f'/proc/self/fd/{n}') for n in range(64)])",
            "import os; print([os.fstat(n) for n in range(3, 64)])",
        ):
            ran = run(program)
            assert secret not in ran.output + ran.error, program
        assert run("import os; print(sorted(os.environ))").shown(200) == (
            "['LC_CTYPE', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PWD']"
        )
        assert run("import os; print(os.getuid() == 0, os.geteuid() == 0)").shown(100) == "False False"
    finally:
        home_file.unlink()


@needs_sandbox
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for program in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 5); print('reached')",
            "import socket; socket.socket(socket.AF_UNIX); print('reached')",
            "import socket; socket.socket(40, socket.SOCK_STREAM); print('reached')",  # vsock
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=5); print('reached')",
        ):
            ran = run(program)
            assert ran.ended == "error" and "reached" not in ran.output, program
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    # And where the call itself were allowed: the namespace has no interface but its own loopback.
    assert run("import os; print(os.listdir('/sys/class/net'))").ended == "error"


@needs_sandbox
def test_others_cannot_be_killed():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        program = f"""
import os, signal
for pid in ({os.getpid()}, {child.pid}, os.getppid(), 1):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
print("here")
"""
        ran = run(program)
        assert ran.shown(100) == "here" and child.poll() is None
        ran = run("import os, signal\nos.kill(-1, signal.SIGKILL)\nprint('here')")
        assert ran.ended in ("done", "error") and child.poll() is None
        run("import os, signal; os.killpg(0, signal.SIGKILL)")
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


@needs_sandbox
def test_input_is_at_its_end():
    for program in (
        "input()",
        "import sys\nfor line in sys.stdin: print(line)\nraise EOFError",
        "open(0).read(); raise EOFError",
    ):
        ran = run(program)
        assert ran.ended == "error" and ran.error.startswith("EOFError") and not ran.output


@needs_sandbox
@pytest.mark.parametrize(
    "call",
    [
        "unshare(0x10000000)",
        "unshare(0x00020000)",
        "mount(b'x', b'/scratch', b'tmpfs', 0, 0)",
        "syscall({memfd_create}, b'x', 0)",
        "syscall({shmget}, 0, 1 << 20, 0o1600)",
        "syscall({msgget}, 0, 0o1600)",
        "syscall({semget}, 0, 1, 0o1600)",
        "syscall({memfd_secret}, 0)",
        "syscall({keyctl}, 0, 0)",
        "syscall({bpf}, 0, 0, 0)",
        "syscall({io_uring_setup}, 1, 0)",
        "syscall({clone}, 0x10000011, 0, 0, 0, 0)",
        "ptrace(0, 0, 0, 0)",
        "setuid(0)",
        "setgroups(0, 0)",
    ],
)
def test_the_kernel_refuses(call):
    import platform

    machine = list(sandbox_child.MACHINES).index(platform.machine())
    numbers = {name: of[machine] for name, of in sandbox_child.REFUSED.items()} | {
        "clone": sandbox_child.CLONE[machine]
    }
    ran = run(
        "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"print(libc.{call.format(**numbers)}, errno.errorcode[ctypes.get_errno()])"
    )
    assert ran.shown(100) == "-1 EPERM"


@needs_sandbox
def test_programs_do_not_take_each_others_processes():
    """The limit counts by program, also where all run as one user."""
    bomb = "import os, time\nfor _ in range(100):\n    try: os.fork()\n    except OSError: pass\ntime.sleep(4)"
    modest = "import threading, time\nt = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
    ran = Sandbox(seconds=20).run_all([bomb, f"{modest}time.sleep(2)", modest])
    assert [one.shown(100) for one in ran[1:]] == ["thread", "thread"]


def test_a_program_that_is_too_long_is_not_run():
    if sandbox_lib._problem() is None:
        assert "too long" in run("#" * 100_000).error


def test_without_a_sandbox_nothing_runs(monkeypatch, tmp_path):
    target = tmp_path / "touched"
    monkeypatch.setattr(sandbox_lib, "_problem", lambda: "bubblewrap (bwrap) is not installed")
    program = f"open({str(target)!r}, 'w').write('x')"
    for call in (Sandbox().check, lambda: Sandbox().run_all([program])):
        line = toy.refused("sandbox-not-working", call)
        assert "bubblewrap (bwrap) is not installed" in line
        assert TRUST in line and "apt-get install bubblewrap" in line
    assert not target.exists()
    for trust in ("yes", "true", TRUST.lower()):
        assert f"Sandbox.trust is {trust!r}" in toy.refused("setting-unknown-value", Sandbox, trust=trust)
    trusted = Sandbox(seconds=60, trust=TRUST)
    assert trusted.check().startswith("without a sandbox, only with limits, as Sandbox.trust accepts (bubblewrap")
    assert run(program, trusted).ended == "done"
    # In a folder that is gone afterwards, without the environment, and within the limits.
    monkeypatch.setenv("SECRET_TOKEN", "x")
    where, names = run("import os; print(os.getcwd(), sorted(os.environ))", trusted).shown(500).split(" ", 1)
    assert not Path(where).exists() and "SECRET_TOKEN" not in names
    assert run("x = bytearray(10**10)", trusted).error == "MemoryError"
    assert run("import socket; socket.socket()", trusted).error.startswith("PermissionError")
    assert run("while True: pass", Sandbox(seconds=2, trust=TRUST)).ended == "time"


def test_without_a_sandbox_no_daemon_outlives_its_program(monkeypatch):
    monkeypatch.setattr(sandbox_lib, "_problem", lambda: "bubblewrap (bwrap) is not installed")
    mark = "mark" + uuid.uuid4().hex
    program = f"""
import os, time
if os.fork() == 0:
    for leave in (os.setsid, lambda: os.setpgid(0, 0)):
        try:
            leave()
            print("left its group", flush=True)
        except PermissionError:
            pass
    if os.fork() == 0:
        os.closerange(0, 3)
        os.execv({sys.executable!r}, ["{mark}", "-c", "import time; time.sleep(1000)", "{mark}"])
    os._exit(0)
time.sleep(1)
print("done")
"""
    assert run(program, Sandbox(seconds=60, trust=TRUST)).shown(100) == "done"
    assert gone(mark)


def test_a_bubblewrap_that_does_not_work_is_found_out(monkeypatch, tmp_path):
    """One that runs the program without isolating it, and one that fails."""
    monkeypatch.setattr(sandbox_lib.shutil, "which", lambda name: str(tmp_path / "bwrap"))
    probe = sandbox_lib._problem.__wrapped__
    for script, message in (
        (
            "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n",
            "bubblewrap fails: bwrap: No perm",
        ),
        ("#!/bin/sh\necho can write to /\n", "bubblewrap does not work here (a program in it can write to /)"),
        ("#!/bin/sh\ncat >/dev/null\n", "bubblewrap fails: it ended: done"),
    ):
        (tmp_path / "bwrap").write_text(script)
        (tmp_path / "bwrap").chmod(0o755)
        assert (probe() or "").startswith(message)


def test_settings_that_cannot_be_are_one_line():
    for name in ("processes", "seconds"):
        assert f"Sandbox.{name} is 0" in toy.refused("setting-out-of-range", Sandbox, **{name: 0})
    with pytest.raises(UserError):
        Sandbox(trust="")

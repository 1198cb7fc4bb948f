"""The inside of the sandbox: gives up rights, then runs one program. Started by ``sandbox.py``; standard library only.

Reads a JSON request from standard input and writes lines to the pipe it names: first the protections in force as a JSON
list, then the token if the program came to its end, or its error.
"""

import builtins
import ctypes
import json
import os
import resource
import signal
import struct
import sys

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC, CLONE_NEWPID = 0x10000000, 0x40000000, 0x08000000, 0x20000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
# Landlock (linux/landlock.h); its system calls have the same numbers on every architecture
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
RULE_PATH_BENEATH, CREATE_RULESET_VERSION = 1, 1
READ_FILE, READ_DIR = 1 << 2, 1 << 3
RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # number of file rights that each version knows
FILE_RIGHTS = (1 << 0) | (1 << 1) | READ_FILE | (1 << 14) | (1 << 15)  # those that a rule for a single file may name


def set_limits(limits):
    """Kernel limits by name; True if no further process can be started (root is exempt from that limit)."""
    for name, value in limits.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        _, hard = resource.getrlimit(kind)
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (bound, bound))
        except (OSError, ValueError):  # macOS refuses some; the wall clock and the others hold
            if name == "RLIMIT_NPROC":
                return False
    return os.getuid() != 0


def separate(libc):
    """Names of the namespaces this process now has for itself; a user namespace gives the right to the others."""
    for user in (0, CLONE_NEWUSER):
        if libc.unshare(user | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWPID) == 0:
            enter_process_namespace(libc)
            return ["network namespace", "process namespace"]
    return []


def enter_process_namespace(libc):
    """Goes on in a child, the first process of the namespace: when it ends, so does everything it has started."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(code)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def restrict_files(libc, folder, readable):
    """Landlock rules: everything in ``folder``, reading in ``readable``, nothing else; no TCP where that is known."""
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), CREATE_RULESET_VERSION)
    if version < 1:
        return False
    rights = (1 << RIGHTS_BY_VERSION.get(version, 16)) - 1
    network = 3 if version >= 4 else 0  # bind and connect
    attributes = struct.pack("<QQ", rights, network) if version >= 4 else struct.pack("<Q", rights)
    ruleset = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    rules = [(folder, rights & ~1)] + [(path, READ_FILE | READ_DIR) for path in readable]  # bit 0: execute
    for path, allowed in rules:
        try:
            parent = os.open(path, os.O_PATH)
        except OSError:
            continue
        if not os.path.isdir(path):
            allowed &= FILE_RIGHTS
        rule = struct.pack("<Qi", allowed, parent)
        added = libc.syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, rule, 0)
        os.close(parent)
        if added != 0:
            os.close(ruleset)
            return False
    done = libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 and libc.syscall(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done


def hook(folder, readable):
    """An audit hook that refuses what programs under test have no use for."""
    forbidden = ("socket.", "subprocess.", "ctypes.", "shutil.", "pty.", "syslog.", "webbrowser.", "urllib.", "ftplib.",
                 "http.client", "smtplib.", "resource.", "signal.pthread_kill")  # fmt: skip
    exact = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill", "os.killpg",
             "os.putenv", "os.unsetenv", "sys.addaudithook", "os.link", "os.symlink"}  # fmt: skip
    changes = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.truncate", "os.utime",
               "os.setxattr", "os.removexattr"}  # fmt: skip
    reads = {"os.listdir", "os.scandir", "os.chdir", "os.listxattr", "os.getxattr"}
    inside = os.path.realpath(folder)
    allowed_reads = [os.path.realpath(path) for path in readable]
    realpath, separator = os.path.realpath, os.sep

    def within(path, folders):
        if isinstance(path, int):
            return path > 2  # a file that is open already
        resolved = realpath(os.fsdecode(path))
        return any(resolved == place or resolved.startswith(place + separator) for place in folders)

    def refuse(event, arguments):
        if event in exact or event.startswith(forbidden):
            raise PermissionError(f"{event} is not allowed in the sandbox")
        if event == "open":
            path, mode, flags = arguments
            writes = any(letter in (mode or "") for letter in "wxa+") or (flags or 0) & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            )
            if path is not None and not within(path, [inside] if writes else [inside, *allowed_reads]):
                raise PermissionError(f"{path!r} is outside the sandbox")
        elif event in changes or event in reads:
            places = [inside] if event in changes else [inside, *allowed_reads]
            if not all(within(path, places) for path in paths_of(arguments)):
                raise PermissionError(f"{event} is not allowed outside the sandbox")

    def paths_of(arguments):
        return [argument for argument in arguments if isinstance(argument, str | bytes | os.PathLike)]

    return refuse


def main():
    request = json.loads(sys.stdin.buffer.read())
    report = os.fdopen(request["report"], "w", buffering=1)
    folder, readable, token = request["folder"], request["readable"], request["token"]
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
    in_force = separate(libc) if libc is not None else []
    if libc is not None and restrict_files(libc, folder, readable):
        in_force.append("landlock")
    if set_limits(request["limits"]):
        in_force.append("process limit")
    if request["hook"]:
        in_force.append("audit hook")
    sys.stdin.close()
    program = compile_or_report(request["source"], report, in_force)
    if program is None:
        return
    if request["hook"]:
        sys.addaudithook(hook(folder, readable))
    namespace = {"__name__": "__main__", "__builtins__": builtins}
    try:
        exec(program, namespace)
    except BaseException as error:  # SystemExit included: a program that leaves has not come to its end
        report.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
    else:
        report.write(f"{token}\n")
    report.flush()
    os._exit(0)  # at once: threads and exit handlers of the program have no say


def compile_or_report(source, report, in_force):
    """The compiled program, after reporting the protections; None if it does not compile."""
    report.write(json.dumps(in_force) + "\n")
    try:
        return compile(source, "<program>", "exec")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        report.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
        return None


main()

#!/usr/bin/env python3
"""Chromium that does not hear of changes of the host's networks: it becomes `$CHROMIUM`, or `chromium`.

When an address appears anywhere on the host, Chromium gives up whatever it is loading (`ERR_NETWORK_CHANGED`), and
tests that make containers at the same time make addresses all the while. It learns of them by a netlink socket; a
seccomp filter refuses it one, and it then takes the network for unchanging.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_NO_NEW_PRIVS = 22, 2, 38
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 97  # EAFNOSUPPORT
AF_NETLINK = 16
# Of each machine: its name for audit, and its number of the call `socket`.
MACHINES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}


class Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def refuse_netlink() -> None:
    """For this process and all that it becomes or starts; nothing where the machine is not known."""
    if platform.machine() not in MACHINES:
        return
    architecture, socket = MACHINES[platform.machine()]
    instructions = (
        (LOAD, 0, 0, 4),
        (JUMP_IF_EQUAL, 0, 5, architecture),
        (LOAD, 0, 0, 0),
        (JUMP_IF_EQUAL, 0, 3, socket),
        (LOAD, 0, 0, 16),
        (JUMP_IF_EQUAL, 0, 1, AF_NETLINK),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
    )
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(Program(len(instructions), code)), 0, 0)


if __name__ == "__main__":
    refuse_netlink()
    os.execvp(os.environ.get("CHROMIUM", "chromium"), ["chromium", *sys.argv[1:]])

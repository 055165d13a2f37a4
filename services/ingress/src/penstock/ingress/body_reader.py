"""The helper of one worker that reads large bodies: `python -m penstock.ingress.body_reader`, started by
`adapters/body_helper.py` with one end of a pair of sockets as its standard input.

Sync, one body at a time. It ends when the other end of the pair is closed, by whatever the worker's end was.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket

import msgspec

from penstock.common.messages import MAX_BLOCKS
from penstock.ingress.large_bodies import Setup, Task, Tokenizer, read
from penstock.ingress.tokenizer_paths import tokenizer_folders

SIZE_BYTES = 4
# The loop of the worker goes first where both share a core.
NICE = 10
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Answer until the worker hangs up."""
    # A signal to the whole group asks the worker to drain; until it has, it needs its helper.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(NICE)
    libc = _libc()
    with socket.socket(fileno=0) as sock, contextlib.suppress(EOFError, OSError):
        setup = msgspec.msgpack.decode(_frame(sock), type=Setup)
        tokenizer = tokenizer_of(setup)
        while True:
            task = msgspec.msgpack.decode(_frame(sock), type=Task)
            answer = msgspec.msgpack.encode(read(task, _exactly(sock, task.size), setup, tokenizer))
            sock.sendall(len(answer).to_bytes(SIZE_BYTES, "big") + answer)
            # Of what a body took, the allocator would keep several times its size for the next one.
            if libc is not None:
                libc.malloc_trim(0)
    return 0


def tokenizer_of(setup: Setup) -> Tokenizer | None:
    """What --tokenizer-path names, None if it names nothing. Raises TokenizerError."""
    if not setup.tokenizer_path:
        return None
    # Neither the package nor a vocabulary is loaded where none is used.
    from penstock.ingress.adapters.tokenizer import Tokenizers

    return Tokenizers(tokenizer_folders(setup.tokenizer_path), MAX_BLOCKS * setup.token_block_size)


def _libc() -> ctypes.CDLL | None:
    """glibc, None where the C library is another one. Lets the kernel end this process with its worker, even
    while it is frozen and does not see the pair closed."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return None
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return libc


def _frame(sock: socket.socket) -> bytearray:
    return _exactly(sock, int.from_bytes(_exactly(sock, SIZE_BYTES), "big"))


def _exactly(sock: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = sock.recv_into(view)
        if not count:
            raise EOFError("the worker has hung up")
        view = view[count:]
    return data


if __name__ == "__main__":
    raise SystemExit(main())

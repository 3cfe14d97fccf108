"""A shell in which `python` and `torchrun` start at once, as they are forks of a Python that has loaded torch already.

    python tests/command_shell.py FD

is that Python. FD is a listening socket. Each of its connections brings a command as JSON, with standard input, output
and error, and is answered with the exit code. Nothing of the project is loaded, so a command takes the modules beside
its script. The program ends when its own standard input does.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import safetensors.torch  # noqa: F401
import tiktoken  # noqa: F401
import torch
import torch._dynamo
import torch.utils.collect_env
from torch.distributed.run import get_args_parser

# `python` and `torchrun` of the shell. LESS has arguments that make a command smaller, by a word that is in it.
CLIENT = """#!{python} -S
import json, os, socket, sys
arguments, less = sys.argv[1:], {less}
arguments += [argument for word in less if word in arguments for argument in less[word]]
command = {{"program": os.path.basename(sys.argv[0]), "arguments": arguments, "folder": os.getcwd()}}
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    socket.send_fds(connection, [json.dumps(command | {{"environment": dict(os.environ)}}).encode()], [0, 1, 2])
    sys.exit(int(connection.recv(100)))
"""


@contextlib.contextmanager
def shell(
    folder: Path, less: dict[str, list[str]], programs: dict[str, str], links: list[str], settings: dict[str, str]
) -> Iterator[Callable[[str, Path], tuple[int, str]]]:
    """run(script, where) runs a script in bash, up to the first command that fails, and returns the exit code and all
    that was printed. Its programs are `python`, `torchrun`, those given as text, and links to some of the system's; it
    has no others. `settings` are environment variables.
    """
    address = str(folder / "socket")
    client = CLIENT.format(python=sys.executable, less=less, address=address)
    for name, text in {"python": client, "torchrun": client, **programs}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for name in links:
        (folder / name).symlink_to(shutil.which(name))
    settings = settings | {"PATH": str(folder)}

    def run(script: str, where: Path) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-exc", script], stdin=subprocess.DEVNULL, cwd=where, env=os.environ | settings, timeout=300,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        command = [sys.executable, __file__, str(listener.fileno())]
        with subprocess.Popen(
            command, env=os.environ | settings, pass_fds=[listener.fileno()], start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as server:  # fmt: skip
            try:
                yield run
            finally:
                os.killpg(server.pid, signal.SIGKILL)  # with a command that hangs


def execute(program: str, arguments: list[str]) -> None:
    """What `python` does, or `torchrun` with one process."""
    if program == "torchrun":
        options = get_args_parser().parse_args(arguments)
        arguments = [options.training_script, *options.training_script_args]
    if arguments[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = os.path.dirname(os.path.abspath(arguments[0])), arguments
        runpy.run_path(arguments[0], run_name="__main__")


def serve(listener: socket.socket) -> None:
    torch.set_num_threads(1)  # as in tests/conftest.py
    gc.freeze()  # a collection in a fork need not touch, and so copy, what is here already
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        message, streams, _, _ = socket.recv_fds(connection, 2**20, 3)
        if not (child := os.fork()):
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            command = json.loads(message)
            os.chdir(command["folder"])
            os.environ.clear()
            os.environ.update(command["environment"])
            return execute(command["program"], command["arguments"])  # what it raises is the process's end
        for stream in streams:
            os.close(stream)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(str(code).encode())
        connection.close()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

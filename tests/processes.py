"""Processes of their own, as a person or a job would start them; forked, hence soon there."""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.forks import fork_server
from tests.waiting import PATIENCE_S


def run_python(
    *arguments: str, environment: Mapping[str, str], check: bool = True
) -> subprocess.CompletedProcess[str]:
    """`python` with these arguments has ended; `environment` comes on top of this process's."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        process = fork_server().Process(
            target=_main,
            args=(arguments, {**own, **environment}, str(Path.cwd()), list(map(str, outputs))),
        )
        process.start()
        process.join(PATIENCE_S)
        is_late = process.exitcode is None
        process.kill()
        process.join()
        stdout, stderr = (path.read_text() for path in outputs)
    assert not is_late, f"{arguments} did not end within {PATIENCE_S} s\n{stdout}\n{stderr}"
    assert process.exitcode is not None, "it has ended"
    done = subprocess.CompletedProcess(arguments, process.exitcode, stdout, stderr)
    if check:
        assert done.returncode == 0, f"{arguments}: {done.returncode}\n{stdout}\n{stderr}"
    return done


def _main(
    arguments: Sequence[str], environment: Mapping[str, str], folder: str, outputs: Sequence[str]
) -> None:
    for number, path in enumerate(outputs, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    match arguments:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case [path, *rest]:
            sys.argv = [path, *rest]
            runpy.run_path(path, run_name="__main__")

"""Serves measurements, each in a process of its own; runs in either environment."""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def status_mib(field: str) -> float:
    """Return a line of /proc/self/status, such as VmHWM, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def measured(call: Callable[[], Any]) -> dict[str, float]:
    """Return the CPU seconds of all threads and by how many MiB the peak of resident memory exceeds what was there."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    resident = status_mib("VmRSS")
    began = time.process_time()
    call()
    return {"cpu_s": time.process_time() - began, "extra_mib": status_mib("VmHWM") - resident}


def serve(result_of: Callable[[Any], Any]) -> None:
    """Answer each line of stdin with a line of stdout, both JSON, from a fork of this process.

    The modules that the command line names are imported before, so that no measurement pays for them.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(json.dumps(result_of(json.loads(line))), file=answers, flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1] != 0:
            sys.exit(1)

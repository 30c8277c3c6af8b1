"""The process behind `rewards.pool`: reads one request a line, grades it, writes one reply a line, both JSON.

Started as `python -m rewards.pool_worker CHECKER DEADLINE_S MEMORY_BYTES`. It imports what its checker imports and
nothing else, and it never outlives its pool for long: idle, it ends when its standard input does; busy, when the CPU
seconds of the item are used up.
"""

import importlib
import json
import math
import os
import resource
import sys
import time
from dataclasses import asdict
from typing import cast

from rewards.grade import Checker, graded

READY = b"ready\n"
"""The first line of every worker: its checker is imported and requests are read."""


def main() -> None:
    """Serve requests until standard input ends."""
    checker_name, deadline_s, memory_bytes = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    _lower_limit(resource.RLIMIT_AS, memory_bytes)
    _lower_limit(resource.RLIMIT_CORE, 0)
    # What the checker's libraries print must not be taken for a reply.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    module, _, function = checker_name.partition(":")
    checker = cast(Checker, getattr(importlib.import_module(module), function))
    replies.write(READY)
    replies.flush()
    for request in sys.stdin.buffer:
        _lower_limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + deadline_s) + 1)
        text, reference = json.loads(request)
        grade = graded(checker, text, reference)
        replies.write(json.dumps(asdict(grade)).encode("ascii") + b"\n")
        replies.flush()


def _lower_limit(kind: int, value: int) -> None:
    """Set the soft limit, which is what the kernel enforces, as far as the hard limit allows."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    main()

"""A checker for worker processes that does what the completion says, to see what the pool makes of it."""

import os
import subprocess
import sys
import time

from rewards.grade import CORRECT, Grade, Status, no_reward


def check(text: str, reference: str) -> Grade:
    """Sleep, spin, die, eat memory, raise, print or tell the imported modules; else compare with the reference."""
    match text:
        case "sleep":
            time.sleep(60)
        case "spin":
            while True:
                pass
        case "one long C call":
            return no_reward(Status.WRONG, str(len(str(9**9**9))))
        case "leave a child":
            subprocess.Popen(["sleep", reference])
            time.sleep(60)
        case "exit":
            os._exit(3)
        case "eat memory":
            bytearray(2**40)
        case "raise":
            raise LookupError("caf\u00e9 \ud800" * 1000)
        case "print":
            print("this is not a reply")
            os.write(1, b"nor is this\n")
        case "modules":
            return no_reward(Status.WRONG, " ".join(name for name in sys.modules if "." not in name))
    return CORRECT if text == reference else no_reward(Status.WRONG, f"process {os.getpid()}")

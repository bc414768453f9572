"""``python -m tests.model.peak FOLDER OPTIONS``: the memory that loading a checkpoint takes at most, as JSON.

``OPTIONS``: JSON of `model.weights.checkpoint.load`'s. Peaks are beyond what the process has before: ``resident`` of
all its memory, as Linux records it (VmHWM), pages of the mapped files included; ``anonymous`` of what is no file's, as
seen every few milliseconds.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import transformers.models.inkling.modeling_inkling  # noqa: F401, imported on the way otherwise

from model.weights import checkpoint


def status(field: str) -> int:
    """Bytes of a field of this process' status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def main() -> None:
    done, anonymous = threading.Event(), [status("RssAnon")]

    def watch() -> None:
        while not done.wait(0.002):
            anonymous.append(max(anonymous[-1], status("RssAnon")))

    resident, thread = status("VmRSS"), threading.Thread(target=watch)
    thread.start()
    model = checkpoint.load(sys.argv[1], **json.loads(sys.argv[2]))
    done.set()
    thread.join()
    result = {"resident": status("VmHWM") - resident, "anonymous": max(anonymous) - anonymous[0]}
    print(json.dumps(result | {"digest": checkpoint.weights_digest(model)}))


if __name__ == "__main__":
    main()

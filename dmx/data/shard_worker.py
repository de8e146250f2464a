"""A worker process of shard_pool: makes the shards asked for on stdin until its parent is gone."""

from __future__ import annotations

import json
import os
import sys
import traceback

from dmx.data.shards import load_maker, pack
from dmx.errors import DmxError


def main() -> None:
    """Answer requests, one JSON line each: [maker, start, stop, arguments]."""
    # Answers have the real stdout for themselves; whatever a library writes goes to stderr.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin.buffer:
        maker, start, stop, arguments = json.loads(line)
        try:
            status, payload = b"o", pack(load_maker(maker)(start, stop, **arguments))
        except DmxError as error:
            status, payload = b"e", json.dumps([type(error).__name__, str(error)]).encode()
        except Exception:
            status, payload = b"e", json.dumps(["", traceback.format_exc()]).encode()
        try:
            answers.write(status + len(payload).to_bytes(8, "little") + payload)
            answers.flush()
        except BrokenPipeError:  # the parent is gone
            os._exit(1)


if __name__ == "__main__":
    main()

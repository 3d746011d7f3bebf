"""A small program in the place of `serving.main`: its options, its ports, its manners, no model.

It imports nothing of ours and starts in a tenth of a second. A test tells it what to do by putting
JSON to its public port, or, for what it shall do from its start on, into `stand-in.json` beside the
entitlements file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import secrets
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

state: dict[str, Any] = {
    "exit": None,
    "ready_after_s": 0.0,
    "silent": False,
    "deaf": False,
    "drain_s": 0.0,
    "last_tokens": 0,
    "output_tokens": 0,
    "tokens_per_look": 0,
    "in_flight": 0,
    "capacity": None,
}
"""`silent`: the stats port answers no more; `deaf`: SIGTERM has no effect; `last_tokens` are of the drain."""

started_at = time.monotonic()
boot_id = secrets.token_hex(4)
sequence = 0
draining = threading.Event()


class Quiet(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


class Stats(Quiet):
    def do_GET(self) -> None:
        while state["silent"]:
            time.sleep(0.05)
        if self.path == "/readyz":
            ready = time.monotonic() - started_at >= state["ready_after_s"] and not draining.is_set()
            said = "ok" if ready else "draining" if draining.is_set() else "starting"
            self.answer(200 if ready else 503, said + "\n")
        else:
            self.answer(200, json.dumps(report()))


class Public(Quiet):
    def do_GET(self) -> None:
        self.answer(200, json.dumps({"looks": sequence, "argv": sys.argv, "env": dict(os.environ)}))

    def do_PUT(self) -> None:
        state.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer(200, "ok")
        if state["exit"] is not None:
            print("the engine has died", flush=True)
            os._exit(state["exit"])


def report() -> dict[str, Any]:
    global sequence  # noqa: PLW0603
    sequence += 1
    state["output_tokens"] += state["tokens_per_look"]
    seat = {
        "pledge_id": "a",
        **dict.fromkeys(("rejected", "evicted", "canceled", "cached_tokens", "queued"), 0),
        **{"dispatched": 1, "input_tokens": 5},
        **{"output_tokens": state["output_tokens"], "in_flight": state["in_flight"]},
        **{"owed_tokens": 1.5, "shortfall_tokens": 0.0, "attainment_60s": None},
    }
    return {
        "version": 1,
        "boot_id": boot_id,
        "sequence": sequence,
        "at": datetime.datetime.now(datetime.UTC).isoformat(),
        "entitlements_revision": json.loads(options.entitlements.read_text())["revision"],
        "seats": [seat],
        "capacity": state["capacity"],
    }


def drain(*_: object) -> None:
    if state["deaf"]:
        return
    draining.set()

    def finish() -> None:
        time.sleep(state["drain_s"] / 2)
        state["output_tokens"] += state["last_tokens"]
        time.sleep(state["drain_s"] / 2)
        os._exit(0)

    threading.Thread(target=finish).start()


parser = argparse.ArgumentParser()
for name in ("--model", "--served-model-name", "--host", "--drain-s"):
    parser.add_argument(name, required=True)
parser.add_argument("--port", required=True, type=int)
parser.add_argument("--stats-port", required=True, type=int)
parser.add_argument("--entitlements", required=True, type=Path)
parser.add_argument("flags", nargs="*")
options = parser.parse_args()

plan = options.entitlements.with_name("stand-in.json")
if plan.exists():
    state.update(json.loads(plan.read_text()))
print(f"loading {options.model}", flush=True)
if state["exit"] is not None:
    print("out of GPU memory", flush=True)
    sys.exit(state["exit"])
signal.signal(signal.SIGTERM, drain)
ThreadingHTTPServer.allow_reuse_address = True
public = ThreadingHTTPServer((options.host, options.port), Public)
stats = ThreadingHTTPServer(("127.0.0.1", options.stats_port), Stats)
threading.Thread(target=stats.serve_forever).start()
public.serve_forever()

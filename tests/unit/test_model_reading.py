"""Threads that come upon a type at the same time: none of them may find it half learned."""

from __future__ import annotations

import subprocess
import sys

#: msgspec itself dies of this more often than not.
SCRIPT = """
import sys, threading
sys.setswitchinterval(1e-6)
from limosa.model import reading
from limosa.wire import api

data = (
    b'{"migrations":[{"id":"abcdefabcdef","vm":"vm","source":"a","destination":"b","side":"source","transport":"tcp",'
    b'"phase":"copy","outcome":"under-way","progress":{},"accepted_at":0.0}]}'
)
begin = threading.Barrier(4)
read = []

def work():
    begin.wait()
    read.append(reading.decode(data, api.MigrationList))

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(read) == 4 and len({len(one.migrations) for one in read}) == 1
"""


def test_types_are_learned_one_after_another() -> None:
    for _ in range(8):
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

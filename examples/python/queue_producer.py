"""Puts items into the queue of queue.toml, and waits until all are consumed. It needs no package.

put() returns when the item is on disk. It makes the id of the job, so it can be sent again after a lost
connection: the item is stored once."""

import json
import socket
import struct
import sys
import uuid


class Queue:
    def __init__(self, method, host="127.0.0.1", port=8080):
        self.method = method
        self.address = (host, port)
        self.stream = None

    def put(self, item):
        params = {"method": self.method, "params": item, "id": str(uuid.uuid4())}
        return self._call("rpc.job.enqueue", params)["job"]

    def join(self, job):
        while True:
            record = self._call("rpc.job.wait", {"job": job})
            if record["ended"]:
                return record

    def _call(self, method, params, tries=5):
        body = json.dumps({"in": method, "params": params}).encode()
        for left in reversed(range(tries)):
            try:
                if self.stream is None:
                    self.stream = socket.create_connection(self.address).makefile("rwb")
                self.stream.write(struct.pack("<I", len(body)) + body)
                self.stream.flush()
                length, = struct.unpack("<I", self.stream.read(4))
                answer = json.loads(self.stream.read(length))
            except (OSError, struct.error):
                self.stream = None
                if left == 0:
                    raise
                continue
            if answer["out"] == "error":
                raise RuntimeError(answer["result"]["message"])
            return answer["result"]


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8080
    queue = Queue("letters", port=port)
    jobs = [queue.put("letter %d" % number) for number in range(20)]
    print(sum(queue.join(job)["state"] == "done" for job in jobs), "letters were read")

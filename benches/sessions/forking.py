"""A server that forks for each connection, of Python's standard library. It answers ping in frames."""

import json
import socketserver
import struct
import sys


class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        while True:
            head = self.request.recv(4)
            if not head:
                return
            (length,) = struct.unpack("<I", head)
            call = json.loads(self.request.recv(length))
            body = json.dumps({"out": "pong", "result": call.get("params")}).encode()
            self.request.sendall(struct.pack("<I", len(body)) + body)


class Server(socketserver.ForkingTCPServer):
    allow_reuse_address = True
    request_queue_size = 128


host, port = sys.argv[1].rsplit(":", 1)
Server((host, int(port)), Handler).serve_forever()

"""A pool program without the helper preforkd.py: a plain socket loop on descriptor 3.

It runs in Python 2 and in Python 3.
"""

import json
import socket
import struct


def receive(connection, length):
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def handle(connection):
    while True:
        length, = struct.unpack("<I", receive(connection, 4))
        call = json.loads(receive(connection, length).decode("utf-8"))
        if call["in"] == "plain.reverse":
            answer = {"out": call["in"], "result": call["params"][::-1]}
        else:
            answer = {"out": "error", "result": {"code": 1, "message": "no such method"}}
        body = json.dumps(answer).encode("utf-8")
        connection.sendall(struct.pack("<I", len(body)) + body)


try:
    handle(socket.fromfd(3, socket.AF_UNIX, socket.SOCK_STREAM))
except EOFError:
    pass

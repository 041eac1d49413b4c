"""Methods in Python for a pool of preforkd: one file, nothing to install.

Put it beside your program, and write

    from preforkd import method, serve

    @method
    def add(a, b):
        return a + b

    serve()

A list of params becomes positional arguments, an object keyword arguments, null none, and any
other value the only one. What a function returns is the result. Raise Error(code, message, data)
for an error of your own; any other exception is answered too, with its traceback on stderr, which
goes to preforkd's log. Calls come one at a time; more at once is `processes` in the configuration.
"""

import inspect
import json
import socket
import struct
import sys
import traceback

__all__ = ["Error", "method", "serve"]

INVALID_PARAMS = -32602
METHOD_NOT_FOUND = -32601
INTERNAL = -32603

_methods = {}


class Error(Exception):
    """An error for the caller: a code of your own, a sentence, and whatever else it should have."""

    def __init__(self, code, message, data=None):
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data


def method(name=None):
    """Makes a function a method: `@method`, or `@method("a.name")` where its own will not do."""

    def register(function, name=None):
        _methods[name or function.__name__] = (function, inspect.signature(function))
        return function

    if callable(name):
        return register(name)
    return lambda function: register(function, name)


def serve(fd=3):
    """Answers calls until the worker closes its end."""
    calls = socket.socket(fileno=fd)
    _send(calls, {"out": "ready"})  # for `ready = "message"`; harmless without
    while True:
        body = _receive(calls)
        if body is None:
            return
        call = json.loads(body)
        _send(calls, _answer(call["in"], call["params"]))


def _answer(name, params):
    try:
        if name not in _methods:
            raise Error(METHOD_NOT_FOUND, "this program has no method %r" % name)
        function, signature = _methods[name]
        args, kwargs = [], {}
        if isinstance(params, list):
            args = params
        elif isinstance(params, dict):
            kwargs = params
        elif params is not None:
            args = [params]
        try:
            signature.bind(*args, **kwargs)
        except TypeError as problem:
            raise Error(INVALID_PARAMS, "%s%s: %s" % (name, signature, problem)) from None
        return {"out": name, "result": function(*args, **kwargs)}
    except Error as error:
        result = {"code": error.code, "message": error.message}
        if error.data is not None:
            result["data"] = error.data
        return {"out": "error", "result": result}
    except Exception as problem:
        traceback.print_exc()
        sys.stderr.flush()
        text = "%s: %s" % (type(problem).__name__, problem)
        return {"out": "error", "result": {"code": INTERNAL, "message": text}}


def _receive(calls):
    """The body of the next frame, or None at the end."""
    header = _receive_all(calls, 4)
    if header is None:
        return None
    (length,) = struct.unpack("<I", header)
    return _receive_all(calls, length)


def _receive_all(calls, length):
    # Most frames come whole. A larger one than the socket holds comes in pieces.
    data = calls.recv(length) if length else b""
    if len(data) == length:
        return data
    pieces = bytearray(data)
    while len(pieces) < length:
        piece = calls.recv(min(length - len(pieces), 1 << 20))
        if not piece:
            return None
        pieces += piece
    return bytes(pieces)


def _send(calls, answer):
    try:
        body = json.dumps(answer)
    except (TypeError, ValueError) as problem:
        text = "the result can't be written as JSON: %s" % problem
        body = json.dumps({"out": "error", "result": {"code": INTERNAL, "message": text}})
    body = body.encode()
    calls.sendall(struct.pack("<I", len(body)) + body)

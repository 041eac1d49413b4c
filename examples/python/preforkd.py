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

import json
import socket
import sys
import traceback

__all__ = ["Error", "method", "serve"]

INVALID_PARAMS = -32602
METHOD_NOT_FOUND = -32601
INTERNAL = -32603

# As much as is read at once: most calls come whole.
PIECE = 1 << 16

_methods = {}
_decode = json.JSONDecoder().raw_decode
_encode = json.JSONEncoder(allow_nan=False).encode


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
        name = name or function.__name__
        _methods[name] = (function, '{"out": %s, "result": ' % _encode(name))
        return function

    if callable(name):
        return register(name)
    return lambda function: register(function, name)


def serve(fd=3):
    """Answers calls until the worker closes its end."""
    calls = socket.socket(fileno=fd)
    calls.sendall(_frame('{"out": "ready"}'))  # for `ready = "message"`; harmless without
    data = calls.recv(PIECE)
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        if len(data) < 4 or len(data) < end:
            data = _more(calls, data)
            continue
        calls.sendall(_frame(_answer(data[4:end])))
        data = data[end:] or calls.recv(PIECE)


def _answer(body):
    try:
        try:
            call, _ = _decode(body.decode())
        except (ValueError, RecursionError) as error:
            # JSON that the worker has let pass and Python does not: a number of 5,000 digits, say.
            raise Error(INVALID_PARAMS, str(error)) from None
        name, params = call["in"], call["params"]
        if name not in _methods:
            raise Error(METHOD_NOT_FOUND, "this program has no method %r" % name)
        function, begin = _methods[name]
        if isinstance(params, list):
            result = _call(function, params, {})
        elif isinstance(params, dict):
            result = _call(function, [], params)
        else:
            result = _call(function, [] if params is None else [params], {})
        return begin + _encode(result) + "}"
    except Error as error:
        result = {"code": error.code, "message": error.message}
        if error.data is not None:
            result["data"] = error.data
        return _encode({"out": "error", "result": result})
    except Exception as problem:
        traceback.print_exc()
        sys.stderr.flush()
        text = "%s: %s" % (type(problem).__name__, problem)
        return _encode({"out": "error", "result": {"code": INTERNAL, "message": text}})


def _call(function, args, kwargs):
    try:
        return function(*args, **kwargs)
    except TypeError as error:
        # The caller's fault where the params do not fit, else the function's own.
        if error.__traceback__.tb_next is not None:
            raise
        raise Error(INVALID_PARAMS, str(error)) from None


def _more(calls, data):
    """What has come, and as much as makes the frame at its head whole; nothing at the end."""
    pieces, length = [data], len(data)
    while True:
        if length >= 4:
            data = pieces[0] if len(pieces[0]) >= 4 else b"".join(pieces)
            if length >= 4 + int.from_bytes(data[:4], "little"):
                return b"".join(pieces)
        piece = calls.recv(PIECE)
        if not piece:
            return b""
        pieces.append(piece)
        length += len(piece)


def _frame(text):
    body = text.encode()
    return len(body).to_bytes(4, "little") + body

"""Serves Python functions as methods of a preforkd pool. It is one file, with nothing to install.

Put it beside your program, and write:

    from preforkd import method, serve

    @method
    def add(a, b):
        return a + b

    serve()

The params become the arguments of the function:

- a list: positional arguments
- an object: keyword arguments
- null: no argument
- any other value: the only argument

The return value of the function is the result. Raise Error(code, message, data) for your own errors.
Any other exception is answered with an error too. Its traceback goes to stderr, which goes to
preforkd's log.

Calls come one at a time. For more calls at once, set `processes` in the configuration.
"""

import json
import socket
import sys
import traceback

__all__ = ["Error", "method", "serve"]

INVALID_PARAMS = -32602
METHOD_NOT_FOUND = -32601
INTERNAL = -32603

# The number of bytes to read at once. Most calls arrive in one piece.
PIECE = 1 << 16

_methods = {}
_decode = json.JSONDecoder().raw_decode
_encode = json.JSONEncoder(allow_nan=False).encode


class Error(Exception):
    """An error for the caller: your own code, a message, and optional data."""

    def __init__(self, code, message, data=None):
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data


def method(name=None):
    """Registers a function as a method: `@method`, or `@method("a.name")` to give it another name."""

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
    calls.sendall(_frame('{"out": "ready"}'))  # needed for `ready = "message"`, harmless otherwise
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
            # Python refuses some JSON that the worker accepts, for example a number of 5,000 digits.
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
        # No further frame in the traceback: the params do not fit, so it is an error of the caller.
        # Otherwise the function itself raised the TypeError.
        if error.__traceback__.tb_next is not None:
            raise
        raise Error(INVALID_PARAMS, str(error)) from None


def _more(calls, data):
    """Reads until the first frame in data is complete. Returns all bytes, or b"" at the end of input."""
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

"""Serves Python functions as methods of a preforkd pool. It is one file, with nothing to install.

Put it beside your program, and write:

    from preforkd import method, serve

    @method
    def add(a, b):
        return a + b

    if __name__ == "__main__":
        serve()

The params become the arguments of the function:

- a list: positional arguments; with `@method(spread=False)` it is the only argument
- an object: keyword arguments
- null: no argument
- any other value: the only argument

The return value of the function is the result. Raise Error(code, message, data) for your own errors.
Any other exception is answered with an error too. Its traceback goes to stderr, which goes to
preforkd's log. What the program prints goes there too, line by line.

preforkd starts the program. Started by hand in a terminal, it reads calls from there, one per line.
In a child of multiprocessing, serve() returns at once. The program ignores SIGTERM while it serves,
because preforkd ends it after its calls. Processes that it starts do not ignore it.

Within a function, current() says which call it is: `.call` is the id that the server gave to it, and
`.traceparent` and `.tracestate` are its place in a trace (W3C Trace Context). Send `.child()` as traceparent
with each request of your own. They are None unless the configuration has `[trace]`.

If the method runs as a durable job, job() returns the attempt: `.id` is the id of the job, `.attempt` counts
from 1 to `.max_attempts`, and `.is_last` says that the job is dead if this attempt fails. In a call it returns
None. An attempt may be repeated after its work is done, so store the id with the effect of the job.

If the pool has `stack-signal`, the stacks of all threads go to preforkd's log when a call is slow.

Calls come one at a time. For more calls at once, set `processes` in the configuration, or
`concurrency`: then one program gets several calls at once. `async def` functions run together on one
asyncio loop, other functions on threads. A call whose client does not wait any more is cancelled
if its function is an `async def`.
"""

import contextvars
import json
import os
import re
import signal
import socket
import sys
import traceback
import types

__all__ = ["Error", "current", "job", "method", "serve"]

INVALID_PARAMS = -32602
METHOD_NOT_FOUND = -32601
INTERNAL = -32603
CANCELLED = -32006

# The number of bytes to read at once. Most calls arrive in one piece.
PIECE = 1 << 16

# The id of a call: its last member, as preforkd writes it.
_ID = re.compile(rb',"id":(\d+)\}$')
_methods = {}
_current = contextvars.ContextVar("preforkd_call", default=(None, None, None))
_job = contextvars.ContextVar("preforkd_job", default=None)
_decode = json.JSONDecoder().raw_decode
_encode = json.JSONEncoder(allow_nan=False).encode


# Into a pipe Python writes blocks of 8 KiB, and what is in such a block is lost with a program that is killed.
for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):
        _stream.reconfigure(line_buffering=True)


class Error(Exception):
    """An error for the caller: your own code, a message, and optional data."""

    def __init__(self, code, message, data=None):
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data


def method(name=None, spread=True):
    """Registers a function as a method: `@method`, or `@method("a.name")` to give it another name.

    With spread=False the params are the only argument, also if they are a list, an object or null."""

    def register(function, name=None):
        name = name or function.__name__
        _methods[name] = (function, spread, '{"out": %s, "result": ' % _encode(name))
        return function

    if callable(name):
        return register(name)
    return lambda function: register(function, name)


class Current:
    """The call that runs: its id, and its place in a trace. Each is None if preforkd did not send it."""

    def __init__(self, call, traceparent, tracestate):
        self.call = call
        self.traceparent = traceparent
        self.tracestate = tracestate

    def child(self):
        """Returns the traceparent for one request that this call sends: with a parent id of its own."""
        if self.traceparent is None:
            return None
        version, trace, _, flags = self.traceparent.split("-")
        parent = os.urandom(8).hex()
        while parent == "0" * 16:
            parent = os.urandom(8).hex()
        return "-".join((version, trace, parent, flags))


def current():
    """Returns what is known of the call that runs here."""
    return Current(*_current.get())


class Job:
    """The attempt of a durable job that runs: the id of the job, and the number of the attempt."""

    def __init__(self, id, attempt, max_attempts):
        self.id = id
        self.attempt = attempt
        self.max_attempts = max_attempts
        self.is_last = attempt >= max_attempts


def job():
    """Returns the attempt that runs here, or None in a call."""
    found = _job.get()
    return found and Job(found["id"], found["attempt"], found["max_attempts"])


def serve(fd=3):
    """Answers calls until preforkd closes its end."""
    if _is_child_of_multiprocessing():
        return
    try:
        calls = socket.socket(fileno=fd)
    except OSError:
        return _serve_by_hand()
    _ignore_sigterm()
    _write_stack_when_asked()
    try:
        calls.sendall(_frame('{"out": "ready"}'))  # needed for `ready = "message"`, harmless otherwise
    except BrokenPipeError:
        return  # preforkd has given up this start, for example because another pool has failed
    data = calls.recv(PIECE)
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        if len(data) < 4 or len(data) < end:
            data = _more(calls, data)
            continue
        body = data[4:end]
        # The id is the last member of a call.
        if _ID.search(body, max(0, len(body) - 40)):
            import asyncio  # only here, because it takes long to load

            return asyncio.run(_serve_together(calls, data))
        calls.sendall(_frame(_answer(body)))
        data = data[end:] or calls.recv(PIECE)


def _is_child_of_multiprocessing():
    """Whether multiprocessing runs the program's file once more, in a child, to find its functions there."""
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "__mp_main__":
        frame = frame.f_back
    return frame is not None


def _serve_by_hand():
    """Answers calls from a terminal."""
    sys.stderr.write(
        "%s is a program of a preforkd pool: preforkd starts it and gives it calls on descriptor 3.\n"
        'Name it in a configuration, as command = ["python3", %s] of a pool, and start `preforkd run`.\n'
        % (sys.argv[0], _encode(sys.argv[0]))
    )
    if sys.stdin is None or not sys.stdin.isatty():
        sys.exit(1)
    example = '{"in": "%s", "params": []}' % next(iter(_methods), "add")
    sys.stderr.write("Until then it reads calls here, one per line, such as %s\n" % example)
    for line in sys.stdin:
        try:
            call = json.loads(line)
            body = _encode({"in": call["in"], "params": call.get("params")}).encode()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            print("this is no call; write one as in %s" % example)
        else:
            print(_answer(body))


def _ignore_sigterm():
    """A service manager may send SIGTERM to all processes at once, and the call would be lost.

    This is a function and not SIG_IGN, because exec keeps what is ignored, for the programs started from here."""
    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda number, frame: None)
            os.register_at_fork(after_in_child=_stop_ignoring_sigterm)
    except ValueError:
        pass  # serve() was not called by the main thread, and only that can set a handler


def _write_stack_when_asked():
    """With `stack-signal` of its pool, preforkd sends that signal when a call is slow."""
    name = os.environ.get("PREFORKD_STACK_SIGNAL")
    if name:
        import faulthandler  # only here, because few programs need it

        # It writes all stacks to standard error, also if the interpreter is in a deadlock.
        faulthandler.register(getattr(signal, "SIG" + name), file=2, all_threads=True)


def _stop_ignoring_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


async def _serve_together(calls, data):
    """Answers calls that have ids, several at once; data is what was read already."""
    import asyncio
    import inspect
    from concurrent.futures import ThreadPoolExecutor

    loop = asyncio.get_running_loop()
    # As many threads as there are calls at once; they start when they are needed.
    threads = ThreadPoolExecutor(max_workers=1 << 16)
    tasks, answers, wake = {}, [], asyncio.Event()
    calls.setblocking(False)

    def done(key, answer):
        tasks.pop(key, None)
        answers.append(_frame(answer[:-1] + ', "id": ' + key + "}"))
        wake.set()

    async def send():
        while True:
            await wake.wait()
            wake.clear()
            data = b"".join(answers)
            answers.clear()
            await loop.sock_sendall(calls, data)

    async def run(key, body):
        answer = None
        try:
            function, args, kwargs, begin = _find(_read(body))
            if inspect.iscoroutinefunction(function):
                tasks[key][1] = True
                result = await _call(function, args, kwargs)
            else:
                # A thread does not inherit what is current here.
                run = contextvars.copy_context().run
                result = await loop.run_in_executor(threads, run, _call, function, args, kwargs)
            answer = begin + _encode(result) + "}"
        except asyncio.CancelledError:
            answer = _failure(CANCELLED, "cancelled")
        except Error as error:
            answer = _failure(error.code, error.message, error.data)
        except Exception as problem:
            answer = _unexpected(problem)
        finally:
            done(key, answer or _failure(INTERNAL, "the function ended the program"))

    def take(body):
        found = _ID.search(body, max(0, len(body) - 40))
        if found:
            key = found.group(1).decode()
            tasks[key] = [loop.create_task(run(key, body)), False]
            return
        # The only call without an id is rpc.cancel. Its task may not have begun yet.
        loop.call_soon(cancel, str(_read(body)["params"]["id"]))

    def cancel(key):
        # A thread cannot be cancelled: its call is answered when it is done.
        task, is_async = tasks.get(key, (None, False))
        if is_async:
            task.cancel()

    sender = loop.create_task(send())
    while True:
        start = 0
        while len(data) - start >= 4:
            end = start + 4 + int.from_bytes(data[start : start + 4], "little")
            if len(data) < end:
                break
            take(data[start + 4 : end])
            start = end
        piece = await loop.sock_recv(calls, PIECE)
        if not piece or sender.done():
            if tasks:
                # These calls are given up, and Python would wait for their threads.
                sys.stdout.flush()
                os._exit(0)
            return
        data = data[start:] + piece


def _read(body):
    try:
        return _decode(body.decode())[0]
    except (ValueError, RecursionError) as error:
        # Python refuses some JSON that preforkd accepts, for example a number of 5,000 digits.
        raise Error(INVALID_PARAMS, str(error)) from None


def _find(call):
    """The function of a call, its arguments, and the begin of its answer."""
    name, params = call["in"], call["params"]
    _current.set((call.get("call"), call.get("traceparent"), call.get("tracestate")))
    _job.set(call.get("job"))
    if name not in _methods:
        raise Error(METHOD_NOT_FOUND, "this program has no method %r" % name)
    function, spread, begin = _methods[name]
    if not spread:
        return function, [params], {}, begin
    if isinstance(params, list):
        return function, params, {}, begin
    if isinstance(params, dict):
        if "traceparent" in call:
            params.pop("_meta", None)  # the place of the context in JSON-RPC; current() has it
        return function, [], params, begin
    return function, [] if params is None else [params], {}, begin


def _answer(body):
    try:
        function, args, kwargs, begin = _find(_read(body))
        result = _call(function, args, kwargs)
        if isinstance(result, types.CoroutineType):
            import asyncio

            result = asyncio.run(result)
        return begin + _encode(result) + "}"
    except Error as error:
        return _failure(error.code, error.message, error.data)
    except Exception as problem:
        return _unexpected(problem)


def _failure(code, message, data=None):
    result = {"code": code, "message": message}
    if data is not None:
        result["data"] = data
    return _encode({"out": "error", "result": result})


def _unexpected(problem):
    call = current().call
    if call is not None:
        sys.stderr.write("call %s failed:\n" % call)
    traceback.print_exc()
    sys.stderr.flush()
    return _failure(INTERNAL, "%s: %s" % (type(problem).__name__, problem))


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

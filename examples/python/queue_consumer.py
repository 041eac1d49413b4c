"""Consumes the queue of queue.toml. It writes each item to a file with the id of its job as the name.

If a consumer dies before its answer is stored, the item comes again with the same id. Then the same file is
written again, so the repeat changes nothing."""

import os
import tempfile

from preforkd import job, method, serve

DONE = "queue-done"
os.makedirs(DONE, exist_ok=True)


@method(spread=False)
def letters(item):
    with tempfile.NamedTemporaryFile("w", dir=DONE, delete=False) as file:
        file.write(str(item))
        file.flush()
        os.fsync(file.fileno())
    # The item is there completely or not at all.
    os.rename(file.name, os.path.join(DONE, job().id))
    return len(str(item))


if __name__ == "__main__":
    serve()

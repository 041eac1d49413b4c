"""A model that is loaded once and called many times. It has the methods of the pool in pool.toml."""

import time

from preforkd import Error, method, serve

# Slow work belongs here: it runs once in each process, not once for each call.
WEIGHTS = {"good": 1.0, "great": 2.0, "bad": -1.0, "awful": -2.0}
LOADED = time.time()


@method
def score(text):
    words = text.lower().split()
    if not words:
        raise Error(1, "there is nothing to score")
    return sum(WEIGHTS.get(word, 0.0) for word in words) / len(words)


@method("model.age")
def age():
    return time.time() - LOADED


if __name__ == "__main__":
    serve()

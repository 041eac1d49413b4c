"""The functions that are measured: some work on a text, as a small model has it, and none."""

WEIGHTS = {"good": 1.0, "great": 2.0, "bad": -1.0, "awful": -2.0}


def score(text):
    words = text.lower().split()
    return sum(WEIGHTS.get(word, 0.0) for word in words) / len(words)


def trivial(text):
    return text

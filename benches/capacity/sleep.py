"""A program that sleeps for as many seconds as it is told."""

import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples/python"))

from preforkd import method, serve


@method
def pool(seconds):
    time.sleep(seconds)
    return seconds


serve()

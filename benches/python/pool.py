"""The functions behind a pool of preforkd, by the helper that is shipped."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples/python"))

from function import score, trivial
from preforkd import method, serve

method(score)
method(trivial)
serve()

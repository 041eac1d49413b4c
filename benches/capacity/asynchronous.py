"""Sleeps in many calls at once, on one asyncio loop."""

import asyncio
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../../examples/python"))

from preforkd import method, serve  # noqa: E402


@method("async")
async def sleep(seconds):
    await asyncio.sleep(seconds)
    return seconds


serve()

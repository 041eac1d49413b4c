"""The functions behind a WSGI server: POST /NAME with the params as body, the result as answer."""

import json

from function import score, trivial

FUNCTIONS = {"/score": score, "/trivial": trivial}


def application(environ, start_response):
    params = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    body = json.dumps(FUNCTIONS[environ["PATH_INFO"]](*params)).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start_response("200 OK", headers)
    return [body]

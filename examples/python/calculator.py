"""A calculator that keeps a stack for each connection. Its configuration is calculator.toml.

    {"in": "enter", "params": [1, 2, "+"]}      the result is [3]
    {"in": "enter", "params": [4, "*"]}         the result is [12]

Each connection has a program of its own, so a plain variable keeps the state of one client.
"""

import operator

from preforkd import Error, method, serve

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
stack = []


@method
def enter(*items):
    """Takes numbers and operators in postfix order, and answers the stack."""
    global stack
    changed = list(stack)
    for item in items:
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            changed.append(item)
        elif item not in OPERATORS:
            raise Error(1, "enter numbers and + - * /, not %r" % (item,))
        elif len(changed) < 2:
            raise Error(2, "%s needs two numbers" % item)
        else:
            right, left = changed.pop(), changed.pop()
            if item == "/" and right == 0:
                raise Error(3, "a division by zero")
            changed.append(OPERATORS[item](left, right))
    stack = changed
    return stack


if __name__ == "__main__":
    serve()

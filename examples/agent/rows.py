#!/usr/bin/env python3
"""Write the rows of an agent: several steps, reasoning before each, calls of several tools at once. The same rows every time.

usage: python examples/agent/rows.py agent.jsonl [--rows 200]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

CITIES = {"Oslo": (4, "NOK"), "Lima": (19, "PEN"), "Cairo": (31, "EGP"), "Quito": (15, "USD"), "Tokyo": (22, "JPY")}
RATES = {"NOK": 0.09, "PEN": 0.25, "EGP": 0.03, "USD": 0.92, "JPY": 0.006}
SYSTEM = "You plan trips. Look things up with the tools; never guess a number."


def tool(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {parameter: {"type": kind} for parameter, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    tool("weather", "Degrees in a city today.", city="string"),
    tool("hotel", "Price of a night, in the money of the city.", city="string"),
    tool("convert", "An amount of money in euros.", amount="number", currency="string"),
]


class Conversation:
    """Messages, with an id for each call."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
        self._calls = 0

    def ask(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})

    def call(self, thought: str, *calls: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
        """One step: a thought, all `calls` (name, arguments, result) at once, and their results."""
        given, results = [], []
        for name, arguments, result in calls:
            self._calls += 1
            identity = f"call{self._calls:05d}"
            function = {"name": name, "arguments": arguments}
            given.append({"id": identity, "type": "function", "function": function})
            results.append({"role": "tool", "tool_call_id": identity, "name": name, "content": json.dumps(result)})
        step = {"role": "assistant", "reasoning_content": thought, "content": "", "tool_calls": given}
        self.messages += [step, *results]

    def answer(self, thought: str, text: str) -> None:
        self.messages.append({"role": "assistant", "reasoning_content": thought, "content": text})


def row(generator: random.Random) -> dict[str, Any]:
    """A trip: two cities compared in one step, then perhaps a price, perhaps in euros."""
    first, second = generator.sample(sorted(CITIES), 2)
    degrees = {city: CITIES[city][0] + generator.randint(-9, 9) for city in (first, second)}
    warmer = max(degrees, key=lambda city: degrees[city])
    steps = generator.randint(1, 3)
    wishes = ["", " What is a night there?", " What is a night there, in euros?"][steps - 1]
    talk = Conversation()
    talk.ask(f"{first} or {second}: which is warmer today?{wishes}")
    looked_up = [("weather", {"city": city}, {"degrees": degrees[city]}) for city in (first, second)]
    talk.call(f"I need both: {first} and {second}.", *looked_up)
    found = f"{warmer} is warmer, with {degrees[warmer]} degrees."
    if steps == 1:
        talk.answer("I have both.", found)
        return {"messages": talk.messages, "tools": TOOLS}
    currency, price = CITIES[warmer][1], generator.randint(40, 900)
    priced = ("hotel", {"city": warmer}, {"price": price, "currency": currency})
    talk.call(f"{warmer} is warmer. Now its price.", priced)
    if steps == 2:
        talk.answer("I have the price.", f"{found} A night is {price} {currency}.")
        return {"messages": talk.messages, "tools": TOOLS}
    euros = round(price * RATES[currency], 2)
    converted = ("convert", {"amount": price, "currency": currency}, {"euros": euros})
    talk.call(f"The price is in {currency}, and euros are asked for.", converted)
    talk.answer("I have all of it.", f"{found} A night is {euros} euros.")
    return {"messages": talk.messages, "tools": TOOLS}


def rows(count: int) -> list[dict[str, Any]]:
    generator = random.Random(0)
    return [row(generator) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    arguments = parser.parse_args()
    lines = [json.dumps(found, ensure_ascii=False) + "\n" for found in rows(arguments.rows)]
    arguments.file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

"""`/v1/fine_tuning/alpha/graders/run` and `validate`."""

from __future__ import annotations

from dstune.finetuning.fields import refuse_unknown
from dstune.finetuning.graders.grader import check_grader, run_grader
from dstune.finetuning.turns import Turns
from dstune.grading.grader import Sample
from dstune.serve.errors import ApiError
from dstune.serve.gateway.app import Gateway
from dstune.serve.gateway.request import Request

MOST_SAMPLE = 1_000_000
_GRADING = Turns(1, "grader")
"""One request computes at a time, so that other work continues."""


async def validate(gateway: Gateway, request: Request) -> None:
    request.query(())
    body = await request.json()
    request.refuse_halves(body)
    refuse_unknown(body, ("grader",))
    await _GRADING.run(request.key.project, check_grader, body.get("grader"))
    await request.answer({"grader": body["grader"]})


async def run(gateway: Gateway, request: Request) -> None:
    request.query(())
    body = await request.json()
    request.refuse_halves(body)
    refuse_unknown(body, ("grader", "model_sample", "item"))
    await _GRADING.run(request.key.project, check_grader, body.get("grader"))
    text, item = body.get("model_sample"), body.get("item")
    if not isinstance(text, str) or len(text) > MOST_SAMPLE:
        raise ApiError(
            400, f"Invalid model_sample: must be a text of at most {MOST_SAMPLE} characters.", param="model_sample"
        )
    if item is not None and not isinstance(item, dict):
        raise ApiError(400, "Invalid item: must be an object.", param="item")
    graded = await _GRADING.run(request.key.project, run_grader, body["grader"], Sample(text, item or {}))
    await request.answer(graded)

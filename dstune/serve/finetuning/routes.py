"""The routes of the fine-tuning API: the one place where they are registered."""

from __future__ import annotations

from dstune.serve.finetuning.graders import handlers as graders
from dstune.serve.finetuning.service import FineTuning
from dstune.serve.gateway.app import Route


def routes(api: FineTuning) -> list[Route]:
    return [
        Route("POST", "/v1/files", api.files.create, scope="member"),
        Route("GET", "/v1/files", api.files.listed),
        Route("GET", "/v1/files/{file}", api.files.retrieve),
        Route("GET", "/v1/files/{file}/content", api.files.content),
        Route("DELETE", "/v1/files/{file}", api.files.delete, scope="member"),
        Route("POST", "/v1/uploads", api.uploads.create, scope="member"),
        Route("POST", "/v1/uploads/{upload}/parts", api.uploads.add_part, scope="member"),
        Route("POST", "/v1/uploads/{upload}/complete", api.uploads.complete, scope="member"),
        Route("POST", "/v1/uploads/{upload}/cancel", api.uploads.cancel, scope="member"),
        Route("POST", "/v1/fine_tuning/alpha/graders/run", graders.run, scope="member"),
        Route("POST", "/v1/fine_tuning/alpha/graders/validate", graders.validate, scope="member"),
    ]

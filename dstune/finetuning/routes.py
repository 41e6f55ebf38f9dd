"""The table of routes of the fine-tuning API."""

from __future__ import annotations

from dstune.finetuning.graders import handlers as graders
from dstune.finetuning.service import FineTuning
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
        Route("POST", "/v1/batches", api.batches.create, scope="member"),
        Route("GET", "/v1/batches", api.batches.listed),
        Route("GET", "/v1/batches/{batch}", api.batches.retrieve),
        Route("POST", "/v1/batches/{batch}/cancel", api.batches.cancel, scope="member"),
        Route("GET", "/v1/webhook_event_types", api.webhooks.event_types),
        Route("POST", "/v1/webhook_endpoints", api.webhooks.create, scope="member"),
        Route("GET", "/v1/webhook_endpoints", api.webhooks.listed),
        Route("GET", "/v1/webhook_endpoints/{endpoint}", api.webhooks.retrieve),
        Route("POST", "/v1/webhook_endpoints/{endpoint}", api.webhooks.update, scope="member"),
        Route("DELETE", "/v1/webhook_endpoints/{endpoint}", api.webhooks.delete, scope="member"),
        Route("POST", "/v1/webhook_endpoints/{endpoint}/rotate_secret", api.webhooks.rotate, scope="member"),
        Route("POST", "/v1/webhook_endpoints/{endpoint}/test", api.webhooks.test, scope="member"),
        Route("GET", "/v1/organization/audit_logs", api.organizations.audit_logs, scope="owner"),
        Route("GET", "/v1/organization/usage/completions", api.organizations.completions, scope="owner"),
        Route("GET", "/v1/organization/usage/fine_tuning", api.organizations.training, scope="owner"),
        Route("GET", "/v1/organization/costs", api.organizations.costs, scope="owner"),
        Route("GET", "/v1/secrets", api.organizations.list_secrets, scope="owner"),
        Route("POST", "/v1/secrets", api.organizations.store_secret, scope="owner"),
        Route("DELETE", "/v1/secrets/{secret}", api.organizations.drop_secret, scope="owner"),
        Route("POST", "/v1/fine_tuning/alpha/graders/run", graders.run, scope="member"),
        Route("POST", "/v1/fine_tuning/alpha/graders/validate", graders.validate, scope="member"),
        *_jobs(api),
        *_models(api),
    ]


def _jobs(api: FineTuning) -> list[Route]:
    jobs, path = api.jobs, "/v1/fine_tuning/jobs"
    return [
        Route("POST", path, jobs.create, scope="member"),
        Route("GET", path, jobs.listed),
        Route("GET", path + "/{job}", jobs.retrieve),
        Route("POST", path + "/{job}/cancel", jobs.cancel, scope="member"),
        Route("POST", path + "/{job}/pause", jobs.pause, scope="member"),
        Route("POST", path + "/{job}/resume", jobs.resume, scope="member"),
        Route("GET", path + "/{job}/events", jobs.events),
        Route("GET", path + "/{job}/checkpoints", jobs.checkpoints),
    ]


def _models(api: FineTuning) -> list[Route]:
    models, path = api.models, "/v1/fine_tuning/checkpoints/{model+}/permissions"
    return [
        Route("GET", "/v1/models", models.listed),
        Route("GET", "/v1/models/{model+}", models.retrieve),
        Route("DELETE", "/v1/models/{model+}", models.delete, scope="owner"),
        Route("POST", path, models.share, scope="owner"),
        Route("GET", path, models.permissions),
        Route("DELETE", path + "/{permission}", models.unshare, scope="owner"),
    ]

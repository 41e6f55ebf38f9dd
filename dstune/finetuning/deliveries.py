"""Delivers events to webhooks: retried with growing pauses for three days until the receiver accepts them."""

from __future__ import annotations

import asyncio
import logging
import time

from sqlalchemy import delete, func, select

from dstune.finetuning.tables import Delivery, WebhookEndpoint
from dstune.finetuning.webhooks import Webhooks
from dstune.serve.store.database import Database

log = logging.getLogger("dstune.serve")

PAUSES = (5, 30, 120, 600, 1800, 3600)
"""Seconds before each retry; the last one repeats."""
GIVE_UP_SECONDS = 3 * 86_400
AT_ONCE = 8
LEASE_SECONDS = 60.0
"""For this long no other server claims the delivery."""
RETENTION_SECONDS = 7 * 86_400


class Deliveries:
    def __init__(self, database: Database, webhooks: Webhooks, seconds: float):
        """seconds: between two checks for due deliveries."""
        self._database, self._webhooks, self._seconds = database, webhooks, seconds

    async def run(self) -> None:
        while True:
            try:
                sent = await self.send_due()
            except Exception:
                log.exception("webhooks could not be sent; it is tried again")
                sent = 0
            if sent < AT_ONCE:
                await asyncio.sleep(self._seconds)

    async def send_due(self) -> int:
        """Send the due deliveries and return the number of attempts."""
        claimed = await asyncio.to_thread(self._claim)
        await asyncio.gather(*(self._send(delivery, endpoint) for delivery, endpoint in claimed))
        return len(claimed)

    def _claim(self) -> list[tuple[Delivery, WebhookEndpoint]]:
        """Claim deliveries of as many endpoints as there are places, in random order, so that one that does not answer cannot delay
        others."""
        now, claimed = time.time(), []
        with self._database.writing.begin() as session:
            self._database.exclusive(session, "deliveries")
            due = (Delivery.state == "waiting", Delivery.next_at <= now)
            names = select(Delivery.endpoint).where(*due).group_by(Delivery.endpoint).order_by(func.random())
            chosen = list(session.scalars(names.limit(AT_ONCE)))
            for name in chosen:
                endpoint = session.scalar(select(WebhookEndpoint).where(WebhookEndpoint.id == name))
                oldest = select(Delivery).where(*due, Delivery.endpoint == name).order_by(Delivery.next_at)
                for delivery in session.scalars(oldest.limit(AT_ONCE // len(chosen))):
                    if endpoint is None or endpoint.deleted_at is not None:
                        delivery.state = "dropped"
                        continue
                    delivery.next_at, delivery.attempts = now + LEASE_SECONDS, delivery.attempts + 1
                    claimed.append((delivery, endpoint))
            session.execute(
                delete(Delivery).where(Delivery.state != "waiting", Delivery.next_at < now - RETENTION_SECONDS)
            )
        return claimed

    async def _send(self, delivery: Delivery, endpoint: WebhookEndpoint) -> None:
        status = await self._webhooks.send(endpoint, delivery.id, delivery.body)
        await asyncio.to_thread(self._finish, delivery, status)

    def _finish(self, delivery: Delivery, status: int | None) -> None:
        now = time.time()
        with self._database.writing.begin() as session:
            row = session.get_one(Delivery, delivery.number)
            row.status = status
            if status is not None and 200 <= status < 300:
                row.state = "delivered"
            elif now - row.created > GIVE_UP_SECONDS:
                row.state = "failed"
            else:
                row.next_at = now + PAUSES[min(row.attempts, len(PAUSES)) - 1]

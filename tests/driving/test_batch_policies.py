"""A policy server as the planner: sessions, late answers, refusals."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from spacedrive_jax.driving import batch_policies
from spacedrive_jax.driving.batch_policies import Batcher, RemotePolicy
from spacedrive_jax.driving.bench import PlanRequest
from spacedrive_jax.driving.client import PolicyError
from spacedrive_jax.driving.driver import FailureKind, Plan, PlanError
from tests.record_factory import make_record

PLAN = {"waypoints": np.ones((6, 2)), "path": np.zeros((0, 2)), "text": "here", "status": "ok"}


class FakeClient:
    """Answers at once, late, or with an error, by the step that it is asked."""

    made: list[FakeClient]
    release: threading.Event

    def __init__(self, url: str, token: str | None = None) -> None:
        self.asked: list[int] = []
        self.busy = False
        FakeClient.made.append(self)

    def connect(self) -> dict:
        return {}

    def reset(self, route: str) -> None:
        self.route = route

    def act(self, message: dict) -> dict:
        assert not self.busy, "a session is asked one thing at a time"
        self.busy = True
        try:
            self.asked.append(message["step"])
            if message["step"] == 1:
                FakeClient.release.wait(20)
            if message["step"] == 3:
                raise PolicyError("refused")
            return PLAN if message["step"] < 4 else {**PLAN, "waypoints": np.zeros((0, 2))}
        finally:
            self.busy = False

    def close(self) -> None:
        self.closed = True


def test_answers_late_answers_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClient.made, FakeClient.release = [], threading.Event()
    monkeypatch.setattr(batch_policies, "PolicyClient", FakeClient)
    record = make_record(np.random.default_rng(0))
    policy = RemotePolicy("ws://nowhere", 2, deadline=0.2)

    def ask(step: int) -> Plan | PlanError:
        return policy.plans([PlanRequest(7, step, record)])[7]

    def failure(step: int) -> FailureKind:
        answer = ask(step)
        assert isinstance(answer, PlanError)
        return answer.kind

    first = ask(0)
    assert isinstance(first, Plan)
    np.testing.assert_array_equal(first.waypoints, PLAN["waypoints"])
    assert first.path is None
    assert failure(1) is FailureKind.LATE
    assert failure(2) is FailureKind.LATE  # not asked: the session has not answered yet
    FakeClient.release.set()
    assert isinstance(ask(2), Plan)
    assert failure(3) is FailureKind.CRASH
    assert failure(4) is FailureKind.NONSENSE
    assert FakeClient.made[0].asked == [0, 1, 2, 3, 4]
    assert isinstance(policy.plans([PlanRequest(8, 0, record)])[8], Plan)
    assert [client.route for client in FakeClient.made] == ["drive 7", "drive 8"]
    policy.close()
    assert all(client.closed for client in FakeClient.made)


def test_a_batch_waits_for_requests_that_are_on_their_way() -> None:
    """As long as a batch takes, and only while there are any."""
    coming = 0
    batcher = Batcher(list, most=4, wait_s=0.005, expected=lambda: 4, coming=lambda: coming)
    batcher._usual_s = 1.0
    sizes = []
    for coming in (1, 0):
        first = batcher.submit(1)
        time.sleep(0.5)  # beyond a quarter of what a batch takes
        second = batcher.submit(2)
        if coming:
            time.sleep(0.01)
            coming = 0
        sizes.append([each.result(10).size for each in (first, second)])
        batcher._usual_s = 1.0
    batcher.close()
    assert sizes == [[2, 2], [1, 1]]

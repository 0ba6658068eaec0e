"""Whom drives ask from outside: a model in this process, or a policy server."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from spacedrive_jax.driving.bench import Asked
from spacedrive_jax.driving.client import PolicyClient, PolicyError
from spacedrive_jax.driving.model_policy import check_depth, warm_up_record
from spacedrive_jax.driving.plans import FailureKind, Plan, PlanError, checked_plan
from spacedrive_jax.driving.protocol import act_message
from spacedrive_jax.errors import ConfigError, SpaceDriveError
from spacedrive_jax.inference.open_planner import open_planner
from spacedrive_jax.inference.planner import Planner
from spacedrive_jax.world.filming import KEYFRAME_PERIOD


@runtime_checkable
class Asker(Protocol):
    """Answers several drives at once."""

    most: int
    """Drives that it likes to be asked by together."""

    def plans(self, asked: Sequence[Asked]) -> Mapping[int, Plan | PlanError]:
        """A plan, or why there is none, for each drive's number."""

    def close(self) -> None:
        """No more questions."""


class ModelAsker:
    """A checkpoint's model in this process: all questions go through it together.

    Batches are always filled up to the same size: other sizes are other programs, whose last bits differ, and
    a drive's bytes must not depend on which others are under way.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner, self.most = planner, planner.most
        planner.sizes = (planner.most,)

    def plans(self, asked: Sequence[Asked]) -> Mapping[int, Plan | PlanError]:
        """See `Asker`."""
        answers: dict[int, Plan | PlanError] = {}
        samples, numbers = [], []
        for question in asked:
            try:
                samples.append(self.planner.sample(question.record))
                numbers.append(question.number)
            except SpaceDriveError as error:
                answers[question.number] = PlanError(FailureKind.CRASH, str(error))
        for first in range(0, len(samples), self.most):
            planned = self.planner.plan(samples[first : first + self.most])
            for number, plan in zip(numbers[first : first + self.most], planned, strict=True):
                answers[number] = _checked(plan.waypoints, plan.path, plan.text)
        return answers

    def close(self) -> None:
        """Nothing to close."""


class ServerAsker:
    """A policy server: each drive is a session of its own, all are asked at the same time."""

    def __init__(self, url: str, most: int, deadline: float, token: str | None = None) -> None:
        """Connects to nothing yet.

        Args:
            url: `ws://host:port`.
            most: drives at a time.
            deadline: seconds within which an answer counts.
            token: of the server.
        """
        self.url, self.most, self.deadline, self.token = url, most, deadline, token
        self._clients: dict[int, PolicyClient] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(most)
        self._late: dict[int, concurrent.futures.Future[Plan | PlanError]] = {}
        """Questions whose answers have not come yet: a session is asked one thing at a time."""

    def plans(self, asked: Sequence[Asked]) -> Mapping[int, Plan | PlanError]:
        """See `Asker`."""
        until = time.monotonic() + self.deadline
        concurrent.futures.wait(self._late.values(), self.deadline)
        self._late = {number: future for number, future in self._late.items() if not future.done()}
        futures = {
            question.number: self._pool.submit(self._ask, question)
            for question in asked
            if question.number not in self._late
        }
        concurrent.futures.wait(futures.values(), max(until - time.monotonic(), 0.0))
        late = PlanError(FailureKind.LATE, f"no answer within {self.deadline:g} s")
        answers: dict[int, Plan | PlanError] = {question.number: late for question in asked}
        for number, future in futures.items():
            if future.done():
                answers[number] = future.result()
            else:
                self._late[number] = future
        return answers

    def _ask(self, question: Asked) -> Plan | PlanError:
        client = self._clients.get(question.number)
        try:
            if client is None:
                client = PolicyClient(self.url, token=self.token)
                client.connect()
                client.reset(f"drive {question.number}")
                self._clients[question.number] = client
            seconds = question.decision * KEYFRAME_PERIOD
            answer = client.act(act_message(question.record, question.decision, seconds))
        except (PolicyError, OSError) as error:
            return PlanError(FailureKind.CRASH, str(error))
        return _checked(answer.get("waypoints"), answer.get("path"), str(answer.get("text", "")))

    def close(self) -> None:
        """Closes all sessions."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for client in self._clients.values():
            client.close()


def _checked(waypoints: object, path: object, text: str) -> Plan | PlanError:
    try:
        return checked_plan(waypoints, path, text)
    except PlanError as error:
        return error


def open_asker(
    checkpoint: str, *, batch_size: int, deadline: float, average: bool = False, token: str | None = None
) -> Asker:
    """Opens what `--checkpoint` names.

    Args:
        checkpoint: `ws://host:port` (or `wss://`) of a policy server, or a checkpoint's folder.
        batch_size: drives at a time.
        deadline: seconds within which a server's answer counts.
        average: take the moving average of the weights.
        token: of the server.

    Raises:
        SpaceDriveError: it cannot be opened, or its depth comes from a network.
    """
    if checkpoint.startswith(("ws://", "wss://")):
        return ServerAsker(checkpoint, batch_size, deadline, token)
    planner = open_planner(Path(checkpoint), warm_up_record(), average=average, most=batch_size)
    try:
        check_depth(planner.config, None)
    except ConfigError as error:
        raise ConfigError(
            f"{checkpoint}: its depth comes from a network. Serve it (serve --checkpoint {checkpoint} "
            "--depth-model WEIGHTS) and drive --checkpoint ws://127.0.0.1:8000"
        ) from error
    return ModelAsker(planner)

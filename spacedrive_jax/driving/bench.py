"""Drives under way, in this process or spread over several: they ask, are answered, come back finished."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Generator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from spacedrive_jax.data.schema import Record
from spacedrive_jax.driving.drive_log import script_log
from spacedrive_jax.driving.driver import FailureKind, Plan, PlanError
from spacedrive_jax.driving.episode import DriveOptions, DriveResult, Question, episode, open_loop, outcome
from spacedrive_jax.driving.pdm import pdm_score, script_decisions
from spacedrive_jax.driving.policies import expert
from spacedrive_jax.driving.results import drive_record, metric_info, trace
from spacedrive_jax.driving.scenarios import DriveSpec
from spacedrive_jax.errors import SpaceDriveError
from spacedrive_jax.parallel import end_with_parent
from spacedrive_jax.world.scenario import UnplayableError
from spacedrive_jax.world.world import World

WorldPolicy = Callable[[World, Record], Plan]
"""A policy that knows the world it drives in (picklable); `BatchPolicy` is given records alone."""


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """A drive waits for a plan."""

    number: int
    decision: int
    record: Record


@dataclasses.dataclass(frozen=True)
class Finished:
    """A drive is over."""

    number: int
    record: dict[str, Any]
    """Of the result file."""
    metric_info: dict[str, Any]
    trace: dict[str, Any]
    records: tuple[Record, ...] = ()
    """Of its decisions, with the expert's plan from each as the target."""
    views: tuple[bytes, ...] = ()
    """The six images of the decision at which it went wrong, where it did and somebody looked."""


@dataclasses.dataclass(frozen=True)
class NoPlace:
    """The town has no place for the scenario."""

    number: int
    reason: str


Event = PlanRequest | Finished | NoPlace


class Bench:
    """Drives of one process."""

    def __init__(
        self,
        options: DriveOptions,
        world_policy: WorldPolicy | None = None,
        *,
        collect: bool = False,
        shown: int | None = None,
    ) -> None:
        """Args: how to drive, the policy that knows the world, whether to keep all records or one's."""
        self.options, self.world_policy, self.collect, self.shown = options, world_policy, collect, shown
        self._drives: dict[int, Generator[Question, Plan | PlanError, DriveResult]] = {}

    def start(self, spec: DriveSpec) -> Event:
        """Begins a drive and goes on to its first question (to its end with a `WorldPolicy`)."""
        options, keep = self.options, self.collect
        if spec.number == self.shown:  # with images, whether the policy looks or not
            options, keep = dataclasses.replace(options, sense="images"), True
        drive = episode(spec, options, keep=keep)
        self._drives[spec.number] = drive
        return self._go_on(spec.number, lambda: next(drive))

    def answer(self, number: int, answer: Plan | PlanError) -> Event:
        """Answers a drive's question and goes on to the next."""
        drive = self._drives[number]
        return self._go_on(number, lambda: drive.send(answer))

    def _go_on(self, number: int, step: Callable[[], Question]) -> Event:
        try:
            question = step()
            while self.world_policy is not None:
                question = self._drives[number].send(self._ask(question))
            return PlanRequest(number, question.decision, question.record)
        except StopIteration as end:
            del self._drives[number]
            return finished(end.value)
        except UnplayableError as error:
            del self._drives[number]
            return NoPlace(number, str(error))

    def _ask(self, question: Question) -> Plan | PlanError:
        assert self.world_policy is not None
        if self.world_policy is expert and question.expert is not None:
            return question.expert
        try:
            return self.world_policy(question.world, question.record)
        except PlanError as error:
            return error
        except Exception as error:  # a policy is somebody else's code: whatever it raises is its failure
            return PlanError(FailureKind.CRASH, f"{type(error).__name__}: {error}")


def finished(result: DriveResult) -> Finished:
    """What is kept of a drive."""
    spec, log = result.spec, result.log
    script = script_log(log.scenario, float(log.time[0]), log.goal)
    record = drive_record(
        log,
        result.lanes,
        index=spec.number,
        number=spec.number,
        kind=spec.kind,
        town=spec.town,
        ending=result.ending,
        expert_metres=result.expert_metres,
        decisions=result.decisions,
        failures=result.failures,
        reference=pdm_score(script, result.lanes, result.expert_metres, script_decisions(script)),
    )
    error, counted = open_loop(result)
    record["open_loop"] = {"l2": round(error, 6), "decisions": counted}
    shown = {**trace(log), **outcome(result)}
    return Finished(spec.number, record, metric_info(log), shown, result.records, result.views)


class Fleet:
    """Drives spread over processes that end with this one; one process drives in this one."""

    def __init__(
        self,
        workers: int,
        options: DriveOptions,
        world_policy: WorldPolicy | None = None,
        *,
        collect: bool = False,
        shown: int | None = None,
    ) -> None:
        """Starts the processes.

        Args:
            workers: how many; 1 drives here.
            options: how to drive.
            world_policy: the policy where it knows the world.
            collect: keep records.
            shown: number of the one drive whose records are kept in any case.
        """
        self._bench = Bench(options, world_policy, collect=collect, shown=shown) if workers == 1 else None
        self._ready: list[Event] = []
        self._seats: dict[int, int] = {}
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        if workers > 1:
            context: Any = multiprocessing.get_context("spawn")
            for _ in range(workers):
                here, there = context.Pipe()
                process = context.Process(
                    target=_serve, args=(there, options, world_policy, collect, shown), daemon=True
                )
                process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    @property
    def under_way(self) -> int:
        """Drives that are begun and not finished."""
        return len(self._seats)

    def start(self, spec: DriveSpec) -> None:
        """Begins a drive, where the fewest are."""
        if self._bench is not None:
            self._seats[spec.number] = 0
            self._ready.append(self._bench.start(spec))
            return
        busy = [sum(seat == worker for seat in self._seats.values()) for worker in range(len(self._pipes))]
        worker = busy.index(min(busy))
        self._seats[spec.number] = worker
        self._send(worker, ("start", spec))

    def answer(self, answers: Mapping[int, Plan | PlanError]) -> None:
        """Answers questions, by the drives' numbers."""
        for number, answer in answers.items():
            if self._bench is not None:
                self._ready.append(self._bench.answer(number, answer))
            else:
                self._send(self._seats[number], ("answer", number, answer))

    def events(self, count: int) -> Sequence[Event]:
        """Waits for the next `count` events; the order is that in which they come.

        Raises:
            SpaceDriveError: a process died.
        """
        found: list[Event] = []
        if self._bench is not None:
            found, self._ready = self._ready[:count], self._ready[count:]
        while len(found) < count:
            for pipe in multiprocessing.connection.wait(self._pipes):
                assert isinstance(pipe, Connection)
                try:
                    event = pipe.recv()
                except (EOFError, ConnectionResetError) as error:
                    raise SpaceDriveError("a process that drives died: run it again with --resume") from error
                if isinstance(event, Exception):
                    raise event
                found.append(event)
                if len(found) == count:
                    break
        for event in found:
            if not isinstance(event, PlanRequest):
                del self._seats[event.number]
        return found

    def _send(self, worker: int, message: tuple[Any, ...]) -> None:
        try:
            self._pipes[worker].send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise SpaceDriveError("a process that drives died: run it again with --resume") from error


def _serve(
    pipe: Connection,
    options: DriveOptions,
    world_policy: WorldPolicy | None,
    collect: bool,
    shown: int | None,
) -> None:
    """A worker's life."""
    end_with_parent()
    bench = Bench(options, world_policy, collect=collect, shown=shown)
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        try:
            event: Any = (
                bench.start(message[1]) if message[0] == "start" else bench.answer(message[1], message[2])
            )
        except Exception as error:  # the parent raises it
            event = error
        pipe.send(event)

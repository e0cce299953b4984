"""The training loop, the same for every architecture, corpus and size."""

import time
from pathlib import Path

from data_pipelines.fault_points import fault_point
from data_pipelines.shards import certificate
from trainer.config import EvaluationConfig, ExecutionConfig, RunConfig
from trainer.engine import prepare_process
from trainer.preemption import StopSignal
from trainer.schedule import learning_rate, run_milestones
from trainer.session import Lineage, Outcome, Session

GRACE_SECONDS = 60.0
"""From a stop signal to the forced end of a process that is stuck within a step."""


def train(
    config: RunConfig,
    execution: ExecutionConfig,
    evaluation: EvaluationConfig,
    folder: Path,
    lineage: Lineage,
) -> Outcome:
    """Train one run to its token budget, from its newest complete checkpoint if it has one.

    Every rank of the run calls it; rank 0 writes the record.

    Raises:
        ConfigError: the configuration, or a change of it, cannot be run.
        RuntimeError: data or checkpoints are damaged or missing, or a rank failed.
    """
    prepare_process(execution)
    session = Session(config, execution, evaluation, folder, lineage)
    try:
        return _loop(session)
    except Exception as error:
        cause = session.fail(error)
        if cause is error:
            raise
        raise cause from error
    finally:
        session.close()


def _loop(session: Session) -> Outcome:
    state = session.resume()
    plan = run_milestones(
        session.config, session.execution, session.evaluation, session.lineage.forks
    )
    batches = session.open_stream(state.step)
    signal = StopSignal(GRACE_SECONDS, session.folder / "stop-stacks.txt", session.log.warn)
    with signal, session.heartbeat:
        if plan.events(state.step).evaluate and state.step:
            session.evaluate(state)
        while state.step < plan.last:
            begin = time.perf_counter()
            session.heartbeat.beat(state.step, "data")
            batch = next(batches)
            waited = time.perf_counter() - begin
            session.heartbeat.beat(state.step, "step")
            rate = learning_rate(session.config, state.step)
            result = session.engine.step(batch, rate)
            # Of the ranks that share sequences only one counts them.
            seen = certificate(batch.samples) if session.engine.ranks.shard == 0 else 0
            mixed, stops = session.engine.ranks.sum_integers([seen, int(signal.requested)])
            state.step += 1
            state.certificate = (state.certificate + mixed) & 0xFFFFFFFFFFFFFFFF
            state.skipped_in_row = state.skipped_in_row + 1 if result.skipped else 0
            session.log.write_step(state, result, rate, (time.perf_counter() - begin, waited))
            fault_point("train.step")
            if state.skipped_in_row > session.config.optimizer.max_skipped_steps:
                return session.diverge(state)
            events = plan.events(state.step)
            if events.save or stops:
                session.save(state, pinned=events.pin, required=events.required)
            if events.evaluate:
                session.evaluate(state)
            if stops:
                return session.stop(state, signal.name)
        return session.finish(state)

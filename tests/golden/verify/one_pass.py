"""One-pass planning against token-by-token generation, on a recorded case."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from spacedrive_jax.batch import DrivingBatch
from spacedrive_jax.data.tokenizer import DrivingTokenizer
from spacedrive_jax.inference.answers import Generation, planning_frame
from spacedrive_jax.inference.generate import generate
from spacedrive_jax.models.spacedrive import SpaceDrive
from tests.golden.verify.check import Check, compare


def one_pass_checks(
    model: SpaceDrive,
    batch: DrivingBatch,
    tokenizer: DrivingTokenizer,
    max_new_tokens: int,
    repetition_penalty: float,
    answer: Generation,
) -> list[Check]:
    """Answers again with the planning frame and compares with `answer`, made token by token.

    Args:
        model: the case's model.
        batch: the case's prompts.
        tokenizer: with words; without them the frame is what was answered, if that ended its turn.
        max_new_tokens: as `answer` was made with.
        repetition_penalty: as `answer` was made with.
        answer: made token by token.
    """
    if tokenizer.vocabulary_size > 0:
        frame = planning_frame(tokenizer)
    else:
        count = int(answer.lengths[0])
        fed = np.where(answer.is_position, tokenizer.position, answer.token_ids)[0, :count]
        frame = tuple(fed.tolist())
        if frame[-1] != tokenizer.turn_end:
            return []
    graph, state = nnx.split(model)

    @jax.jit
    def run(state: nnx.State, batch: DrivingBatch) -> Generation:
        return generate(
            nnx.merge(graph, state),
            batch,
            tokenizer,
            max_new_tokens,
            repetition_penalty=repetition_penalty,
            frame=frame,
        )

    # What the recorded cases allow where a grid is searched for directions that were never trained.
    tolerance = 5e-3 if model.config.decoder.is_grid else 2e-4
    fast = jax.device_get(run(state, batch))
    return [
        compare("one_pass/token_ids", fast.token_ids, answer.token_ids, rtol=0),
        compare("one_pass/lengths", fast.lengths, answer.lengths, rtol=0),
        compare("one_pass/coordinates", fast.coordinates, answer.coordinates, atol=tolerance),
    ]

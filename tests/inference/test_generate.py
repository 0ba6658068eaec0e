import jax
import numpy as np

from spacedrive_jax.inference.generate import answer_text, generate
from tests.published_case import load_case


def test_generation_equals_published():
    case = load_case("spacedrive_generate")
    published = case.outputs
    length = int(case.batch.lengths[0])
    np.testing.assert_array_equal(case.batch.token_ids[0, :length], published["prompt_ids_after_ego"][0])
    limit = case.settings["max_new_tokens"]
    generated = jax.jit(lambda batch: generate(case.model, batch, case.tokenizer, limit))(case.batch)
    count = int(generated.lengths[0])
    np.testing.assert_array_equal(generated.token_ids[0, :count], published["generated_ids"])
    decoded = np.asarray(generated.is_coordinate[0, :count])
    np.testing.assert_array_equal(np.flatnonzero(decoded), published["pos_embedding_index"])
    points = np.asarray(generated.coordinates[0, :count])
    np.testing.assert_allclose(points[decoded], published["coords"], atol=2e-4)
    text = answer_text(case.tokenizer, np.asarray(generated.token_ids[0, :count]), points, decoded)
    assert text == case.settings["text"]

import pytest
from flax import nnx

from e88_jax.model import LanguageModel
from tests.reference.configs import lm_config
from tests.sampling.common import VOCAB


@pytest.fixture(scope="package")
def model() -> LanguageModel:
    config = lm_config(conv_size=3, dtype="float32", vocab_size=VOCAB)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    # Small initial weights would make all tokens about as likely.
    model.embed.embedding[...] = 25 * model.embed.embedding[...]
    return model


@pytest.fixture(scope="package")
def flat(model: LanguageModel) -> LanguageModel:
    """A model with the compiled programs of `model`; all logits are 0."""
    flat = nnx.clone(model)
    flat.embed.embedding[...] = 0 * flat.embed.embedding[...]
    return flat

"""The model of a finished or running run."""

from pathlib import Path

from flax import nnx

from e88_jax.model import LanguageModel
from experiments.cli.errors import UsageError
from experiments.harness import run_directory
from experiments.harness.checkpoints import Checkpoints
from experiments.harness.config import TrainConfig
from experiments.harness.mesh import fewest
from experiments.harness.optimizer import make_optimizer
from experiments.harness.step import TrainState, init_state, shapes_of


def load_trained(
    directory: Path, kind: type[TrainConfig], *, latest: bool
) -> tuple[LanguageModel, int]:
    """The model of the run in `directory`, and the step of its checkpoint. A model that one device
    cannot hold is divided over all.

    Args:
        directory: of the run.
        kind: class of the run's configuration.
        latest: the newest checkpoint, rather than the best by the run's metric.

    Raises:
        UsageError: no run there, or no checkpoint that can be read.
    """
    config = run_directory.load_config(directory, kind)
    optimizer = make_optimizer(config.optimizer, config.steps)

    def build() -> LanguageModel:
        return LanguageModel(config.model, rngs=nnx.Rngs(0))

    def make() -> TrainState:
        return init_state(build(), optimizer, config.batch.carry_shape, config.batch.seq_len)

    graphdef = nnx.graphdef(nnx.eval_shape(build))
    like = shapes_of(make, fewest(config.model))
    metric = run_directory.load_metric(directory)
    checkpoints = Checkpoints(directory / "checkpoints", metric, keep=None)
    restored = checkpoints.restore_latest(like) if latest else checkpoints.restore_best(like)
    checkpoints.close()
    if restored is None:
        raise UsageError(f"{directory} holds no checkpoint yet.")
    step, state, _ = restored
    return nnx.merge(graphdef, optimizer.eval_params(state.optimizer, state.params)), step

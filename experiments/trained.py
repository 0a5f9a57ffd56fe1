"""The model of a finished or running run."""

from pathlib import Path

from flax import nnx

from e88_jax.model import LanguageModel
from experiments.cli.errors import UsageError
from experiments.harness import run_directory
from experiments.harness.checkpoints import Checkpoints
from experiments.harness.config import TrainConfig
from experiments.harness.optimizer import make_optimizer
from experiments.harness.step import TrainState, init_state


def load_trained(
    directory: Path, kind: type[TrainConfig], *, latest: bool
) -> tuple[LanguageModel, int]:
    """The model of the run in `directory`, and the step of its checkpoint.

    Args:
        directory: of the run.
        kind: class of the run's configuration.
        latest: the newest checkpoint, rather than the best by the run's metric.

    Raises:
        UsageError: no run there, or no checkpoint that can be read.
    """
    config = run_directory.load_config(directory, kind)
    optimizer = make_optimizer(config.optimizer, config.steps)

    def build() -> tuple[LanguageModel, TrainState]:
        model = LanguageModel(config.model, rngs=nnx.Rngs(0))
        shape, context = config.batch.carry_shape, config.batch.seq_len
        return model, init_state(model, optimizer, shape, context)

    model, like = nnx.eval_shape(build)
    metric = run_directory.load_metric(directory)
    checkpoints = Checkpoints(directory / "checkpoints", metric, keep=None)
    restored = checkpoints.restore_latest(like) if latest else checkpoints.restore_best(like)
    checkpoints.close()
    if restored is None:
        raise UsageError(f"{directory} holds no checkpoint yet.")
    step, state, _ = restored
    nnx.update(model, optimizer.eval_params(state.optimizer, state.params))
    return model, step

"""Training: the recipe, from a configuration and a task to a trained model."""

from collections.abc import Iterator

import grain
import jax.numpy as jnp
from flax import nnx

from e88_jax.model import LanguageModel
from experiments.cli.errors import UsageError
from experiments.tasks.base import Batch, Task, rows_of

from . import devices
from .config import TrainConfig
from .mesh import placement
from .optimizer import make_optimizer
from .run import Run
from .step import (
    TrainState,
    compile_train_step,
    init_state,
    make_evaluate,
    make_sharded,
    shapes_of,
)


def train(config: TrainConfig, task: Task, run: Run) -> None:
    """Trains a new or a resumed run.

    Raises:
        UsageError: the model cannot be built, or the run cannot continue.
        RunStopped: the run ended early, with its checkpoint written.
    """
    devices.set_up()
    where = placement(config.mesh, config.batch.batch_size, config.model, run.here)
    graphdef, metric = build(config, task), task.metric
    optimizer = make_optimizer(config.optimizer, config.steps)
    carry_shape, seq_len = config.batch.carry_shape, config.batch.seq_len
    rows = where.rows_here(config.batch.batch_size)

    def make() -> TrainState:
        return init_state(_model(config), optimizer, carry_shape, seq_len)

    def put(batch: Batch) -> Batch:
        return where.put(batch, config.batch.batch_size)

    like, stateful = shapes_of(make, where), config.batch.stateful
    evaluate = make_evaluate(graphdef, task.validation(), where, metric, stateful=stateful)

    state = run.begin(like, parameters=config.model.count_params(), devices=str(where))
    with run.compiling():
        if state is None:
            state = make_sharded(make, like)
        train_step = compile_train_step(
            graphdef,
            optimizer,
            config.optimizer.clip_norm,
            metric,
            state,
            put(rows_of(task, run.step, rows)),
        )
    batches = prefetch(task, run.step, rows)
    while run.step < config.steps:
        with run.reading(state):
            batch = next(batches)
        batch = put(batch)
        state, metrics = train_step(state, batch)
        run.stepped(metrics, batch.inputs.size)
        value = None
        if run.evaluates:
            with run.paused(state):
                value = evaluate(optimizer.eval_params(state.optimizer, state.params))
        run.ended_step(state, value)

    weights = where.for_sampling(optimizer.eval_params(state.optimizer, state.params))
    task.finish(nnx.merge(graphdef, weights), run)
    run.finished()


def build(config: TrainConfig, task: Task) -> nnx.GraphDef[LanguageModel]:
    """The model without weights.

    Raises:
        UsageError: the named implementation of the recurrence does not take the model.
    """
    _, rows, length = task[0].inputs.shape

    def called() -> LanguageModel:
        model = _model(config)
        model(jnp.zeros((rows, length), jnp.int32))
        return model

    try:
        return nnx.graphdef(nnx.eval_shape(called))
    except NotImplementedError as error:
        raise UsageError(str(error)) from None


def _model(config: TrainConfig) -> LanguageModel:
    return LanguageModel(config.model, rngs=nnx.Rngs(config.batch.seed))


def prefetch(task: Task, start: int, rows: slice) -> Iterator[Batch]:
    """Batches from step `start` on, of each these rows, read ahead of the training loop."""
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    steps = grain.MapDataset.range(start, 1 << 62)  # without end
    read = steps.map(lambda step: rows_of(task, step, rows))
    return iter(read.to_iter_dataset(ahead))

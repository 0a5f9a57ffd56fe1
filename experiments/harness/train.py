"""Training: the recipe, from a configuration and a task to a trained model."""

from collections.abc import Iterator

import grain
import jax
import jax.numpy as jnp
from flax import nnx

from e88_jax.model import LanguageModel
from experiments.cli.errors import UsageError
from experiments.tasks.base import Batch, Task

from . import devices
from .config import TrainConfig
from .optimizer import make_optimizer
from .run import Run
from .step import compile_train_step, init_state, make_evaluate, place


def train(config: TrainConfig, task: Task, run: Run) -> None:
    """Trains a new or a resumed run.

    Raises:
        UsageError: the model cannot be built, or the run cannot continue.
        RunStopped: the run ended early, with its checkpoint written.
    """
    devices.set_up()
    where = devices.placement(config.batch.batch_size)
    model = build(config, task)
    graphdef, metric = nnx.graphdef(model), task.metric
    optimizer = make_optimizer(config.optimizer, config.steps)
    carry_shape, seq_len = config.batch.carry_shape, config.batch.seq_len
    state = place(init_state(model, optimizer, carry_shape, seq_len), where)
    stateful = config.batch.stateful
    evaluate = make_evaluate(graphdef, task.validation(), where, metric, stateful=stateful)

    state = run.begin(state, parameters=config.model.count_params(), devices=str(where))
    with run.compiling():
        train_step = compile_train_step(
            graphdef,
            optimizer,
            config.optimizer.clip_norm,
            metric,
            state,
            where.put(task[run.step]),
        )
    batches = prefetch(task, run.step)
    while run.step < config.steps:
        with run.reading(state):
            batch = next(batches)
        state, metrics = train_step(state, where.put(batch))
        run.stepped(metrics, batch.inputs.size)
        value = None
        if run.evaluates:
            with run.paused(state):
                value = evaluate(optimizer.eval_params(state.optimizer, state.params))
        run.ended_step(state, value)

    weights = optimizer.eval_params(state.optimizer, state.params)
    nnx.update(model, jax.device_put(weights, jax.devices()[0]))
    task.finish(model, run)
    run.finished()


def build(config: TrainConfig, task: Task) -> LanguageModel:
    """The model before training.

    Raises:
        UsageError: the named implementation of the recurrence does not take the model.
    """
    model = LanguageModel(config.model, rngs=nnx.Rngs(config.batch.seed))
    _, rows, length = task[0].inputs.shape
    try:
        jax.eval_shape(model, jax.ShapeDtypeStruct((rows, length), jnp.int32))
    except NotImplementedError as error:
        raise UsageError(str(error)) from None
    return model


def prefetch(task: Task, start: int) -> Iterator[Batch]:
    """The batches from step `start` on, read ahead of the training loop."""
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    steps = grain.MapDataset.range(start, 1 << 62)  # without end
    return iter(steps.map(task.__getitem__).to_iter_dataset(ahead))

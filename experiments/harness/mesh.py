"""The mesh of a run: its devices, and how arrays are divided over them.

Rows of a batch are divided over both axes, `data` and `fsdp`; weights and optimizer state over
`fsdp`, and copied along `data`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e88_jax.config import LMConfig
from experiments.cli.errors import UsageError, warn
from experiments.tasks.base import Batch

from .mesh_sizes import AUTO, MeshSizes, check_dim, nearest_multiples, parse_mesh
from .processes import Processes

RULES = {"dim": "fsdp"}
"""Mesh axes of the logical axes of parameters."""
BYTES_PER_PARAMETER = 16
"""Bytes in float32 of a weight, its gradient and AdamW's two moments."""
SHARE_OF_MEMORY = 0.8
"""Most of a device's memory that these may take if each device is to hold all: a step needs some
for activations."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and the shardings of a run's arrays on it."""

    mesh: Mesh

    @property
    def everywhere(self) -> NamedSharding:
        """Replicated."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def by_row(self) -> NamedSharding:
        """Arrays `[passes, rows, ...]`, divided by row."""
        return NamedSharding(self.mesh, PartitionSpec(None, self.mesh.axis_names))

    def by_name(self, tree: Any) -> Any:
        """The sharding of each array of weights or optimizer state, by the names of the axes of its
        parameter; an array without is replicated."""

        def of(x: Any) -> Any:
            if not isinstance(x, nnx.Variable):
                return self.everywhere
            names = x.get_metadata().get("out_sharding") or ()
            spec = PartitionSpec(*(RULES.get(name) for name in names))
            return jax.tree.map(lambda _: NamedSharding(self.mesh, spec), x)

        return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def put(self, batch: Batch) -> Batch:
        """The batch on the devices: by row if their number divides it, else replicated. Each
        process has the whole batch, and puts what its devices hold."""
        divisible = batch.inputs.shape[1] % self.mesh.size == 0
        where = self.by_row if divisible else self.everywhere

        def on_devices(x: Any) -> jax.Array:
            if self.mesh.is_multi_process:
                return jax.make_array_from_callback(x.shape, where, np.asarray(x).__getitem__)
            return jax.device_put(x, where)

        arrays = jax.tree.map(on_devices, batch._replace(restart=None))
        return arrays._replace(restart=np.bool_(batch.restart))

    def gathered(self, tree: Any) -> Any:
        """The arrays of a tree whole, on one device of this process."""
        copies = jax.jit(lambda tree: tree, out_shardings=self.everywhere)(tree)
        return jax.tree.map(lambda x: x.addressable_data(0), copies)

    def __str__(self) -> str:
        sizes = MeshSizes(**self.mesh.shape)
        devices = self.mesh.devices.flat
        parts = [f"{sizes.n_devices} x {devices[0].device_kind}"]
        if (processes := len({device.process_index for device in devices})) > 1:
            parts.append(f"of {processes} processes")
        return " ".join(parts if sizes.fsdp == 1 else [*parts, f"({sizes})"])


def placement(
    mesh: str,
    rows: int,
    model: LMConfig,
    here: Processes = Processes(),  # noqa: B008  (frozen)
) -> Placement:
    """The mesh of a run, over the devices of all its processes.

    Args:
        mesh: sizes, as `--mesh` takes them, or "auto" for `automatic`.
        rows: rows of a batch.
        model: what is trained.
        here: the processes that train.

    Raises:
        UsageError: the model's dim does not divide over the mesh, there are fewer devices, or a
            process has none of them.
        ValueError: the text is no mesh, or the rows do not divide over it.
    """
    devices = jax.devices()
    sizes = parse_mesh(mesh, rows)
    if sizes is None:  # of memory that processes may see differently
        sizes = MeshSizes(*here.agree(lambda: automatic(rows, model, devices)))
    check_dim(sizes, model.dim)
    if sizes.n_devices > len(devices):
        raise UsageError(
            f"--mesh {mesh} needs {sizes.n_devices} devices, and there are {len(devices)}; "
            f"--mesh {AUTO} uses these."
        )
    used = devices[: sizes.n_devices]
    if (n := len({device.process_index for device in used})) < here.count:
        raise UsageError(
            f"--mesh {sizes} has devices of {n} processes only: start so many instead of "
            f"{here.count}, or use all {len(devices)} devices, over which {len(devices)} rows or a "
            f"multiple would divide."
        )
    return Placement(Mesh(np.array(used).reshape(sizes), sizes._fields))


def automatic(rows: int, model: LMConfig, devices: Sequence[Any]) -> MeshSizes:
    """As many devices as divide the rows: on `data` if each can hold weights and optimizer state,
    else on `fsdp` as far as the model's dim divides. Warns of devices left idle, and of `fsdp`."""
    n = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    if n < len(devices):
        warn(
            f"{n} of {len(devices)} devices are used, as a batch of {rows} does not divide over "
            f"all: {nearest_multiples(rows, len(devices))} would use all."
        )
    needed = BYTES_PER_PARAMETER * model.count_params()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    if memory is None or needed <= SHARE_OF_MEMORY * memory:
        return MeshSizes(data=n)
    fsdp = max(x for x in range(1, n + 1) if n % x == model.dim % x == 0)
    sizes = MeshSizes(n // fsdp, fsdp)
    if fsdp > 1:
        warn(
            f"weights, gradients and AdamW's moments take {needed / 1e9:.1f} GB, and a device has "
            f"{memory / 1e9:.1f} GB: they are divided over {fsdp} devices, as by --mesh {sizes}."
        )
    return sizes

"""The mesh of a run: its devices, and how arrays are divided over them.

Rows of a batch are divided over the axes `data` and `fsdp`; weights and optimizer state over
`fsdp`, and with their heads over `heads`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from e88_jax import head_parallel
from e88_jax.config import LMConfig
from e88_jax.meshes import names_of
from e88_jax.model import LanguageModel
from experiments.cli.errors import UsageError, warn
from experiments.tasks.base import Batch

from .mesh_sizes import AUTO, MeshSizes, check_model, nearest_multiples, parse_mesh
from .processes import Processes

FSDP, HEADS = "fsdp", "heads"
ROWS = ("data", FSDP)
"""Mesh axes that rows are divided over."""
RULES: dict[str | None, str] = {"dim": FSDP, "heads": HEADS, "hidden": HEADS}
"""Mesh axes of the logical axes of parameters."""
BYTES_PER_PARAMETER = 16
"""Bytes in float32 of a weight, its gradient and AdamW's two moments."""
SHARE_OF_MEMORY = 0.8
"""Most of a device's memory that these may take if each device is to hold all: a step needs some
for activations."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """The devices of a run, and how its arrays are divided over them."""

    mesh: Mesh

    @classmethod
    def of(cls, sizes: MeshSizes, devices: Sequence[Any]) -> "Placement":
        """A mesh of these sizes, the last axis innermost in the order of the devices."""
        return cls(Mesh(np.array(devices).reshape(sizes), sizes._fields))

    @property
    def everywhere(self) -> NamedSharding:
        """Replicated."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def sizes(self) -> MeshSizes:
        return MeshSizes(**self.mesh.shape)

    @property
    def by_row(self) -> NamedSharding:
        """Arrays `[passes, rows, ...]`, divided by row."""
        return NamedSharding(self.mesh, PartitionSpec(None, ROWS))

    def of_rows(self, tree: Any) -> Any:
        """The sharding of each array `[passes, rows, ...]` of a batch or of layers' states: by row
        if the rows divide, else replicated; states also by head."""

        def of(x: Any) -> Any:
            if hasattr(x, "AXES"):
                return type(x)(*map(of_part, x, x.AXES))
            return jax.tree.map(lambda x: of_part(x, "b"), x)

        def of_part(x: Any, names: str) -> Any:
            if x is None:
                return None
            rows = ROWS if x.shape[1] % self.sizes.n_parts == 0 else None
            axes = {"b": rows, "h": HEADS}
            return NamedSharding(self.mesh, PartitionSpec(None, *map(axes.get, names.split())))

        return jax.tree.map(of, tree, is_leaf=lambda x: hasattr(x, "AXES"))

    def by_name(self, tree: Any) -> Any:
        """The sharding of each array of weights or optimizer state, by the names of the axes of its
        parameter; an array without is replicated."""

        def of(x: Any) -> Any:
            there = NamedSharding(self.mesh, PartitionSpec(*_mesh_axes(x)))
            return jax.tree.map(lambda _: there, x)

        return jax.tree.map(of, tree, is_leaf=_is_variable)

    def map_rows(
        self, function: Callable[..., Any], params: Any, *arrays: Any, results: Any
    ) -> Any:
        """`function(params, *arrays)`, in which each device has its own part of the weights and its
        own rows of the arrays `[passes, rows, ...]`.

        Args:
            function: may call `merge`, `mean` and `mean_gradient`.
            params: weights.
            arrays: trees of arrays.
            results: the sharding of each result.
        """
        if self.mesh.size == 1:
            return function(params, *arrays)
        shardings = (self.by_name(params), *map(self.of_rows, arrays)), results
        in_specs, out_specs = jax.tree.map(lambda x: x.spec, shardings)
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        return mapped(params, *arrays)

    def merge(self, graphdef: nnx.GraphDef[LanguageModel], params: Any) -> LanguageModel:
        """The model of a device's parts, inside `map_rows`: it has the device's heads, by whole
        weights. A gradient through it is that of the parts."""
        model = nnx.merge(graphdef, params)
        params = self._gather(params, model.dtype)
        if self.sizes.heads > 1:
            return head_parallel.merge(model.config, params, HEADS)
        return nnx.merge(graphdef, params)

    def _gather(self, params: Any, dtype: Any) -> Any:
        """Weights of a device's heads, whole along `fsdp`, inside `map_rows`. A gradient through it
        is the sum over `fsdp` of the parts. Weights of matmuls are gathered, and their gradients
        summed, in the compute dtype `dtype` if it is narrower."""

        def whole(x: nnx.Variable[jax.Array]) -> nnx.Variable[jax.Array]:
            axis = self._part_axis(x)
            if axis is None:
                return x
            part = _narrowed(x[...], dtype) if _is_of_matmul(x) else x[...]
            return x.replace(lax.all_gather(part, FSDP, axis=axis, tiled=True))

        return jax.tree.map(whole, params, is_leaf=_is_variable)

    def mean(self, x: Any) -> Any:
        """The mean over devices, inside `map_rows`."""
        return x if self.sizes.n_parts == 1 else lax.pmean(x, ROWS)

    def mean_gradient(self, grads: Any, dtype: Any | None) -> Any:
        """The mean over rows of a gradient through `merge`, inside `map_rows`. Gradients of the
        weights of matmuls are summed in `dtype` if it is narrower; None for all as they are.

        What all heads' devices compute alike is a mean over them too, as their copies of a weight
        would drift apart if one rounded otherwise.
        """
        if self.mesh.size == 1:
            return grads
        several = [axis for axis, n in self.mesh.shape.items() if n > 1]

        def of(x: nnx.Variable[jax.Array]) -> nnx.Variable[jax.Array]:
            grad, divided = x[...], _mesh_axes(x)
            if axes := [axis for axis in several if axis not in divided]:
                narrow = dtype is not None and _is_of_matmul(x)
                summed = lax.psum(_narrowed(grad, dtype) if narrow else grad, axes)
                grad = summed.astype(grad.dtype)
            copies = 1 if HEADS in divided else self.sizes.heads
            return x.replace(grad / (self.sizes.n_parts * copies))

        return jax.tree.map(of, grads, is_leaf=_is_variable)

    def _part_axis(self, x: nnx.Variable[jax.Array]) -> int | None:
        """The axis along which an array is divided over `fsdp`; None if it is whole."""
        axes = _mesh_axes(x)
        return axes.index(FSDP) if FSDP in axes and self.mesh.shape[FSDP] > 1 else None

    def for_sampling(self, weights: Any) -> Any:
        """Weights on one device of each process, or, if they are divided, as they are."""
        if self.sizes.n_devices > self.sizes.data:
            return weights
        return jax.tree.map(lambda x: x.addressable_data(0), weights)

    def rows_here(self, rows: int) -> slice:
        """Rows of a batch that this process's devices hold: neighbours, as its devices are."""
        parts = self.by_row.addressable_devices_indices_map((1, rows)).values()
        ends = [part[1].indices(rows)[:2] for part in parts if part is not None]
        return slice(min(start for start, _ in ends), max(stop for _, stop in ends))

    def put(self, batch: Batch, rows: int | None = None) -> Batch:
        """The batch on the devices: by row if their number divides it, else replicated.

        Args:
            batch: all of it, or `rows_here`.
            rows: of all of it; None if it is given.
        """

        def on_devices(x: Any) -> jax.Array:
            passes, here, *sizes = x.shape
            shape = passes, here if rows is None else rows, *sizes
            where = self.of_rows(jax.ShapeDtypeStruct(shape, x.dtype))
            if self.mesh.is_multi_process:
                return jax.make_array_from_process_local_data(where, np.asarray(x), shape)
            return jax.device_put(x, where)

        arrays = jax.tree.map(on_devices, batch._replace(restart=None))
        return arrays._replace(restart=np.bool_(batch.restart))

    def __str__(self) -> str:
        sizes, devices = self.sizes, self.mesh.devices.flat
        parts = [f"{sizes.n_devices} x {devices[0].device_kind}"]
        if (processes := len({device.process_index for device in devices})) > 1:
            parts.append(f"of {processes} processes")
        return " ".join(parts if sizes.n_devices == sizes.data else [*parts, f"({sizes})"])


def _narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    """x in `dtype` if that is narrower, else as it is."""
    return x.astype(min(x.dtype, jnp.dtype(dtype), key=lambda each: each.itemsize))


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _is_of_matmul(x: nnx.Variable[jax.Array]) -> bool:
    """Whether x is a `Projection`'s kernel: no other array has the metadata `n_in_axes`."""
    return "n_in_axes" in x.get_metadata()


def _mesh_axes(x: Any) -> list[str | None]:
    """The mesh axis of each axis of a parameter, or of optimizer state that is shaped alike."""
    names = names_of(x) if isinstance(x, nnx.Variable) else ()
    return [RULES.get(name) for name in names]


def alone() -> Placement:
    """JAX's default device, without a run."""
    device = cast(Any, jax.config).jax_default_device or jax.devices()[0]
    return Placement.of(MeshSizes(), [device])


def fewest(model: LMConfig) -> Placement:
    """JAX's default device, or if it cannot hold a checkpoint of the model all devices, which the
    weights are divided over, with a warning."""
    devices = jax.devices()
    too_large = _too_large(model, devices[0])
    sizes = MeshSizes(fsdp=_most_parts(model, len(devices)))
    if too_large is None or sizes.fsdp == 1:
        return alone()
    warn(f"{too_large}: they are divided over {sizes.fsdp} devices.")
    return Placement.of(sizes, devices[: sizes.fsdp])


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
        UsageError: the model's dim or heads do not divide over the mesh, there are fewer devices,
            or a process has none of them.
        ValueError: the text is no mesh, or the rows do not divide over it.
    """
    devices = jax.devices()
    sizes = parse_mesh(mesh, rows)
    if sizes is None:  # of memory that processes may see differently
        sizes = MeshSizes(*here.agree(lambda: automatic(rows, model, devices)))
    check_model(sizes, model)
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
    return Placement.of(sizes, used)


def automatic(rows: int, model: LMConfig, devices: Sequence[Any]) -> MeshSizes:
    """As many devices as divide the rows: on `data` if each can hold weights and optimizer state,
    else on `fsdp` as far as the model's dim divides. Warns of devices left idle, and of `fsdp`."""
    n = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
    if n < len(devices):
        warn(
            f"{n} of {len(devices)} devices are used, as a batch of {rows} does not divide over "
            f"all: {nearest_multiples(rows, len(devices))} would use all."
        )
    too_large = _too_large(model, devices[0])
    if too_large is None:
        return MeshSizes(data=n)
    fsdp = _most_parts(model, n)
    sizes = MeshSizes(n // fsdp, fsdp)
    if fsdp > 1:
        warn(f"{too_large}: they are divided over {fsdp} devices, as by --mesh {sizes}.")
    return sizes


def _too_large(model: LMConfig, device: Any) -> str | None:
    """Sentence on what a device cannot hold; None if it can, or its memory is unknown."""
    needed = BYTES_PER_PARAMETER * model.count_params()
    memory = (device.memory_stats() or {}).get("bytes_limit")
    if memory is None or needed <= SHARE_OF_MEMORY * memory:
        return None
    return (
        f"weights, gradients and AdamW's moments take {needed / 1e9:.1f} GB, and a device has "
        f"{memory / 1e9:.1f} GB"
    )


def _most_parts(model: LMConfig, n: int) -> int:
    """The largest divisor of n that divides the model's dim."""
    return max(x for x in range(1, n + 1) if n % x == model.dim % x == 0)

"""Checkpoints of a run: Orbax, written in the background, the newest few and the best kept."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from .errors import UsageError, warn


def _bits_per_byte(metrics: dict[str, float]) -> float:
    # Orbax sorts a NaN as the best.
    value = metrics["bits_per_byte"]
    return value if math.isfinite(value) else math.inf


class Checkpoints:
    """The checkpoints in a directory, by step.

    A checkpoint that cannot be read, because it was cut short on disk, is moved to `unreadable/`
    with a warning, and the one before it counts as the newest.

    Args:
        directory: created if need be.
        keep: how many of the newest stay; the best by bits per byte stays besides. None only reads,
            as another process may be writing: unreadable checkpoints are passed over in place.
    """

    def __init__(self, directory: Path, *, keep: int | None):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save
        self._directory = directory.absolute()
        self._reads_only = keep is None
        if not self._reads_only:
            self._set_aside_unreadable_metrics()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=_bits_per_byte,  # without it, metrics would not be stored
                best_mode="min",
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep),
                        policies.BestN(
                            get_metric_fn=_bits_per_byte,
                            reverse=True,
                            n=1,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                cleanup_tmp_directories=not self._reads_only,
                read_only=self._reads_only,
                create=not self._reads_only,
                save_interval_steps=0 if self._reads_only else 1,
            ),
        )

    def save(
        self, step: int, state: Any, meta: dict[str, Any], bits_per_byte: float | None
    ) -> None:
        """Starts writing `state` (arrays) and `meta` (JSON); returns once they may change.

        A step that is there already is not written again.
        """
        if step in self._manager.all_steps():
            return
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
            metrics=None if bits_per_byte is None else {"bits_per_byte": bits_per_byte},
        )
        if not saved:
            raise RuntimeError(f"Orbax refused to save step {step} in {self._directory}.")

    def restore_latest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest readable `(step, state, meta)`, or None if nothing was ever saved.

        `like` gives structure, shapes and, if it holds arrays, the devices to restore to.

        Raises:
            UsageError: there are checkpoints, but none can be read; nothing was moved.
        """
        unreadable = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            # Orbax raises a bare Exception for truncated arrays.
            try:
                state, meta = self._restore(step, like)
            except Exception as error:
                unreadable[step] = str(error).partition("\n")[0]
                continue
            for bad, why in unreadable.items():
                if self._reads_only:
                    warn(f"checkpoint {bad} cannot be read ({why}).")
                else:
                    self._set_aside(bad, why)
            self._manager.reload()
            return step, state, meta
        if unreadable:
            step, why = next(iter(unreadable.items()))
            raise UsageError(
                f"none of the {len(unreadable)} checkpoints in {self._directory} can be read; "
                f"that of step {step}: {why}."
            )
        return None

    def restore_best(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """As `restore_latest`, but the one with the fewest bits per byte if it can be read."""
        best = self._manager.best_step()
        if best is not None:
            try:
                return best, *self._restore(best, like)
            except Exception as error:
                why = str(error).partition("\n")[0]
                warn(f"the best checkpoint, {best}, cannot be read ({why}).")
        return self.restore_latest(like)

    def _restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), like
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["meta"]

    def _set_aside_unreadable_metrics(self) -> None:
        # Orbax reads the metrics of every step when it opens a directory, and fails on bad ones.
        for directory in self._directory.glob("[0-9]*"):
            try:
                json.loads((directory / "metrics" / "metrics").read_text())
            except FileNotFoundError:
                continue
            except ValueError:
                if directory.name.isdigit():  # else a save that was cut short
                    self._set_aside(int(directory.name), "its metrics are cut short")

    def _set_aside(self, step: int, why: str) -> None:
        aside = self._directory / "unreadable"
        aside.mkdir(exist_ok=True)
        target = next(
            path
            for n in range(1_000_000)
            if not (path := aside / (f"{step}.{n}" if n else f"{step}")).exists()
        )
        (self._directory / str(step)).rename(target)
        warn(f"checkpoint {step} cannot be read ({why}); it is now {target}.")

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()

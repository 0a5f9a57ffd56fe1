"""jaxlib's compiled module, which comes without types: what JAX's own annotations name."""

from typing import Any

class Device:
    platform: str
    device_kind: str
    def __getattr__(self, name: str) -> Any: ...

class pytree:  # noqa: N801
    class PyTreeDef:
        def unflatten(self, leaves: Any, /) -> Any: ...

def __getattr__(name: str) -> Any: ...

"""Models by name: the sizing guide's presets, and the baselines that it compares them with.

Dimensions are as published (sizing guide, `docs/references.md`), mistakes included: the guide's
formula gives its counts at 500M, but not at 100M and 1B.
"""

import dataclasses

from e88_jax.checks import require_instance
from e88_jax.config import E88Config, LMConfig
from e88_jax.mixers.baselines import GatedDeltaNetConfig, Mamba2Config
from e88_jax.sizing.guide import calc_e88_params


@dataclasses.dataclass(frozen=True)
class Preset:
    """A row of the guide: a model of equal E88 layers."""

    name: str
    dim: int
    n_heads: int
    n_state: int
    depth: int
    published: str
    """Parameters, as printed."""
    published_state: str
    """State of a layer, as printed."""

    @property
    def config(self) -> LMConfig:
        return self.with_dim(self.dim)

    def with_dim(self, dim: int) -> LMConfig:
        layer = E88Config(n_heads=self.n_heads, n_state=self.n_state)
        return LMConfig(dim=dim, depth=self.depth, layers=(layer,))

    @property
    def published_params(self) -> int:
        number, unit = float(self.published[:-1]), self.published[-1]
        return round(number * {"M": 1e6, "B": 1e9}[unit])

    @property
    def formula_params(self) -> int:
        """Parameters by the guide's formula."""
        return calc_e88_params(self.dim, self.n_heads, self.n_state, self.depth)

    @property
    def agrees(self) -> bool:
        """Whether the guide's formula gives the printed count, to its digits."""
        unit = 1e6 if self.published.endswith("M") else 1e7
        return round(self.formula_params / unit) == round(self.published_params / unit)

    @property
    def corrected_dim(self) -> int | None:
        """A dim whose exact count is the published one to 1 %; None where the guide agrees.

        The nearest multiple of 64, or of 32 or less if none is near enough.
        """
        if self.agrees:
            return None
        base, wanted = self.with_dim(64).count_params(), self.published_params
        per_dim = (self.with_dim(128).count_params() - base) / 64  # the count is affine in dim
        exact = 64 + (wanted - base) / per_dim
        for multiple in (64, 32, 16, 8):
            dim = round(exact / multiple) * multiple
            if abs(self.with_dim(dim).count_params() - wanted) <= 0.01 * wanted:
                return dim
        raise AssertionError(self)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("h32n32-100m", 1280, 32, 32, 20, "105M", "32K"),
        Preset("h40n32-100m", 1152, 40, 32, 20, "107M", "40K"),
        Preset("h24n48-100m", 1280, 24, 48, 20, "106M", "55K"),
        Preset("h64n32-500m", 2432, 64, 32, 20, "499M", "65K"),
        Preset("h68n32-500m", 2304, 68, 32, 20, "502M", "70K"),
        Preset("h72n32-500m", 2176, 72, 32, 20, "502M", "74K"),
        Preset("h76n32-500m", 2048, 76, 32, 20, "499M", "78K"),
        Preset("h48n48-500m", 2176, 48, 48, 20, "502M", "110K"),
        Preset("h40n64-500m", 1920, 40, 64, 20, "492M", "164K"),
        Preset("h96n32-1b", 2816, 96, 32, 24, "1.01B", "98K"),
        Preset("h80n48-1b", 2688, 80, 48, 24, "1.02B", "184K"),
        Preset("h64n64-1b", 2560, 64, 64, 24, "1.03B", "262K"),
    )
}


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A model of another mixer that the guide compares its presets with."""

    name: str
    title: str
    """The mixer's name and the size, as in a sentence."""
    config: LMConfig

    @property
    def state_per_layer(self) -> int:
        """Elements of the state of one layer and sequence."""
        (layer,) = self.config.layers
        return layer.state_size(self.config.dim)


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline(
            "mamba2-500m",
            "Mamba2 at 500M",
            LMConfig(dim=1600, depth=32, layers=(Mamba2Config(),)),
        ),
        Baseline(
            "gated-deltanet-500m",
            "Gated DeltaNet at 500M",
            LMConfig(
                dim=1792,
                depth=23,
                layers=(GatedDeltaNetConfig(n_heads=12, head_dim=128, expand_v=2.0),),
            ),
        ),
    )
}


def find_preset(name: str) -> Preset | Baseline:
    """The preset or baseline of this name; `config` is its model.

    Raises:
        TypeError: the name is no string.
        ValueError: there is none; the message lists those there are.
    """
    require_instance("name", name, str)
    found = PRESETS.get(name) or BASELINES.get(name)
    if found is None:
        names = ", ".join([*PRESETS, *BASELINES])
        raise ValueError(f"unknown preset {name!r}: choose from {names}.")
    return found

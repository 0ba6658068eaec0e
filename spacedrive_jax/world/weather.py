"""Light and air: the weathers a scene may have."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from spacedrive_jax import exact


@dataclasses.dataclass(frozen=True)
class Weather:
    """Light and air of a scene. Colours are red, green, blue from 0 to 1."""

    name: str
    sun_elevation: float
    """Degrees above the horizon."""
    sun: float
    """Strength of the direct light."""
    ambient: tuple[float, float, float]
    horizon: tuple[float, float, float]
    zenith: tuple[float, float, float]
    haze: float
    """Extinction per metre."""
    clouds: float = 0.5
    wet: float = 0.0
    night: float = 0.0


WEATHERS = (
    Weather(
        name="clear",
        sun_elevation=48.0,
        sun=0.78,
        ambient=(0.58, 0.61, 0.66),
        horizon=(0.78, 0.85, 0.92),
        zenith=(0.3, 0.5, 0.82),
        haze=0.0011,
        clouds=0.35,
    ),
    Weather(
        name="overcast",
        sun_elevation=60.0,
        sun=0.14,
        ambient=(0.92, 0.93, 0.95),
        horizon=(0.82, 0.83, 0.85),
        zenith=(0.68, 0.7, 0.74),
        haze=0.0022,
        clouds=0.8,
    ),
    Weather(
        name="late sun",
        sun_elevation=20.0,
        sun=0.85,
        ambient=(0.56, 0.56, 0.6),
        horizon=(0.95, 0.8, 0.62),
        zenith=(0.38, 0.5, 0.74),
        haze=0.0016,
        clouds=0.5,
    ),
    Weather(
        name="rain",
        sun_elevation=55.0,
        sun=0.05,
        ambient=(0.7, 0.73, 0.76),
        horizon=(0.62, 0.65, 0.68),
        zenith=(0.5, 0.53, 0.57),
        haze=0.006,
        clouds=0.9,
        wet=1.0,
    ),
    Weather(
        name="dusk",
        sun_elevation=9.0,
        sun=0.18,
        ambient=(0.46, 0.44, 0.52),
        horizon=(0.7, 0.48, 0.42),
        zenith=(0.2, 0.24, 0.42),
        haze=0.0025,
        clouds=0.5,
        wet=0.0,
        night=0.5,
    ),
    Weather(
        name="night",
        sun_elevation=40.0,
        sun=0.04,
        ambient=(0.2, 0.21, 0.26),
        horizon=(0.1, 0.1, 0.13),
        zenith=(0.02, 0.03, 0.06),
        haze=0.004,
        clouds=0.2,
        wet=0.0,
        night=1.0,
    ),
    Weather(
        name="fog",
        sun_elevation=50.0,
        sun=0.08,
        ambient=(0.84, 0.85, 0.86),
        horizon=(0.76, 0.77, 0.78),
        zenith=(0.72, 0.73, 0.75),
        haze=0.014,
        clouds=0.9,
    ),
)


@dataclasses.dataclass(frozen=True)
class Light:
    """A weather with a sun direction."""

    weather: Weather
    sun_azimuth: float
    """Radians, global frame."""

    @property
    def sun(self) -> Float[np.ndarray, "3"]:
        """Unit vector towards the sun (or the moon)."""
        flat, up = exact.cos_sin(np.radians(self.weather.sun_elevation))
        east, north = exact.cos_sin(self.sun_azimuth)
        return np.array([flat * east, flat * north, up])

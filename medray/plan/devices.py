"""What accelerators give, and what of it a real run gets."""

from __future__ import annotations

from dataclasses import dataclass

from medray.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """One accelerator, by its maker's data sheet: memory, dense bf16 operations per second, memory
    bandwidth, and bandwidth to its neighbours in the node, one way (bytes per second). usd_per_hour: what
    one costs on demand.
    """

    memory_gib: float
    peak: float
    bandwidth: float
    link: float
    usd_per_hour: float


# Prices are round figures of what large clouds listed on demand in 2025, per GPU of a whole machine. They
# change: give --usd-per-gpu-hour.
DEVICES = {
    "l4-24gb": Device(22, 121e12, 300e9, 16e9, 0.8),
    "a10g-24gb": Device(22, 70e12, 600e9, 16e9, 1.0),
    "l40s-48gb": Device(44, 362e12, 864e9, 32e9, 1.9),
    "a100-40gb": Device(39, 312e12, 1555e9, 300e9, 2.7),
    "a100-80gb": Device(79, 312e12, 2039e9, 300e9, 3.4),
    "h100-80gb": Device(79, 989e12, 3350e9, 450e9, 6.9),
    "h200-141gb": Device(139, 989e12, 4800e9, 450e9, 7.9),
}


@dataclass(frozen=True)
class Gains:
    """Shares of the data sheet that a run gets, and speeds of what is no accelerator. Assumptions, each to be
    replaced by a measurement.

    training, prefill: of peak operations. decoding, link: of the bandwidths. encode: rows one CPU decodes and
        tokenises per second.
    prepare: images one CPU reads, checks, hashes and writes per second (benchmarks/prepare_data.py measured
        474). start: seconds
    until a stage's nodes and models are up. endpoint: seconds one judge's reply takes. pairs: judged images
    one CPU turns into pairs per second. bucket: bytes per second that all nodes together read from storage.
    """

    training: float = 0.4
    prefill: float = 0.5
    decoding: float = 0.6
    link: float = 0.6
    encode: float = 100.0
    prepare: float = 400.0
    start: float = 300.0
    endpoint: float = 5.0
    pairs: float = 2000.0
    bucket: float = 5e9


def device_of(name: str) -> Device:
    """Raises ConfigError for an unknown name."""
    if name not in DEVICES:
        raise ConfigError(f"--device {name}: known are {', '.join(DEVICES)}")
    return DEVICES[name]

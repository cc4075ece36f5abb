"""The systems that are measured: every way to segment a scan with one network, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgemuse.calibration.evaluate import settings
from edgemuse.engines.errors import InputError
from edgemuse.engines.registry import statuses
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.cascade import Cascade
from edgemuse.runtime.model.precision import stored_precision

PLAIN = ("openvino", "onnxruntime")
NNUNET = ("eager", "compile", "channels-last", "bf16")


@dataclass(frozen=True)
class System:
    """One way to segment a scan.

    - `edgemuse`, backend, precision, profile: what `edgemuse segment` does.
    - `plain`, backend: the exported graph with its head, logits out, in a session as its maker's manual shows it.
    - `nnunet`, variant[, `mirrored`]: nnU-Net's own predictor on PyTorch; the variant says how its network is run.
    """

    family: str
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name, such as `edgemuse/openvino/fp32/balanced`."""
        return "/".join((self.family, *self.options))


def parse_system(name: str) -> System:
    """Return the system called `name`."""
    family, *options = name.split("/")
    return System(family, tuple(options))


def all_systems(model: Bundle | Cascade, with_reference: bool) -> list[System]:
    """List every system that can be measured here, the baseline first.

    Args:
        model: the network, or a cascade of two, which only edgemuse runs.
        with_reference: whether the nnU-Net model folder that it was exported from is known.
    """
    if isinstance(model, Cascade):
        return _ours(model.mask, model.regions)
    mirrors = bool(model.manifest.network.mirror_axes)
    systems = [System("nnunet", ("eager", "mirrored"))] if with_reference and mirrors else []
    if with_reference:
        systems += [System("nnunet", (variant,)) for variant in NNUNET]
    usable = [status.backend.name for status in statuses() if not status.reason]
    return systems + _ours(model) + [System("plain", (name,)) for name in PLAIN if name in usable]


def _ours(*bundles: Bundle) -> list[System]:
    """List every backend, precision and profile of edgemuse that all bundles can run in."""
    found = dict.fromkeys((s.backend, s.precision, s.profile) for bundle in bundles for s in settings(bundle))
    return [
        System("edgemuse", options)
        for options in found
        if all(stored_precision(options[1]) in bundle.manifest.graphs for bundle in bundles)
    ]


def select(systems: Sequence[System], asked: Sequence[str]) -> list[System]:
    """Return the systems whose names are or begin with one of `asked`, or all without any; raises InputError."""
    for prefix in asked:
        if not any(_matches(system, prefix) for system in systems):
            names = ", ".join(system.name for system in systems)
            raise InputError(f"no system {prefix!r} here; choose from {names} (nnunet/... needs --reference)")
    return [system for system in systems if not asked or any(_matches(system, prefix) for prefix in asked)]


def _matches(system: System, prefix: str) -> bool:
    return f"{system.name}/".startswith(f"{prefix.rstrip('/')}/")


def quick(systems: Sequence[System]) -> list[System]:
    """Choose three: the baseline, the first backend's `reference` and last setting; a peer if two are the same."""
    ours = [system for system in systems if system.family == "edgemuse"]
    first = [system for system in ours if system.options[0] == ours[0].options[0]]
    peers = [system for system in systems if system.family == "plain"]
    return list(dict.fromkeys([baseline(systems), first[0], first[-1], *peers]))[:3]


def baseline(systems: Sequence[System]) -> System:
    """Choose what the others are compared with: nnU-Net as it comes, else edgemuse's `reference` in fp32."""
    for system in systems:
        if system.family == "nnunet" and system.options[0] == "eager":
            return system
    for system in systems:
        if system.family == "edgemuse" and system.options[1:] == ("fp32", "reference"):
            return system
    return systems[0]

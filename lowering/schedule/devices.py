"""GPUs, as the cost model sees them: public figures of their vendors, one row each.

Rates of products are those of dense matrices. Clocks are boost clocks, at which vendors give these rates. What a figure
stands for is said in `Device`; what of it a kernel reaches is said in `roofline`.
"""

from __future__ import annotations

from dataclasses import dataclass

from nestloop.errors import UnknownDeviceError


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: what it is called here.
        arch: what code for it is compiled for, one of `offline.TARGETS`.
        multiprocessors: streaming multiprocessors; of AMD, compute units.
        clock: cycles a second.
        bf16, tf32: FLOP a second of products of bfloat16 or float16, and of tf32 (AMD: xf32).
        bandwidth: bytes of memory a second.
        l2: bytes of the cache that all multiprocessors share; of MI300X, the Infinity Cache.
        registers: of 32 bits, of one multiprocessor.
        thread_registers: that one thread may have.
        shared: bytes of shared memory of one multiprocessor.
        threads: that a multiprocessor holds at once.
        warp: threads that run in step.
        issue: threads of a multiprocessor that take one instruction in a cycle.
        launch: seconds from one launch of a kernel to the next, by PyTorch.
    """

    name: str
    arch: str
    multiprocessors: int
    clock: float
    bf16: float
    tf32: float
    bandwidth: float
    l2: int
    registers: int
    thread_registers: int
    shared: int
    threads: int
    warp: int
    issue: int
    launch: float = 5e-6

    @property
    def is_nvidia(self) -> bool:
        return self.arch.startswith("sm_")


_MIB = 1 << 20
# arch, multiprocessors, clock, then FLOP a second
_HOPPER = ("sm_90", 132, 1.83e9, 989e12, 494e12)
_B200 = ("sm_100", 148, 1.85e9, 2250e12, 1125e12)
_A100 = ("sm_80", 108, 1.41e9, 312e12, 156e12)
_MI300X = ("gfx942", 304, 2.1e9, 1307e12, 653e12)

# NVIDIA's data sheets and tuning guides of H200, H100, B200 (HGX) and A100 (SXM, 80 GB); AMD's of MI300X and CDNA 3. A
# launch is no figure of theirs: 5 microseconds is what PyTorch's eager ops take on a fast host, at best.
DEVICES = {
    device.name: device
    for device in (
        Device("h200", *_HOPPER, 4.8e12, 50 * _MIB, 1 << 16, 255, 228 << 10, 2048, 32, 128),
        Device("h100", *_HOPPER, 3.35e12, 50 * _MIB, 1 << 16, 255, 228 << 10, 2048, 32, 128),
        Device("b200", *_B200, 8e12, 126 * _MIB, 1 << 16, 255, 228 << 10, 2048, 32, 128),
        Device("a100", *_A100, 2.04e12, 40 * _MIB, 1 << 16, 255, 164 << 10, 2048, 32, 128),
        Device("mi300x", *_MI300X, 5.3e12, 256 * _MIB, 1 << 17, 512, 64 << 10, 2048, 64, 64),
    )
}


def device_named(name: str) -> Device:
    """A device of the table.

    Raises:
        UnknownDeviceError: it has no such row.
    """
    if name in DEVICES:
        return DEVICES[name]
    raise UnknownDeviceError(
        "There are no figures of such a device.",
        given=repr(name),
        need=", ".join(DEVICES),
        fix='write device="h200", or add a row to nestloop/lowering/schedule/devices.py',
    )
